// An app that stays: for each line on stdin it asks for a token anew, and prints it, or what was wrong, as JSON.

import { createInterface } from 'node:readline';
import { getToken } from '@vercel/connect';

for await (const line of createInterface({ input: process.stdin })) {
  const options = { forceRefresh: line === 'anew' };
  const answer = await getToken('slack/acme-slack', { subject: { type: 'app' } }, options).catch(
    ({ name, code, status, message }) => ({ name, code, status, message }),
  );
  console.log(JSON.stringify(answer));
}
