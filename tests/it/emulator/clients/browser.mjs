// A person in Chromium, with nothing but the keyboard: follows a link from a page elsewhere, approves or denies, and goes
// on to where the app wants them. Prints what was on the way as JSON. Arguments: the link, the name of a button.

import { chromium } from 'playwright-core';

const [link, button] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync',
  ],
});
try {
  const page = await browser.newPage();
  const complaints = [];
  page.on('console', (message) => {
    if (!message.location().url.endsWith('/favicon.ico')) complaints.push(message.text());
  });
  // Moves the focus as Tab does, as far as an element with this text.
  const press = async (name) => {
    for (let tabs = 0; tabs < 10; tabs += 1) {
      await page.keyboard.press('Tab');
      if ((await page.evaluate(() => document.activeElement.textContent)) !== name) continue;
      await Promise.all([page.waitForNavigation(), page.keyboard.press('Enter')]);
      return;
    }
    throw new Error(`no ${name} to get to on ${page.url()}: ${await page.content()}`);
  };
  await page.setContent('<a></a>');
  await page.evaluate((to) => Object.assign(document.querySelector('a'), { href: to, textContent: 'Connect' }), link);
  await press('Connect');
  const asked = { title: await page.title(), text: await page.innerText('body'), url: page.url() };
  await press(button);
  const said = await page.innerText('p');
  await press('Continue');
  console.log(JSON.stringify({ asked, said, end: page.url(), complaints }));
} finally {
  await browser.close();
}
