// A dev server like any other: four workers, each of which asks for three connectors' tokens. It ends once all have
// them, as it is restarted then.

import cluster from 'node:cluster';
import { getToken } from '@vercel/connect';

const CONNECTORS = ['slack/acme-slack', 'github/acme-github', 'oauth/linear'];

if (cluster.isPrimary) {
  for (let worker = 0; worker < 4; worker++) cluster.fork();
} else {
  for (const connector of CONNECTORS) console.log(await getToken(connector, { subject: { type: 'app' } }));
  cluster.worker.disconnect();
}
