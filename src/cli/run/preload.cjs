// The Node side of `connect-sidecar run`: an app's own `fetch` asks the sidecar where it would ask Vercel Connect.
//
// `NODE_OPTIONS=--require` loads it into every Node process below the child, and into each of its worker threads. It
// must never throw while it loads, keep a process alive, load anything before there is a request to divert, or touch
// any other request: that one reaches the real `fetch` with the very arguments it was made with.
//
// Diverted, to plain HTTP on loopback, are:
// - Connect's five routes (docs/vercel.md section 1.1), to the same path of the sidecar;
// - what carries the placeholder as its bearer to a host that gets the real token, to the sidecar's relay.

'use strict';

const { CONNECT_SIDECAR_URL = '', CONNECT_SIDECAR_BEARER_HOSTS = '', CONNECT_SIDECAR_KEY } = process.env;
// Those of this moment: a test may put a fake in their place later.
const { fetch: originalFetch, setTimeout } = globalThis;

const LOOPBACK_URL = /^http:\/\/(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$/;
const TOKEN_PATH = '/v1/connect/token/';
const CONNECT_HOST = /^api(-[a-z0-9-]+)?\.vercel\.com$/;
const CONNECT_ROUTE = new RegExp(
  '^(POST /v1/connect/(token|authorize|install)/[^/]+' +
    '|GET /v1/connect/connectors/[^/]+' +
    '|DELETE /v1/connect/connectors/[^/]+/tokens)$',
);
// As src/credential/placeholder.rs makes it: a fixed header, any claims, and a fixed text where a signature would be.
const PLACEHOLDER =
  /^[Bb]earer eyJhbGciOiJub25lIiwidHlwIjoiSldUIiwia2lkIjoiY29ubmVjdC1zaWRlY2FyIn0\.[\w-]+\.connect-sidecar-placeholder$/;

// A sidecar that ends is replaced within this: 20 times 100 ms.
const MAX_RETRIES = 20;
const RETRY_PAUSE_MS = 100;
// As many as `fetch` follows.
const MAX_REDIRECTS = 20;

// Each is `HOST[/PATH]`, as src/proxy/hosts.rs writes it: the path and all below, `*` for any one label.
const BEARER_HOST = new RegExp(
  `^(${CONNECT_SIDECAR_BEARER_HOSTS.replace(/[^\w/,*-]/g, '\\$&').replace(/\*/g, '[a-z0-9-]+').replace(/,/g, '|')})(/|$)`,
);

let clientId;

// Names this thread, whose SDK has a cache of its own. By it the sidecar tells an SDK's forced refresh, which looks
// like any other request, from another process that asks for the first time.
function client() {
  clientId = clientId ?? require('node:crypto').randomUUID();
  return clientId;
}

// Where a request goes instead, and with which options; nothing for one that stays as it is.
function divert(input, init) {
  const request = input instanceof Request ? input : undefined;
  const url = new URL(request?.url ?? input);
  const isConnect = CONNECT_HOST.test(url.hostname);
  const takesBearer = BEARER_HOST.test(url.hostname + url.pathname);
  if (url.protocol !== 'https:' || url.port !== '' || !(isConnect || takesBearer)) return undefined;

  // As `fetch` does: what `init` defines overrides the request's own. Both may have it from their prototype.
  const options = {};
  for (const source of [request, init]) {
    for (const name in source) {
      if (source[name] !== undefined) options[name] = source[name];
    }
  }
  const headers = new Headers(options.headers);
  const hasPlaceholder = PLACEHOLDER.test(headers.get('authorization'));
  const method = String(options.method ?? 'GET').toUpperCase();

  let path;
  if (isConnect && url.search === '' && CONNECT_ROUTE.test(`${method} ${url.pathname}`)) {
    path = url.pathname;
    // Otherwise the sidecar would warn that it drops an app's own credential.
    if (hasPlaceholder) headers.delete('authorization');
    headers.set('sidecar-client', client());
  } else if (takesBearer && hasPlaceholder) {
    path = `/_sidecar/v1/relay/${url.hostname}${url.pathname}${url.search}`;
  } else {
    return undefined;
  }
  if (CONNECT_SIDECAR_KEY) headers.set('sidecar-key', CONNECT_SIDECAR_KEY);
  return {
    url: CONNECT_SIDECAR_URL + path,
    options: { ...options, headers },
    isToken: path.startsWith(TOKEN_PATH),
    relayedTo: path === url.pathname ? undefined : url,
  };
}

// Token requests that have no answer yet, by what they ask.
const underWay = new Map();

// As long as it has no token, an SDK asks for it as often as it is called. All such requests but the first wait for the
// first one's answer and bear no name then: the sidecar would take them for forced refreshes.
function ask({ url, options, isToken }) {
  if (!isToken || typeof options.body !== 'string' || options.signal) return send(url, options);
  const asked = `${url} ${options.body}`;
  const first = underWay.get(asked);
  if (first) {
    options.headers.delete('sidecar-client');
    const next = () => send(url, options);
    return first.then(next, next);
  }
  const sent = send(url, options);
  const answered = () => underWay.delete(asked);
  underWay.set(asked, sent);
  sent.then(answered, answered);
  return sent;
}

// Sends a diverted request; again where nobody listened, unless its body is a stream, which can be read only once.
async function send(url, options) {
  const retries = options.body?.[Symbol.asyncIterator] ? 0 : MAX_RETRIES;
  for (let tried = 0; ; tried++) {
    try {
      return await originalFetch(url, options);
    } catch (error) {
      if (error?.cause?.code !== 'ECONNREFUSED') throw error;
      if (tried === retries) {
        throw new TypeError(`connect-sidecar is not running: ${CONNECT_SIDECAR_URL} refuses`, { cause: error });
      }
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_PAUSE_MS));
  }
}

// A request for the relay. Its redirects are followed as `fetch` would, but from where it was meant to go: our own address
// is nothing that they could refer to, and the key is for nobody but the sidecar.
async function relay({ url, options, relayedTo }, redirects = 0) {
  const reply = await send(url, { ...options, redirect: 'manual' });
  const location = reply.headers.get('location');
  if (options.redirect === 'manual' || !location || ![301, 302, 303, 307, 308].includes(reply.status)) return reply;
  if (options.redirect === 'error' || redirects === MAX_REDIRECTS) {
    throw new TypeError('fetch failed', { cause: new Error('unexpected redirect') });
  }
  const to = new URL(location, relayedTo);
  const headers = new Headers(options.headers);
  headers.delete('sidecar-key');
  if (to.origin !== relayedTo.origin) ['authorization', 'cookie'].forEach((name) => headers.delete(name));
  const next = { ...options, headers };
  const method = String(options.method ?? 'GET').toUpperCase();
  if (reply.status < 307 && method !== 'GET' && method !== 'HEAD' && (reply.status === 303 || method === 'POST')) {
    Object.assign(next, { method: 'GET', body: undefined });
    ['content-type', 'content-length', 'content-encoding'].forEach((name) => headers.delete(name));
  }
  const diverted = divert(to, next);
  return diverted?.relayedTo ? relay(diverted, redirects + 1) : originalFetch(to, next);
}

// A method, for the name and length of the original and no constructor.
const { fetch } = {
  fetch(input, init = undefined) {
    let diverted;
    try {
      diverted = divert(input, init);
    } catch {
      // Whatever is wrong with the request, the real `fetch` says it best.
    }
    if (!diverted) return Reflect.apply(originalFetch, this, arguments);
    return diverted.relayedTo ? relay(diverted) : ask(diverted);
  },
};

// `Reflect.set` does not throw where the global cannot be changed.
if (originalFetch && LOOPBACK_URL.test(CONNECT_SIDECAR_URL)) Reflect.set(globalThis, 'fetch', fetch);
