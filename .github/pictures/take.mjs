// Takes the README's pictures of a running sidecar: its page in light and dark, and a terminal. Everything in them comes
// from the program given as an argument, at work on the emulator with a home of its own.

import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { chromium } from 'playwright-core';
import sharp from 'sharp';

const [program, into] = process.argv.slice(2).map((path) => resolve(path));
// A project with two connectors, and one that is not linked to it.
const SEED = `
[team]
slug = "acme"
[[members]]
id = "user_ada"
[[projects]]
name = "web"
[[connectors]]
uid = "slack/acme-slack"
links = [{ project = "web", environments = ["development"] }]
installations = [{ id = "inst_acme", tenant = "T0ACME" }]
[[connectors]]
uid = "github/acme-github"
links = [{ project = "web", environments = ["development"] }]
installations = [{ id = "inst_github", tenant = "1234567" }]
[[connectors]]
uid = "salesforce/crm"
`;
const home = mkdtempSync(join(tmpdir(), 'connect-sidecar-pictures-'));
const project = join(home, 'web');
const started = [];

// Starts the program in the project; resolves with the URL that its ready line names.
function serve(args, onLog = () => {}) {
  // In a terminal, so that it uses colour: `script` makes one.
  const child = spawn('script', ['-qec', `'${program}' ${args.join(' ')}`, '/dev/null'], { cwd: project, env, stdio: 'pipe' });
  started.push(child);
  return new Promise((ready, failed) => {
    child.on('exit', (code) => failed(new Error(`${args} ended with ${code}`)));
    createInterface(child.stdout).on('line', (line) => {
      onLog(line);
      const url = / listening on (http:\S+)/.exec(line)?.[1];
      if (url) ready(url);
    });
  });
}

const env = { PATH: process.env.PATH, HOME: home, CONNECT_SIDECAR_PORT: '0', TERM: 'xterm-256color' };
const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync'],
});
try {
  mkdirSync(project);
  writeFileSync(join(home, 'seed.toml'), SEED);
  const emulator = await serve(['emulate', '--port', '0', '--seed', join(home, 'seed.toml')]);
  const pull = async (asked) => {
    const file = await (await fetch(`${emulator}/_emulator/env.local?${asked}`)).text();
    writeFileSync(join(project, '.env.local'), file, { mode: 0o600 });
  };
  await pull('life=12h&age=4h24m');
  let log = [];
  const sidecar = await serve(['serve', '--upstream', emulator], (line) => log.push(line));
  const { key } = JSON.parse(readFileSync(join(home, `.local/state/connect-sidecar/${new URL(sidecar).port}.json`)));
  const ask = (connector, body) => fetch(`${sidecar}/v1/connect/token/${encodeURIComponent(connector)}`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body),
  });
  const app = { subject: { type: 'app' } };

  const page = await (await browser.newContext({ viewport: { width: 1040, height: 1080 }, deviceScaleFactor: 1.5 })).newPage();
  const open = async (colorScheme) => {
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' });
    await page.goto('about:blank');
    await page.goto(`${sidecar}/_sidecar/#key=${key}`);
    await page.getByText('Live', { exact: true }).waitFor();
  };
  const seen = (text) => page.getByText(text).first().waitFor();
  const work = async () => {
    for (let n = 0; n < 14; n += 1) await ask('slack/acme-slack', app);
    await Promise.all(Array.from({ length: 5 }, () => ask('github/acme-github', app)));
    for (let n = 0; n < 5; n += 1) await ask(n % 2 ? 'github/acme-github' : 'slack/acme-slack', app);
    await ask('salesforce/crm', app);
    await ask('slack/acme-slack', app);
    await seen('vercel connect attach salesforce/crm');
    // The state follows the events.
    const { cache } = await (await fetch(`${sidecar}/_sidecar/v1/status`)).json();
    await page.waitForFunction((hits) => document.getElementById('hits').textContent === hits, String(cache.hits));
  };

  await open('light');
  await work();
  await picture(await page.screenshot(), 'page-light.png');
  await pull('life=4h&age=3h55m30s');
  await seen('The OIDC token of acme/web expires in');
  await open('dark');
  await work();
  await picture(await page.screenshot(), 'page-dark.png');

  const status = spawnSync('script', ['-qec', `'${program}' status`, '/dev/null'], { cwd: project, env, encoding: 'utf8' });
  const shown = [['connect-sidecar', log]];
  if (status.status === 0) shown.push(['connect-sidecar status', status.stdout.trimEnd().split('\n')]);
  await page.emulateMedia({ colorScheme: 'dark' });
  await page.setViewportSize({ width: 980, height: 400 });
  await page.goto('about:blank');
  await page.setContent(terminal(shown));
  await picture(await page.locator('pre').screenshot(), 'terminal.png', 32);
} finally {
  await browser.close();
  // Ctrl-C, in their order's reverse.
  for (const child of started.reverse()) {
    const ended = new Promise((resolve) => child.removeAllListeners('exit').on('exit', resolve));
    child.stdin.write('\x03');
    await ended;
  }
  rmSync(home, { recursive: true, force: true });
}

async function picture(bytes, name, colours = 192) {
  await sharp(bytes).png({ palette: true, colours, effort: 10, dither: 0 }).toFile(join(into, name));
}

// What a terminal shows, as HTML: the colours of ANSI, and nothing else of its codes.
function terminal(commands) {
  const colors = { 1: 'font-weight:600', 2: 'color:#8b95a5', 31: 'color:#ff8087', 32: 'color:#46cc90', 33: 'color:#f0ae4d', 34: 'color:#84aaff', 35: 'color:#d49bff', 36: 'color:#5cc8d7' };
  const escaped = (text) => text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
  const line = (text) => {
    let style = [];
    return text.split(/\x1b\[([\d;]*)m/).map((part, at) => {
      if (at % 2 === 0) return part && `<span style="${style.join(';')}">${escaped(part.replace(/\x1b\[[^a-z]*[a-z]|[\x00-\x08\x0b-\x1f]/gi, ''))}</span>`;
      for (const code of part.split(';')) style = code === '0' || code === '' ? [] : [...style, colors[code] ?? ''];
      return '';
    }).join('');
  };
  const text = commands.map(([command, lines]) => `<b>$ ${command}</b>\n${lines.map(line).join('\n')}`).join('\n\n');
  return `<body style="margin:0;background:#0d1014;color:#e8ebf0"><pre style="margin:0;padding:22px 26px;font:13.5px/1.55 'DejaVu Sans Mono',monospace;white-space:pre-wrap">${text}</pre>`;
}
