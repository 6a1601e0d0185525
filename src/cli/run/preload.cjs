// The Node.js part of `connect-sidecar run`: sends an app's `fetch` requests for Vercel Connect to the sidecar.
//
// `NODE_OPTIONS=--require` loads it into every Node process below the child and into their worker threads. It must not
// throw while it loads, keep a process alive, or load modules before there is a request to divert. All other requests
// must reach the real `fetch` with their original arguments.
//
// Diverted to plain HTTP on loopback:
// - Connect's five routes (docs/vercel.md section 1.1), to the same path of the sidecar;
// - requests with the placeholder as bearer to a host that gets the real token, to the sidecar's relay.

'use strict';

const { CONNECT_SIDECAR_URL = '', CONNECT_SIDECAR_BEARER_HOSTS = '', CONNECT_SIDECAR_KEY } = process.env;
// The original functions: a test may replace them with fakes later.
const { fetch: originalFetch, setTimeout } = globalThis;

const LOOPBACK_URL = /^http:\/\/(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$/;
const TOKEN_PATH = '/v1/connect/token/';
const CONNECT_HOST = /^api(-[a-z0-9-]+)?\.vercel\.com$/;
const CONNECT_ROUTE = new RegExp(
  '^(POST /v1/connect/(token|authorize|install)/[^/]+' +
    '|GET /v1/connect/connectors/[^/]+' +
    '|DELETE /v1/connect/connectors/[^/]+/tokens)$',
);
// The format of src/credential/placeholder.rs: a fixed header, any claims, and a fixed text instead of a signature.
const PLACEHOLDER =
  /^[Bb]earer eyJhbGciOiJub25lIiwidHlwIjoiSldUIiwia2lkIjoiY29ubmVjdC1zaWRlY2FyIn0\.[\w-]+\.connect-sidecar-placeholder$/;

// A sidecar that ends is replaced within 20 times 100 ms.
const MAX_RETRIES = 20;
const RETRY_PAUSE_MS = 100;
// The limit of `fetch`.
const MAX_REDIRECTS = 20;

// Entries are `HOST[/PATH]` as in src/proxy/hosts.rs: a path includes everything below it, `*` matches one label.
const BEARER_HOST = new RegExp(
  `^(${CONNECT_SIDECAR_BEARER_HOSTS.replace(/[^\w/,*-]/g, '\\$&').replace(/\*/g, '[a-z0-9-]+').replace(/,/g, '|')})(/|$)`,
);

let clientId;

// Identifies this thread, whose SDK has its own cache. This lets the sidecar tell an SDK's forced refresh, which looks
// like any other request, from the first request of another process.
function client() {
  clientId = clientId ?? require('node:crypto').randomUUID();
  return clientId;
}

// The new URL and options of a diverted request; undefined if the request is not diverted.
function divert(input, init) {
  const request = input instanceof Request ? input : undefined;
  const url = new URL(request?.url ?? input);
  const isConnect = CONNECT_HOST.test(url.hostname);
  const takesBearer = BEARER_HOST.test(url.hostname + url.pathname);
  if (url.protocol !== 'https:' || url.port !== '' || !(isConnect || takesBearer)) return undefined;

  // As in `fetch`, `init` overrides the request's options. Both may inherit options from their prototype.
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
    // With it, the sidecar would warn that it drops an app's own credential.
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

// Token requests in flight, by URL and body.
const inFlight = new Map();

// Without a cached token, an SDK sends a request for every call. Equal requests wait for the first one's response and
// are sent without a client id; otherwise the sidecar would take them for forced refreshes.
function fetchToken({ url, options, isToken }) {
  if (!isToken || typeof options.body !== 'string' || options.signal) return send(url, options);
  const key = `${url} ${options.body}`;
  const first = inFlight.get(key);
  if (first) {
    options.headers.delete('sidecar-client');
    const next = () => send(url, options);
    return first.then(next, next);
  }
  const sent = send(url, options);
  const done = () => inFlight.delete(key);
  inFlight.set(key, sent);
  sent.then(done, done);
  return sent;
}

// Sends a diverted request. Retries if the connection is refused, unless the body is a stream, which can be read only
// once.
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

// Sends a request through the relay. Redirects are resolved against the original URL, since the sidecar's address means
// nothing to the server, and the key is removed, since it is for the sidecar only.
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

// Defined as a method: same name and length as the original, and not a constructor.
const { fetch } = {
  fetch(input, init = undefined) {
    let diverted;
    try {
      diverted = divert(input, init);
    } catch {
      // An invalid request: the real `fetch` reports the error.
    }
    if (!diverted) return Reflect.apply(originalFetch, this, arguments);
    return diverted.relayedTo ? relay(diverted) : fetchToken(diverted);
  },
};

// `Reflect.set` does not throw if the global is read-only.
if (originalFetch && LOOPBACK_URL.test(CONNECT_SIDECAR_URL)) Reflect.set(globalThis, 'fetch', fetch);
