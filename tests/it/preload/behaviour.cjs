// What the preload does to `fetch`, in one process: loads it over a `fetch` that notes its arguments, and asks for what
// it should divert and what it should not. Argument: the preload. Ends with an error at the first thing that is wrong.

'use strict';

const assert = require('node:assert/strict');
const { once } = require('node:events');
const fs = require('node:fs');
const http = require('node:http');
const os = require('node:os');
const path = require('node:path');

const PRELOAD = process.argv[2];
const PLACEHOLDER =
  'eyJhbGciOiJub25lIiwidHlwIjoiSldUIiwia2lkIjoiY29ubmVjdC1zaWRlY2FyIn0.eyJleHAiOjk5OTk5OTk5OTl9.connect-sidecar-placeholder';
const TOKEN = '/v1/connect/token/slack%2Facme-slack';
const API = 'https://api.vercel.com';
const GATEWAY = 'https://ai-gateway.vercel.sh';
const bearer = (token) => ({ authorization: `Bearer ${token}` });

// The sidecar's place. `seen` has its requests; it answers `{}`.
const seen = [];
let answer = (request, response) => response.end('{}');
const sidecar = http.createServer(async (request, response) => {
  const chunks = [];
  const noted = { method: request.method, target: request.url, headers: request.headers, chunks };
  seen.push(noted);
  request.on('data', (chunk) => {
    chunks.push(chunk.toString());
    sidecar.emit('chunk');
  });
  await once(request, 'end');
  noted.body = chunks.join('');
  answer(request, response);
});

// The `fetch` below the preload. It lets through what goes to this machine.
const nodesFetch = globalThis.fetch;
const nodesTimeout = globalThis.setTimeout;
const elsewhere = {};
let calls = [];
globalThis.fetch = function fetch(...args) {
  calls.push(args);
  const url = args[0] instanceof Request ? args[0].url : String(args[0]);
  return url.startsWith('https:') ? Promise.resolve(elsewhere) : nodesFetch(...args);
};
const below = globalThis.fetch;

// `fetch` as it is after the preload was loaded with these variables.
function load(environment, preload = PRELOAD, over = below) {
  delete require.cache[require.resolve(preload)];
  Object.assign(process.env, environment);
  globalThis.fetch = over;
  require(preload);
  for (const name of Object.keys(environment)) delete process.env[name];
  return globalThis.fetch;
}

const tests = {
  async 'without a sidecar on loopback it does nothing'() {
    const urls = ['', 'nonsense', 'https://127.0.0.1:1', 'http://example.com', 'http://127.0.0.1.example.com:1'];
    urls.push('http://127.0.0.1:1@example.com', 'http://127.0.0.1:1/path', 'http://127.0.0.2:1', 'http://[::2]:1');
    for (const url of urls) assert.equal(load({ CONNECT_SIDECAR_URL: url }), below, url);
    assert.equal(load({}), below);
    assert.equal(load({ CONNECT_SIDECAR_URL: 'http://127.0.0.1:1' }, PRELOAD, null), null, 'a Node without fetch');
    for (const url of ['http://127.0.0.1:1', 'http://localhost:1', 'http://[::1]:1', 'http://localhost']) {
      for (const hosts of ['', '*', ',', '([{\\\n?+|']) {
        assert.notEqual(load({ CONNECT_SIDECAR_URL: url, CONNECT_SIDECAR_BEARER_HOSTS: hosts }), below, url);
      }
    }
  },

  async 'fetch looks like the real one'({ environment }) {
    const before = Object.getOwnPropertyDescriptor(globalThis, 'fetch');
    const fetch = load(environment);
    const { value, ...after } = Object.getOwnPropertyDescriptor(globalThis, 'fetch');
    assert.deepEqual({ value: before.value, ...after }, before);
    assert.deepEqual([value.name, value.length], [nodesFetch.name, nodesFetch.length]);
    assert.equal(fetch('http://127.0.0.1:1').catch(() => {}) instanceof Promise, true);
  },

  async 'a global that cannot be changed is left alone'({ environment }) {
    const change = Object.getOwnPropertyDescriptor(globalThis, 'fetch');
    Object.defineProperty(globalThis, 'fetch', { value: below, writable: false, configurable: true });
    delete require.cache[require.resolve(PRELOAD)];
    Object.assign(process.env, environment);
    require(PRELOAD);
    assert.equal(globalThis.fetch, below);
    for (const name of Object.keys(environment)) delete process.env[name];
    Object.defineProperty(globalThis, 'fetch', change);
  },

  async 'the five routes go to the sidecar, however they are written'({ fetch }) {
    const post = { method: 'POST', body: '{"a":1}', headers: { 'content-type': 'application/json' } };
    const revoke = `${API}/v1/connect/connectors/slack%2Facme-slack/tokens`;
    const table = [
      [[API + TOKEN, post], 'POST', TOKEN, '{"a":1}'],
      [[new URL(API + TOKEN), post], 'POST', TOKEN, '{"a":1}'],
      [[{ toString: () => API + TOKEN }, post], 'POST', TOKEN, '{"a":1}'],
      [[new Request(API + TOKEN, post)], 'POST', TOKEN, '{"a":1}'],
      [[new Request(API + TOKEN, post), undefined], 'POST', TOKEN, '{"a":1}'],
      [[new Request(API + TOKEN, post), { body: '{"b":2}', method: undefined }], 'POST', TOKEN, '{"b":2}'],
      [[new Request(API + TOKEN), post], 'POST', TOKEN, '{"a":1}'],
      [[API + TOKEN, new Request('http://other.example/', post)], 'POST', TOKEN, '{"a":1}'],
      [[API + TOKEN, Object.create(post)], 'POST', TOKEN, '{"a":1}'],
      [[API + TOKEN, { ...post, method: 'post' }], 'POST', TOKEN, '{"a":1}'],
      [[API + TOKEN, { method: 'POST' }], 'POST', TOKEN, ''],
      [[API + TOKEN, { method: 'POST', body: Buffer.from('bytes') }], 'POST', TOKEN, 'bytes'],
      [[API + TOKEN, { method: 'POST', body: new Blob(['blob']) }], 'POST', TOKEN, 'blob'],
      [[API + TOKEN, { method: 'POST', body: new Blob(['stream']).stream(), duplex: 'half' }], 'POST', TOKEN, 'stream'],
      [[`${API}/v1/connect/authorize/x`, post], 'POST', '/v1/connect/authorize/x', '{"a":1}'],
      [[`${API}/v1/connect/install/x`, post], 'POST', '/v1/connect/install/x', '{"a":1}'],
      [[`${API}/v1/connect/connectors/x`], 'GET', '/v1/connect/connectors/x', ''],
      [[revoke, { method: 'delete', body: '{}' }], 'DELETE', new URL(revoke).pathname, '{}'],
      // Hosts, and the path as it is.
      [[`https://api-fra1.vercel.com${TOKEN}`, post], 'POST', TOKEN, '{"a":1}'],
      [[`https://API.Vercel.com:443${TOKEN}#here`, post], 'POST', TOKEN, '{"a":1}'],
      [[`${API}/v1/connect/token/a%252Fb%2fc~'(*)`, post], 'POST', "/v1/connect/token/a%252Fb%2fc~'(*)", '{"a":1}'],
      [[`${API}/v1/other/../connect/token/x`, post], 'POST', '/v1/connect/token/x', '{"a":1}'],
      [[`${API}${TOKEN}?`, post], 'POST', TOKEN, '{"a":1}'],
    ];
    for (const [args, method, target, body] of table) {
      seen.length = 0;
      const reply = await fetch(...args);
      assert.deepEqual([reply.status, await reply.text()], [200, '{}']);
      assert.equal(seen.length, 1);
      assert.deepEqual([seen[0].method, seen[0].target, seen[0].body], [method, target, body]);
      const sent = new Headers(args[1]?.headers ?? args[0].headers);
      for (const [name, value] of sent) assert.equal(seen[0].headers[name], value, `${name} of ${target}`);
    }
  },

  async 'what is sent of a body is sent with its length'({ fetch }) {
    for (const body of ['text', Buffer.from('text'), new Blob(['text'])]) {
      await fetch(API + TOKEN, { method: 'POST', body });
      assert.equal(seen.at(-1).headers['content-length'], '4');
    }
  },

  async 'other requests reach the real one as they are'({ fetch }) {
    const post = { method: 'POST', body: '{}' };
    const carries = { ...post, headers: bearer(PLACEHOLDER) };
    const table = [
      [],
      [undefined],
      ['nonsense', post],
      ['http://'],
      [Symbol('x')],
      [API + TOKEN],
      [API + TOKEN, { method: 'PUT' }],
      [`${API}/v1/connect/token/`, post],
      [`${API}/v1/connect/token/slack/acme-slack`, post],
      [`${API}/v1/connect/token/x/import`, post],
      [`${API}/v1/connect/token/x?teamId=team_acme`, post],
      [`${API}/V1/connect/token/x`, post],
      [`${API}/v1/connect//token/x`, post],
      [`${API}/v2/connect/token/x`, post],
      [`${API}/v1/connect/connectors/x`, post],
      [`${API}/v1/connect/connectors/x/tokens`],
      [`${API}/v1/connect/connectors/x`, { method: 'DELETE' }],
      [`${API}/v1/connect/connectors/x/projects`],
      [`${API}/v2/user`, carries],
      [new URL(`${API}/v2/user`), carries],
      [new Request(`${API}/v2/user`, carries)],
      [new Request(`${API}/v2/user`, carries), { method: 'PATCH' }],
      [API + TOKEN, { method: 'POST', headers: { 'not a name': 'x' } }],
      [`${API}:8443${TOKEN}`, post],
      [`https://api.vercel.com.example.com${TOKEN}`, post],
      [`https://example.com${TOKEN}`, post],
      [`https://xapi.vercel.com${TOKEN}`, post],
      [`https://api-.vercel.com${TOKEN}`, post],
      [`https://api-a.b.vercel.com${TOKEN}`, post],
      [`https://vercel.com${TOKEN}`, post],
      // Hosts that get no real token, and requests that carry no placeholder.
      ['https://example.com/', carries],
      ['https://queue.example/', carries],
      ['https://a.b.queue.example/', carries],
      ['https://vercel.com/api/blobs', carries],
      ['https://vercel.com/api/blob/../other', carries],
      ['https://example.com/vercel.com/api/blob', carries],
      [`${GATEWAY}:8443/v1/x`, carries],
      [`${GATEWAY}/v1/x`, post],
      [`${GATEWAY}/v1/x`, { headers: bearer('own') }],
      [`${GATEWAY}/v1/x`, { headers: { authorization: PLACEHOLDER } }],
      [`${GATEWAY}/v1/x`, { headers: { authorization: `Basic x, Bearer ${PLACEHOLDER}` } }],
      [`${GATEWAY}/v1/x`, { headers: bearer(`${PLACEHOLDER}x`) }],
      [`${GATEWAY}/v1/x`, { headers: bearer(PLACEHOLDER.replace('eyJ', 'eyK')) }],
      [`${GATEWAY}/v1/x`, { headers: { 'x-other': `Bearer ${PLACEHOLDER}` } }],
    ];
    for (const args of table) {
      calls = [];
      await Promise.resolve(fetch(...args)).catch(() => {});
      assert.equal(calls.length, 1);
      assert.equal(calls[0].length, args.length);
      args.forEach((arg, at) => assert.equal(calls[0][at], arg));
    }
    for (const scheme of ['http', 'ftp']) {
      calls = [];
      await fetch(`${scheme}://api.vercel.com${TOKEN}`, { ...post, signal: AbortSignal.abort() }).catch(() => {});
      assert.equal(calls.length, 1);
      assert.ok(calls[0][0].startsWith(scheme));
    }
    assert.equal(seen.length, 0);
  },

  async 'a server on this machine sees no difference'({ fetch }) {
    const url = `http://127.0.0.1:${sidecar.address().port}/v1/connect/token/x`;
    const shapes = [
      () => [url],
      () => [new URL(url), { method: 'POST', body: '{}', headers: [['X-One', '1']] }],
      () => [new Request(url, { method: 'POST', body: '{}', headers: bearer(PLACEHOLDER) })],
      () => [new Request(url, { method: 'POST', body: 'x' }), { method: 'PUT', body: new URLSearchParams('a=b') }],
      () => [url, { method: 'POST', body: new Blob(['stream']).stream(), duplex: 'half' }],
    ];
    for (const shape of shapes) {
      await fetch(...shape());
      await nodesFetch(...shape());
      const [first, second] = seen.splice(0);
      assert.deepEqual(first, second);
    }
  },

  async 'it names the thread and gives the key'({ environment }) {
    const fetch = load({ ...environment, CONNECT_SIDECAR_KEY: 'the-key' });
    await fetch(API + TOKEN, { method: 'POST', headers: { 'sidecar-client': 'spoofed', ...bearer(PLACEHOLDER) } });
    await fetch(API + TOKEN, { method: 'POST', headers: bearer('own') });
    const [first, second] = seen;
    assert.match(first.headers['sidecar-client'], /^[0-9a-f-]{36}$/);
    assert.equal(first.headers['sidecar-client'], second.headers['sidecar-client']);
    assert.deepEqual([first.headers['sidecar-key'], second.headers['sidecar-key']], ['the-key', 'the-key']);
    assert.equal(first.headers.authorization, undefined, 'nobody needs the placeholder');
    assert.equal(second.headers.authorization, 'Bearer own', 'the sidecar says that it drops it');
    seen.length = 0;
    const plain = load(environment);
    await plain(API + TOKEN, { method: 'POST' });
    assert.equal(seen[0].headers['sidecar-key'], undefined);
  },

  async 'of equal token requests at once only the first is named, and the others come after it'({ fetch }) {
    const shapes = [
      [TOKEN, '{"a":1}'],
      [TOKEN, '{"a":2}'],
      ['/v1/connect/token/other', '{"a":1}'],
      ['/v1/connect/authorize/x', '{"a":1}'],
      [TOKEN, Buffer.from('{"a":1}')],
      [TOKEN, '{"a":1}', AbortSignal.timeout(60_000)],
    ];
    const send = ([target, body, signal]) => fetch(API + target, { method: 'POST', body, signal });
    const isNamed = () => seen.splice(0).map((request) => 'sidecar-client' in request.headers);
    for (const status of [200, 503]) {
      const answers = [];
      answer = (request, response) => {
        answers.push(() => response.writeHead(status).end('{}'));
        sidecar.emit('asked');
      };
      const sent = shapes.flatMap((shape) => [send(shape), send(shape), send(shape)]);
      while (answers.length < 3 + 9) await once(sidecar, 'asked');
      assert.deepEqual(isNamed(), Array(12).fill(true));
      answers.splice(0).forEach((say) => say());
      while (answers.length < 6) await once(sidecar, 'asked');
      assert.deepEqual(isNamed(), Array(6).fill(false));
      answers.splice(0).forEach((say) => say());
      for (const reply of await Promise.all(sent)) assert.equal(reply.status, status);
      const later = send(shapes[0]);
      while (answers.length < 1) await once(sidecar, 'asked');
      assert.deepEqual(isNamed(), [true]);
      answers.pop()();
      await later;
    }
    answer = (request, response) => response.destroy();
    const both = [send(shapes[0]), send(shapes[0])];
    for (const reply of both) await assert.rejects(reply, TypeError);
    assert.deepEqual(isNamed(), [true, false]);
  },

  async 'the placeholder goes through the relay to the hosts that take a bearer'({ fetch }) {
    const carries = { method: 'POST', body: '{}', headers: { ...bearer(PLACEHOLDER), 'x-one': '1' } };
    const relay = '/_sidecar/v1/relay/ai-gateway.vercel.sh';
    const table = [
      [[`${GATEWAY}/v1/chat/completions`, carries], '/v1/chat/completions'],
      [[new Request(`${GATEWAY}/v1/a%2Fb?x=%20&y#z`, carries)], '/v1/a%2Fb?x=%20&y'],
      [[GATEWAY, { ...carries, headers: new Headers(carries.headers) }], '/'],
      [['https://AI-Gateway.vercel.sh:443/x', { ...carries, headers: Object.entries(carries.headers) }], '/x'],
    ];
    for (const [args, target] of table) {
      seen.length = 0;
      await fetch(...args);
      const { authorization, 'x-one': one, 'sidecar-client': named } = seen[0].headers;
      assert.deepEqual([seen[0].target, seen[0].body], [relay + target, '{}']);
      assert.deepEqual([authorization, one, named], [`Bearer ${PLACEHOLDER}`, '1', undefined]);
    }
    for (const place of ['fra1.queue.example/x', 'vercel.com/api/blob', 'vercel.com/api/blob/x%2Fy?z']) {
      await fetch(`https://${place}`, { headers: { authorization: `bearer ${PLACEHOLDER}` } });
      assert.equal(seen.at(-1).target, `/_sidecar/v1/relay/${place}`);
    }
  },

  async 'bodies stream both ways'({ fetch }) {
    const shapes = [(url, init) => [url, init], (url, init) => [new Request(url, init)]];
    for (const shape of shapes) {
      let producer;
      const body = new ReadableStream({ start: (controller) => (producer = controller) });
      let finish;
      answer = (request, response) => {
        response.write('first');
        finish = () => response.end('second');
      };
      const init = { method: 'POST', body, duplex: 'half', headers: bearer(PLACEHOLDER) };
      const replying = fetch(...shape(`${GATEWAY}/x`, init));
      producer.enqueue(Buffer.from('one'));
      await once(sidecar, 'chunk');
      producer.enqueue(Buffer.from('two'));
      producer.close();
      const reader = (await replying).body.getReader();
      const read = async () => Buffer.from((await reader.read()).value).toString();
      assert.equal(await read(), 'first');
      finish();
      assert.equal(await read(), 'second');
      assert.equal((await reader.read()).done, true);
      assert.equal(seen.pop().body, 'onetwo');
    }
  },

  async 'redirects of the relay lead on from where the request was meant to go, without the key'({ environment }) {
    const fetch = load({ ...environment, CONNECT_SIDECAR_KEY: 'the key' });
    const relay = '/_sidecar/v1/relay/ai-gateway.vercel.sh';
    const places = { [`${relay}/a/b`]: '../c?d', [`${relay}/c?d`]: 'https://storage.example.com/e' };
    answer = (request, response) => {
      const location = places[request.url];
      response.writeHead(location ? 307 : 200, location ? { location } : {}).end('{}');
    };
    const options = { method: 'POST', body: '{}', headers: { ...bearer(PLACEHOLDER), cookie: 'a=b' } };
    seen.length = calls.length = 0;
    assert.equal(await fetch(`${GATEWAY}/a/b`, options), elsewhere);
    assert.deepEqual(seen.map(({ target, body }) => [target, body]), [[`${relay}/a/b`, '{}'], [`${relay}/c?d`, '{}']]);
    for (const { headers } of seen) assert.equal(headers['sidecar-key'], 'the key');
    const [to, { headers, method, body }] = calls.at(-1);
    assert.deepEqual([String(to), method, body], ['https://storage.example.com/e', 'POST', '{}']);
    for (const name of ['sidecar-key', 'authorization', 'cookie']) assert.equal(headers.get(name), null, name);

    answer = (request, response) => response.writeHead(303, { location: '/done' }).end();
    seen.length = 0;
    const loop = await fetch(`${GATEWAY}/x`, options).catch((error) => error);
    assert.ok(loop instanceof TypeError && seen.length === 21, String(loop));
    assert.deepEqual([seen[1].method, seen[1].target, seen[1].body], ['GET', `${relay}/done`, '']);
    const kept = await fetch(`${GATEWAY}/x`, { ...options, redirect: 'manual' });
    assert.deepEqual([kept.status, kept.headers.get('location')], [303, '/done']);
    await assert.rejects(fetch(`${GATEWAY}/x`, { ...options, redirect: 'error' }), TypeError);
  },

  async 'signal and redirect are kept'({ fetch }) {
    const reason = new Error('enough');
    await assert.rejects(fetch(API + TOKEN, { method: 'POST', signal: AbortSignal.abort(reason) }), reason);
    const stopped = new AbortController();
    answer = () => stopped.abort(reason);
    await assert.rejects(fetch(new Request(API + TOKEN, { method: 'POST', signal: stopped.signal })), reason);
    answer = (request, response) => response.writeHead(307, { location: '/elsewhere' }).end();
    const reply = await fetch(new Request(API + TOKEN, { method: 'POST', redirect: 'manual' }));
    assert.equal(reply.status, 307);
    await assert.rejects(fetch(API + TOKEN, { method: 'POST', redirect: 'error' }), TypeError);
  },

  async 'nobody there is waited for, then named'({ environment }) {
    const closed = http.createServer((request, response) => request.resume().on('end', () => response.end('back')));
    closed.listen(0, '127.0.0.1');
    await once(closed, 'listening');
    const { port } = closed.address();
    const stop = () => new Promise((resolve) => closed.close(resolve));
    await stop();
    let pauses = 0;
    let duringPause = () => {};
    globalThis.setTimeout = (resume, pause) => {
      assert.equal(pause, 100);
      pauses++;
      Promise.resolve(duringPause()).then(resume);
    };
    const fetch = load({ ...environment, CONNECT_SIDECAR_URL: `http://127.0.0.1:${port}` });
    // Not the one that an app's tests may have put in its place.
    globalThis.setTimeout = nodesTimeout;
    const error = await fetch(API + TOKEN, { method: 'POST', body: '{}' }).catch((error) => error);
    assert.equal(error.message, `connect-sidecar is not running: http://127.0.0.1:${port} refuses`);
    assert.equal(error.cause.cause.code, 'ECONNREFUSED');
    assert.ok(error instanceof TypeError);
    assert.equal(pauses, 20);

    pauses = 0;
    const body = new Blob(['x']).stream();
    await assert.rejects(fetch(API + TOKEN, { method: 'POST', body, duplex: 'half' }), /is not running/);
    assert.equal(pauses, 0, 'a stream can be read only once');

    const reason = new Error('enough');
    const stopped = new AbortController();
    duringPause = () => stopped.abort(reason);
    await assert.rejects(fetch(API + TOKEN, { method: 'POST', signal: stopped.signal }), reason);
    assert.equal(pauses, 1);

    duringPause = async () => {
      closed.listen(port, '127.0.0.1');
      await once(closed, 'listening');
    };
    const reply = await fetch(API + TOKEN, { method: 'POST', body: '{}' });
    assert.equal(await reply.text(), 'back');
    assert.equal(pauses, 2);
    closed.closeAllConnections?.();
    await stop();
  },

  async 'twice is as good as once, and it can be wrapped'({ environment }) {
    const copy = path.join(fs.mkdtempSync(path.join(os.tmpdir(), 'preload-')), 'copy.cjs');
    fs.copyFileSync(PRELOAD, copy);
    const once = load(environment);
    const twice = load(environment, copy, once);
    fs.rmSync(path.dirname(copy), { recursive: true });
    assert.notEqual(twice, once);
    globalThis.fetch = (...args) => twice(...args);
    assert.equal((await fetch(API + TOKEN, { method: 'POST', body: '{}' })).status, 200);
    assert.equal((await fetch(`${GATEWAY}/x`, { headers: bearer(PLACEHOLDER) })).status, 200);
    assert.deepEqual(
      seen.map((request) => request.target),
      [TOKEN, '/_sidecar/v1/relay/ai-gateway.vercel.sh/x'],
    );
    assert.equal(await fetch('https://example.com/'), elsewhere);
  },
};

(async () => {
  sidecar.listen(0, '127.0.0.1');
  await once(sidecar, 'listening');
  const environment = {
    CONNECT_SIDECAR_URL: `http://127.0.0.1:${sidecar.address().port}`,
    CONNECT_SIDECAR_BEARER_HOSTS: 'ai-gateway.vercel.sh,*.queue.example,vercel.com/api/blob',
  };
  for (const [name, test] of Object.entries(tests)) {
    seen.length = 0;
    answer = (request, response) => response.end('{}');
    globalThis.fetch = below;
    try {
      await test({ environment, fetch: load(environment) });
    } catch (error) {
      error.message = `${name}: ${error.message}`;
      throw error;
    }
  }
  console.log(Object.keys(tests).length);
  // Connections that are kept alive would hold it for some seconds: that is Node's own `fetch`, not the preload.
  process.exit();
})();
