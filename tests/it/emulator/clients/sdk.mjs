// An app with `@vercel/connect` against the emulator: a consent, an installation, a revocation, and each error. Prints one
// JSON object. Argument: the emulator's origin, for what a person does and for what is to go wrong.

import * as connect from '@vercel/connect';

const [emulator] = process.argv.slice(2);
const SLACK = 'slack/acme-slack';
const app = { subject: { type: 'app' } };
const user = { subject: { type: 'user', id: 'user_new' } };

const own = async (method, route, body) => {
  const reply = await fetch(`${emulator}/_emulator/${route}`, { method, body: body && JSON.stringify(body) });
  if (!reply.ok) throw new Error(`${route}: ${reply.status} ${await reply.text()}`);
};
const results = {};
const step = async (name, call) => {
  results[name] = await call().catch((error) => ({
    class: error.constructor.name,
    isConnectError: error instanceof connect.ConnectError,
    code: error.code,
    status: error.status,
    message: error.message,
  }));
};
const token = (connector, params) => () => connect.getToken(connector, params);
const failing = (fault, connector) => async () => {
  await own('POST', 'faults', { on: '/v1/connect/token/', ...fault });
  return connect.getToken(connector, app).finally(() => own('DELETE', 'faults'));
};

await step('before consent', token(SLACK, user));
await own('POST', 'consents', { url: (await connect.startAuthorization(SLACK, user)).url, deny: true });
await step('after denial', token(SLACK, user));
const returnUrl = 'http://localhost:3000/done';
await own('POST', 'consents', { url: (await connect.startAuthorization(SLACK, user, { returnUrl })).url });
await step('after consent', token(SLACK, user));
await step('metadata', () => connect.getConnectorMetadata(SLACK));
await step('revocation', async () => (await connect.revokeToken(SLACK, user)) ?? 'done');
await step('after revocation', token(SLACK, user));

await step('before installation', token('slack/not-installed', app));
const begun = await connect.experimental_startInstallation('slack/not-installed', {}, { tenantId: 'T0NEW' });
await own('POST', 'consents', { url: begun.url });
await step('after installation', () => connect.getTokenResponse('slack/not-installed', app));

await step('not linked', token('salesforce/crm', app));
await step('not enabled', token('snowflake/warehouse', app));
await step('not found', token('slack/none', app));
await step('unresolved', token(SLACK, { subject: { type: 'jwt-bearer', sub: 'user_ada' } }));
await step('no token', failing({ kind: 'revoked_grant' }, 'oauth/linear'));
await step('unauthorized', failing({ kind: 'unauthorized' }, 'oauth/linear'));
await step('unavailable', failing({ kind: 'status', status: 503, code: 'internal_server_error' }, 'oauth/linear'));
await step('limited', failing({ kind: 'rate_limited' }, 'oauth/linear'));
console.log(JSON.stringify(results));
