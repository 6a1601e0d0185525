"use strict";
// Shows what the sidecar says of itself: its state, asked for now and then, and its events as they happen. The key is
// kept for this tab, which may be loaded anew, until it is refused. All that comes from the sidecar is put in as text, and nothing in it is unseen.

const LIVE_ROWS = 100;
const STATUS_EVERY_MS = 10_000;
const SILENCE_MS = 30_000; // the stream says something every 10 s
const LONGEST_PAUSE_MS = 15_000;
const OPEN = "connect-sidecar status --open";

const KEY = "key"; // in sessionStorage, where a browser has it: other origins, and so other ports, do not see it

let key = "";
let round = 0; // of following the sidecar; a new key begins a new one
let state = null; // as last told
let skewMs = 0; // the sidecar's clock minus this browser's
let heardAt = 0;
let stream = new AbortController();
let known = new Set(); // warnings that were announced
let waiting = []; // requests that are not shown yet, oldest first
let paused = false;

const $ = (id) => document.getElementById(id);
const now = () => Date.now() + skewMs;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const say = (text) => show("said", text);

// Control characters, and those that reorder what stands around them: what has them is not what it looks like.
const UNSEEN = /[\p{Cc}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/u;
const visible = (text) => text.replaceAll(new RegExp(UNSEEN, "gu"), (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

function show(id, text) {
  const node = typeof id === "string" ? $(id) : id;
  text = text === null || text === undefined || text === "" ? "–" : visible(String(text));
  if (node.textContent !== text) node.textContent = text;
  return node;
}

function mood(node, value) {
  if (value) node.dataset.mood = value;
  else delete node.dataset.mood;
}

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.map((child) => (typeof child === "string" ? visible(child) : child)));
  return node;
}

// 11 h 59 min, 42 min, 4 min 32 s.
function spoken(ms) {
  const s = Math.max(0, Math.floor(ms / 1000));
  const [d, h, min] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${min} min`;
  if (min >= 10) return `${min} min`;
  return min ? `${min} min ${s % 60} s` : `${s} s`;
}

const timeOfDay = (text) => new Date(text).toLocaleTimeString("en-GB");
const count = (number) => number.toLocaleString("en");

// A command to type, with a button that copies it if it is what it looks like.
function command(text) {
  const code = make("code", "", text);
  if (UNSEEN.test(text)) return code;
  const button = make("button", "", "Copy", make("span", "unseen", ` ${text}`));
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.firstChild.data = "Copied";
      say(`Copied: ${text}`);
      setTimeout(() => (button.firstChild.data = "Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(code);
      say("Could not copy. The command is selected.");
    }
  });
  return make("span", "command", code, button);
}

// What mends an error: words, and the command to paste where there is one.
function advice({ hint, command: text }) {
  return make("div", "soft advice", ...[text !== hint && hint, text && command(text)].filter(Boolean));
}

// Makes a parent's children those of the items. What stays is not touched, so that the focus stays, too.
function keep(parent, items, keyOf, create) {
  const old = new Map([...parent.children].map((node) => [node.key, node]));
  const seen = new Map();
  const nodes = items.map((item) => {
    const name = keyOf(item);
    const times = (seen.get(name) ?? 0) + 1;
    seen.set(name, times);
    const node = old.get(`${name} ${times}`) ?? Object.assign(create(item), { key: `${name} ${times}` });
    node.update(item);
    return node;
  });
  for (const node of old.values()) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
  });
}

// --- What the sidecar is asked ---

class KeyRefused extends Error {}

async function ask(method, path, options) {
  const asker = key;
  const headers = { "Sidecar-Key": asker };
  if (method === "POST") headers["Content-Type"] = "application/json";
  const reply = await fetch(`v1/${path}`, { method, headers, cache: "no-store", credentials: "omit", ...options });
  if (asker !== key) throw new Error("the key is another by now");
  if (reply.status === 401) throw new KeyRefused();
  return reply;
}

async function load() {
  const reply = await ask("GET", "status");
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  state = await reply.json();
  const skew = Date.parse(state.now) - Date.now();
  skewMs = Math.abs(skew) < 1500 ? 0 : skew; // it is told in whole seconds
  showState();
}

let due = 0;
function loadSoon(ms = 250) {
  due ||= setTimeout(() => {
    due = 0;
    load().catch(failed);
  }, ms);
}

function failed(error) {
  if (error instanceof KeyRefused) close();
}

async function follow() {
  const mine = ++round;
  let pause = 1000;
  while (mine === round) {
    try {
      await load();
      stream = new AbortController();
      heardAt = Date.now();
      const reply = await ask("GET", "events", { signal: stream.signal });
      if (!reply.ok) throw new Error(`status ${reply.status}`);
      pause = 1000;
      link("good", "Live");
      await read(reply.body.pipeThrough(new TextDecoderStream()).getReader(), mine);
    } catch (error) {
      failed(error);
    }
    if (mine !== round) return;
    link("warn", "Reconnecting…");
    await sleep(pause);
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

async function read(reader, mine) {
  let text = "";
  let past = true; // what happened before comes first, up to an empty line
  for (;;) {
    const { done, value } = await reader.read();
    if (done || mine !== round) return;
    heardAt = Date.now();
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line === "") past = false;
      else happened(line, past);
    }
  }
}

function happened(line, past) {
  const event = JSON.parse(line);
  if (event.event === "request" || event.event === "refusal") {
    // After a reconnection, some of it is known.
    const isKnown = past && [...$("requests").children, ...waiting].some((row) => row.line === line);
    if (!isKnown) {
      waiting.push({ ...event, line });
      waiting = waiting.slice(-LIVE_ROWS);
      setTimeout(showRequests, 100);
    }
  }
  if (past) return;
  if (event.event === "rotation") {
    const text = `Fresh token since ${timeOfDay(event.at)}`;
    say(`${text}, good for ${spoken(Date.parse(event.expires_at) - now())}`);
    show("refreshed", text);
  }
  loadSoon();
}

// --- What is shown ---

function link(value, text) {
  const pill = show("link", text);
  pill.hidden = false;
  mood(pill, value);
}

// Nothing can be asked: says why, and how to come back.
function close() {
  round += 1;
  stream.abort();
  const [title, why] = !key
    ? ["Open this page with its key", "Nothing is shown without the key of the running sidecar."]
    : state
      ? ["The sidecar has restarted", "Each start has a key of its own, and the one that this page was opened with is no longer good."]
      : ["This key is not good", "It is not that of the sidecar which runs now: each start has a key of its own."];
  remember("");
  state = null;
  show("closed-title", title);
  show("closed-why", why);
  $("closed-command").replaceChildren(command(OPEN));
  $("board").hidden = $("notes").hidden = $("link").hidden = true;
  $("closed").hidden = false;
  document.title = `${title} · connect-sidecar`;
  say(`${title}. Run ${OPEN}`);
}

const MOODS = { valid: "good", expiring: "warn", expired: "bad", missing: "bad", invalid: "bad" };

function showState() {
  const { oidc, cache, upstream, failures, usage, warnings, tokens } = state;
  $("closed").hidden = true;
  $("board").hidden = $("notes").hidden = false;
  show("instance", `${state.project} · version ${state.version} · process ${state.pid} · up ${spoken(state.uptime_seconds * 1000)}`);

  show("project", oidc.project);
  show("owner", oidc.owner);
  show("environment", oidc.environment);
  show("source", oidc.source);
  show("fingerprint", oidc.fingerprint);
  show("ends", oidc.expires_at && new Date(oidc.expires_at).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }));
  showTimeLeft();

  show("month-title", `Token requests in ${new Date(`${usage.month}-01`).toLocaleString("en", { month: "long", timeZone: "UTC" })}`);
  show("billed", count(usage.requests));
  show("saved", count(usage.saved));
  show("money", usage.saved_usd.toLocaleString("en-US", { style: "currency", currency: "USD", maximumFractionDigits: 3 }));
  Object.assign($("allowance"), { max: usage.allowance, low: usage.allowance * 0.6, high: usage.allowance * 0.9, value: usage.requests });
  const isBilled = !/^(localhost|127\.[\d.]+|\[::1\])$/.test(new URL(upstream.url).hostname);
  const free = isBilled ? "" : "; what comes from an upstream on this machine is not billed";
  show("allowance-words", `${count(usage.requests)} of the ${count(usage.allowance)} a month that the Hobby plan includes${free}`);

  show("hits", count(cache.hits));
  show("misses", count(cache.misses));
  show("collapsed", count(cache.collapsed));
  show("sent", count(upstream.requests));
  if (failures.count) {
    const failed = `${count(failures.count)} failed ${failures.count === 1 ? "request" : "requests"}, last at ${timeOfDay(failures.last_at)}`;
    mood(show("health", failed), "warn");
  } else {
    const hasAny = upstream.requests > 0;
    mood(show("health", hasAny ? "No errors" : "Nothing sent yet"), hasAny ? "good" : "");
  }
  show("upstream", upstream.url);

  $("warnings-section").hidden = warnings.length === 0;
  keep($("warnings"), warnings, (warning) => `${warning.code} ${warning.hint}`, warningItem);
  // Each is announced once, and not again because its minutes pass.
  for (const warning of warnings) if (!known.has(warning.code)) say(warning.message);
  known = new Set(warnings.map((warning) => warning.code));

  const order = (token) => [token.connector, token.subject, token.stored_at, token.expires_at].join(" ");
  tokens.sort((a, b) => (order(a) < order(b) ? -1 : 1));
  keep($("tokens"), tokens, order, tokenRow);
  const none = tokens.length === 0;
  $("no-tokens").hidden = !none;
  $("tokens-table").hidden = $("evict-all").disabled = none;
}

// Runs down between two states, by the clock on the wall.
function showTimeLeft() {
  if (!state) return;
  const { oidc } = state;
  const left = oidc.expires_at === null ? null : Date.parse(oidc.expires_at) - now();
  const ended = left !== null && left <= 0 && MOODS[oidc.state] !== "bad";
  const word = ended ? "expired" : oidc.state;
  const life = (oidc.lifetime_seconds ?? 0) * 1000;
  const isBad = MOODS[word] === "bad";
  const part = isBad ? 0 : left === null || life <= 0 ? 1 : Math.min(1, left / life);
  const words = word === "expired" ? `${spoken(-left)} ago` : isBad ? "No token" : left === null ? "No end known" : spoken(left);

  mood($("ring"), MOODS[word]);
  show("left", words);
  show("state", word[0].toUpperCase() + word.slice(1));
  $("arc").setAttribute("stroke-dashoffset", 1 - part);
  $("arc").classList.toggle("empty", part === 0);
  $("ring").setAttribute("aria-valuenow", Math.round(part * 100));
  $("ring").setAttribute("aria-valuetext", `${word}, ${words}${isBad || left === null ? "" : " left"}`);
  document.title = visible(`${isBad ? word : words} · ${oidc.project ?? state.project} · connect-sidecar`);
  if (ended) loadSoon(1000);
  for (const row of $("tokens").children) row.tick();
}

function warningItem() {
  const text = make("span");
  const item = make("li", "", text);
  item.update = ({ code, message, ...remedy }) => {
    mood(item, /expired|missing|invalid/.test(code) ? "bad" : "warn");
    show(text, message);
    if (remedy.hint && item.children.length === 1) item.append(advice(remedy));
  };
  return item;
}

function tokenRow({ connector }) {
  const [name, subject, left, hits] = ["strong", "span", "span", "td"].map((tag) => make(tag));
  subject.className = "soft";
  hits.className = "number";
  const life = make("meter");
  Object.assign(life, { max: 1, low: 0.1, high: 0.25, optimum: 1 });
  life.setAttribute("aria-label", visible(`Life left of ${connector}`));
  const evict = make("button", "", "Evict", make("span", "unseen", ` ${connector}`));
  evict.type = "button";
  evict.addEventListener("click", () => drop(`?connector=${encodeURIComponent(connector)}`, connector));
  const row = make("tr", "", make("td", "", name, subject), make("td", "", left, life), hits, make("td", "", evict));
  row.tick = () => {
    const ends = Date.parse(row.token.expires_at);
    show(left, ends > now() ? spoken(ends - now()) : "ended");
    life.value = (ends - now()) / (ends - Date.parse(row.token.stored_at));
  };
  row.update = (token) => {
    row.token = token;
    show(name, token.connector);
    show(subject, token.subject);
    show(hits, count(token.hits));
    row.tick();
  };
  return row;
}

async function drop(query, what) {
  try {
    const reply = await ask("DELETE", `cache${query}`);
    const { evicted, error } = await reply.json();
    say(reply.ok ? `Evicted ${what}: ${evicted} ${evicted === 1 ? "token" : "tokens"}` : error.message);
    await load();
    // The button may be gone, and the focus with it.
    if (document.activeElement === document.body) $("tokens-title").focus();
  } catch (error) {
    failed(error);
  }
}

async function refresh() {
  const button = $("refresh");
  button.disabled = true;
  show("refreshed", "Refreshing…");
  try {
    const reply = await ask("POST", "refresh");
    const { error } = await reply.json().catch(() => ({}));
    const outcome = reply.ok
      ? `Refreshed at ${timeOfDay(now())}`
      : reply.status === 404
        ? "This sidecar cannot refresh by itself. Run vercel env pull."
        : `Not refreshed. ${error?.message ?? `It answered ${reply.status}.`}${error?.command ? ` Run ${error.command}` : ""}`;
    show("refreshed", outcome);
    say(outcome);
    await load();
  } catch (error) {
    if (!(error instanceof KeyRefused)) show("refreshed", "Not refreshed: the sidecar did not answer.");
    failed(error);
  }
  button.disabled = false;
}

const isHeld = () => paused || (matchMedia("(hover: hover)").matches && $("requests").matches(":hover")) || $("requests").contains(document.activeElement);

function showRequests() {
  const held = isHeld() && waiting.length > 0;
  $("held").hidden = !held;
  if (held) return void show("held", `Held: ${count(waiting.length)}${waiting.length === LIVE_ROWS ? " or more" : ""} new`);
  if (waiting.length === 0) return;
  const body = $("requests");
  body.prepend(...waiting.reverse().map(requestRow));
  waiting = [];
  while (body.children.length > LIVE_ROWS) body.lastChild.remove();
  $("no-requests").hidden = true;
}

function requestRow({ at, action, connector, method, path, subject, cache, status, code, message, ms, line, ...remedy }) {
  const time = make("time", "soft", timeOfDay(at));
  time.dateTime = at;
  const what = make("div", "what", make("strong", "", connector ?? path ?? "refused"), make("span", "soft", [action ?? method, subject].filter(Boolean).join(" · ")));
  const isFine = status < 400;
  const pill = make("span", "pill", isFine ? (cache ?? "done") : String(status));
  mood(pill, isFine ? (cache === "hit" || cache === "collapsed" ? "good" : "") : status < 500 ? "warn" : "bad");
  const result = make("div", "", pill, make("span", "soft", isFine ? String(status) : (code ?? "")));
  const row = make("li", "", time, what, result, make("span", "soft ms", ms === undefined ? "" : `${count(ms)} ms`));
  if (message) row.append(make("div", "soft advice", message));
  if (remedy.hint) row.append(advice(remedy));
  row.line = line;
  return row;
}

// --- What is done ---

function remember(text) {
  key = text;
  try {
    if (text) sessionStorage.setItem(KEY, text);
    else sessionStorage.removeItem(KEY);
  } catch {
    // A browser that keeps nothing for pages.
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function open() {
  const { hash } = location;
  // Out of the address bar, and out of the history.
  if (hash) history.replaceState(null, "", location.pathname);
  const found = /^#key=([\w-]+)$/.exec(hash);
  if (found) remember(found[1]);
  else key ||= remembered();
  if (!key) return close();
  stream.abort();
  follow();
}

$("refresh").addEventListener("click", refresh);
$("evict-all").addEventListener("click", () => drop("", "all"));
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  showRequests();
});
$("requests").addEventListener("pointerleave", () => showRequests());
addEventListener("hashchange", open);
document.addEventListener("visibilitychange", () => state && !document.hidden && loadSoon(0));
setInterval(() => {
  showTimeLeft();
  showRequests();
  if (state && Date.now() - heardAt > SILENCE_MS) stream.abort();
}, 1000);
setInterval(() => state && loadSoon(0), STATUS_EVERY_MS);
open();
