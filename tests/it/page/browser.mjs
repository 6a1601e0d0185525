// Drives a browser: each line of stdin is a JSON list of a command and its arguments, and is answered on stdout with
// {"value"} or {"error"}. Ends with stdin. Argument: the path of the axe-core script.

import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { chromium } from 'playwright-core';

const TIMEOUT_MS = 15_000;

const axe = readFileSync(process.argv[2], 'utf8');
const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync',
  ],
});
const context = await browser.newContext({ viewport: { width: 1040, height: 800 }, reducedMotion: 'reduce' });
await context.grantPermissions(['clipboard-read', 'clipboard-write']);
// In addition to the console's own messages.
await context.addInitScript(() => {
  addEventListener('securitypolicyviolation', (event) => console.error(`violates ${event.violatedDirective}`));
});
const page = await context.newPage();
page.setDefaultTimeout(TIMEOUT_MS);
const complaints = [];
const origins = new Set();
page.on('console', (message) => ['error', 'warning'].includes(message.type()) && complaints.push(message.text()));
page.on('pageerror', (error) => complaints.push(String(error)));
page.on('dialog', (dialog) => (complaints.push(`a dialog: ${dialog.message()}`), dialog.dismiss()));
page.on('request', (request) => origins.add(new URL(request.url()).origin));

const commands = {
  async open(url) {
    // Navigating to another fragment alone would not load the page.
    await page.goto('about:blank');
    await page.goto(url);
  },
  // Waits until an expression is truthy. Polls from outside, since the page's CSP forbids doing so inside.
  async until(expression) {
    for (const end = Date.now() + TIMEOUT_MS; !(await page.evaluate(expression)); ) {
      if (Date.now() > end) throw new Error('timed out');
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  },
  evaluate: (expression) => page.evaluate(expression),
  click: (selector) => page.click(selector),
  hover: (selector) => page.hover(selector),
  press: (key) => page.keyboard.press(key),
  async look(width, colorScheme) {
    await page.setViewportSize({ width, height: 800 });
    await page.emulateMedia({ colorScheme });
  },
  // Violations found by axe-core, which is evaluated by the debugger to bypass the page's CSP.
  async axe() {
    const { violations } = await page.evaluate(`(() => { ${axe}; return axe.run(); })()`);
    return violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(' ')}`);
  },
  // Answers requests to a path instead of the sidecar.
  answer: (path, status, body) => page.route(`**${path}`, (route) => route.fulfill({ status, body, contentType: 'application/json' })),
  // Serves a page of another origin.
  pretend: (url, body) => page.route(url, (route) => route.fulfill({ body, contentType: 'text/html' })),
  frames: () => Promise.all(page.frames().slice(1).map((frame) => frame.evaluate(() => document.body.innerText).catch(String))),
  picture: (path) => page.screenshot({ path, fullPage: true }),
  complaints: () => complaints.splice(0),
  origins: () => [...origins],
};

console.log(JSON.stringify({ value: 'ready' }));
for await (const line of createInterface(process.stdin)) {
  const [command, ...args] = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await commands[command](...args)) ?? null };
  } catch (error) {
    answer = { error: `${error}\n${await page.innerText('body').catch(String)}\n${complaints.join('\n')}` };
  }
  console.log(JSON.stringify(answer));
}
await browser.close();
