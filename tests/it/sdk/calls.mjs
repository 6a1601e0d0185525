// An app like any other: all that it does with `@vercel/connect`, and what each call cost. Prints one JSON object.

import { Worker, isMainThread, parentPort } from 'node:worker_threads';
import * as connect from '@vercel/connect';

const SLACK = 'slack/acme-slack';
const app = { subject: { type: 'app' } };

if (isMainThread) {
  await main();
} else {
  parentPort.postMessage(await connect.getToken(SLACK, app));
}

async function main() {
  const results = {};
  // How many requests went upstream so far.
  const upstream = async () => {
    const status = await fetch(`${process.env.CONNECT_SIDECAR_URL}/_sidecar/v1/status`);
    return (await status.json()).upstream.requests;
  };
  const step = async (name, call) => {
    const before = await upstream();
    const value = await call().catch((error) => ({
      class: error.constructor.name,
      isConnectError: error instanceof connect.ConnectError,
      code: error.code,
      status: error.status,
      message: error.message,
    }));
    results[name] = { value, cost: (await upstream()) - before };
  };

  await step('getToken', () => connect.getToken(SLACK, app));
  await step('getTokenResponse', () => connect.getTokenResponse(SLACK, app));
  await step('forceRefresh', () => connect.getToken(SLACK, app, { forceRefresh: true }));
  await step('rejected', () => {
    connect.deleteTokenCacheEntry(SLACK, app);
    return connect.getToken(SLACK, app);
  });
  await step('worker', async () => {
    const worker = new Worker(new URL(import.meta.url));
    return new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
  });
  await step('atOnce', async () => {
    const params = { ...app, scopes: ['chat:write'] };
    return new Set(await Promise.all(Array.from({ length: 10 }, () => connect.getToken(SLACK, params)))).size;
  });
  await step('user', () => connect.getToken(SLACK, { subject: { type: 'user', id: 'user_ada' } }));
  await step('startAuthorization', () => connect.startAuthorization('oauth/linear', { subject: { type: 'user' } }));
  await step('getConnectorMetadata', () => connect.getConnectorMetadata(SLACK));
  for (const [name, connector, params] of [
    ['not linked', 'salesforce/crm', app],
    ['not enabled', 'snowflake/warehouse', app],
    ['not installed', 'slack/not-installed', app],
    ['not installed, newer', 'slack/renamed', app],
    ['not authorized', SLACK, { subject: { type: 'user', id: 'user_other' } }],
    ['no token', 'slack/no-token', app],
    ['not found', 'slack/none', app],
    ['percent', 'slack/50%2Foff', app],
  ]) {
    await step(name, () => connect.getToken(connector, params));
  }
  await step('revokeToken', async () => {
    await connect.revokeToken(SLACK, app);
    return 'revoked';
  });
  await step('after revokeToken', () => connect.getToken(SLACK, app));
  console.log(JSON.stringify(results));
}
