"use strict";
// Shows the sidecar's status, which it polls, and its events, which it streams. The key is kept in this tab until the
// sidecar refuses it, so the page can be reloaded. All data is inserted as text, with invisible characters escaped.

const LIVE_ROWS = 100;
const STATUS_EVERY_MS = 10_000;
const SILENCE_MS = 30_000; // the stream sends a heartbeat every 10 s
const MAX_RETRY_PAUSE_MS = 15_000;
const OPEN_COMMAND = "connect-sidecar status --open";

const KEY_ITEM = "key"; // in sessionStorage, which other origins, and so other ports, cannot read

let key = "";
let session = 0; // incremented with each new key, which ends the previous event stream
let state = null; // the last status
let skewMs = 0; // the sidecar's clock minus this browser's
let lastDataAt = 0;
let stream = new AbortController();
let announced = new Set(); // codes of warnings that were announced
let pending = []; // requests not shown yet, oldest first
let paused = false;

const $ = (id) => document.getElementById(id);
const now = () => Date.now() + skewMs;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const announce = (text) => show("announcer", text);

// Control characters and those that change the text direction, which make a text look like another.
const INVISIBLE = /[\p{Cc}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/u;
const visible = (text) => text.replaceAll(new RegExp(INVISIBLE, "gu"), (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

function show(id, text) {
  const node = typeof id === "string" ? $(id) : id;
  text = text === null || text === undefined || text === "" ? "–" : visible(String(text));
  if (node.textContent !== text) node.textContent = text;
  return node;
}

function setMood(node, value) {
  if (value) node.dataset.mood = value;
  else delete node.dataset.mood;
}

function element(tag, className, ...children) {
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

// A command with a button to copy it. Without the button if it contains invisible characters.
function command(text) {
  const code = element("code", "", text);
  if (INVISIBLE.test(text)) return code;
  const button = element("button", "", "Copy", element("span", "visually-hidden", ` ${text}`));
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.firstChild.data = "Copied";
      announce(`Copied: ${text}`);
      setTimeout(() => (button.firstChild.data = "Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(code);
      announce("Could not copy. The command is selected.");
    }
  });
  return element("span", "command", code, button);
}

// The hint of an error, and the command that fixes it, if there is one.
function advice({ hint, command: text }) {
  return element("div", "soft advice", ...[text !== hint && hint, text && command(text)].filter(Boolean));
}

// Updates the children of a node to match the items. Existing children are reused, so the focus is kept.
function reconcile(parent, items, keyOf, create) {
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

// --- Requests to the sidecar ---

class KeyRefused extends Error {}

async function request(method, path, options) {
  const usedKey = key;
  const headers = { "Sidecar-Key": usedKey };
  if (method === "POST") headers["Content-Type"] = "application/json";
  const reply = await fetch(`v1/${path}`, { method, headers, cache: "no-store", credentials: "omit", ...options });
  if (usedKey !== key) throw new Error("the key has changed");
  if (reply.status === 401) throw new KeyRefused();
  return reply;
}

async function loadState() {
  const reply = await request("GET", "status");
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  state = await reply.json();
  const skew = Date.parse(state.now) - Date.now();
  skewMs = Math.abs(skew) < 1500 ? 0 : skew; // `now` is in whole seconds
  showState();
}

let loadTimer = 0;
function scheduleLoad(ms = 250) {
  loadTimer ||= setTimeout(() => {
    loadTimer = 0;
    loadState().catch(handleFailure);
  }, ms);
}

function handleFailure(error) {
  if (error instanceof KeyRefused) showClosed();
}

async function followEvents() {
  const current = ++session;
  let pause = 1000;
  while (current === session) {
    try {
      await loadState();
      stream = new AbortController();
      lastDataAt = Date.now();
      const reply = await request("GET", "events", { signal: stream.signal });
      if (!reply.ok) throw new Error(`status ${reply.status}`);
      pause = 1000;
      showConnection("good", "Live");
      await readEvents(reply.body.pipeThrough(new TextDecoderStream()).getReader(), current);
    } catch (error) {
      handleFailure(error);
    }
    if (current !== session) return;
    showConnection("warn", "Reconnecting…");
    await sleep(pause);
    pause = Math.min(pause * 2, MAX_RETRY_PAUSE_MS);
  }
}

async function readEvents(reader, current) {
  let text = "";
  let past = true; // past events come first, up to an empty line
  for (;;) {
    const { done, value } = await reader.read();
    if (done || current !== session) return;
    lastDataAt = Date.now();
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line === "") past = false;
      else handleEvent(line, past);
    }
  }
}

function handleEvent(line, past) {
  const event = JSON.parse(line);
  if (event.event === "request" || event.event === "refusal") {
    // After a reconnect, some past events are shown already.
    const isKnown = past && [...$("requests").children, ...pending].some((row) => row.line === line);
    if (!isKnown) {
      pending.push({ ...event, line });
      pending = pending.slice(-LIVE_ROWS);
      setTimeout(showRequests, 100);
    }
  }
  if (past) return;
  if (event.event === "rotation") {
    const text = `Fresh token since ${timeOfDay(event.at)}`;
    announce(`${text}, good for ${spoken(Date.parse(event.expires_at) - now())}`);
    show("refreshed", text);
  }
  scheduleLoad();
}

// --- Display ---

function showConnection(value, text) {
  const pill = show("link", text);
  pill.hidden = false;
  setMood(pill, value);
}

// Replaces the data with an explanation why none is available, and how to open the page.
function showClosed() {
  session += 1;
  stream.abort();
  const [title, why] = !key
    ? ["Open this page with its key", "Nothing is shown without the key of the running sidecar."]
    : state
      ? ["The sidecar has restarted", "Each start has a key of its own, and the one that this page was opened with is no longer good."]
      : ["This key is not good", "It is not that of the sidecar which runs now: each start has a key of its own."];
  storeKey("");
  state = null;
  show("closed-title", title);
  show("closed-why", why);
  $("closed-command").replaceChildren(command(OPEN_COMMAND));
  $("board").hidden = $("notes").hidden = $("link").hidden = true;
  $("closed").hidden = false;
  document.title = `${title} · connect-sidecar`;
  announce(`${title}. Run ${OPEN_COMMAND}`);
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
    setMood(show("health", failed), "warn");
  } else {
    const hasAny = upstream.requests > 0;
    setMood(show("health", hasAny ? "No errors" : "Nothing sent yet"), hasAny ? "good" : "");
  }
  show("upstream", upstream.url);

  $("warnings-section").hidden = warnings.length === 0;
  reconcile($("warnings"), warnings, (warning) => `${warning.code} ${warning.hint}`, warningItem);
  // Announced once per code, not whenever the minutes in the message change.
  for (const warning of warnings) if (!announced.has(warning.code)) announce(warning.message);
  announced = new Set(warnings.map((warning) => warning.code));

  const order = (token) => [token.connector, token.subject, token.stored_at, token.expires_at].join(" ");
  tokens.sort((a, b) => (order(a) < order(b) ? -1 : 1));
  reconcile($("tokens"), tokens, order, tokenRow);
  const none = tokens.length === 0;
  $("no-tokens").hidden = !none;
  $("tokens-table").hidden = $("evict-all").disabled = none;
}

// Called every second, so the time left also decreases between two polls.
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

  setMood($("ring"), MOODS[word]);
  show("left", words);
  show("state", word[0].toUpperCase() + word.slice(1));
  $("arc").setAttribute("stroke-dashoffset", 1 - part);
  $("arc").classList.toggle("empty", part === 0);
  $("ring").setAttribute("aria-valuenow", Math.round(part * 100));
  $("ring").setAttribute("aria-valuetext", `${word}, ${words}${isBad || left === null ? "" : " left"}`);
  document.title = visible(`${isBad ? word : words} · ${oidc.project ?? state.project} · connect-sidecar`);
  if (ended) scheduleLoad(1000);
  for (const row of $("tokens").children) row.tick();
}

function warningItem() {
  const text = element("span");
  const item = element("li", "", text);
  item.update = ({ code, message, ...remedy }) => {
    setMood(item, /expired|missing|invalid/.test(code) ? "bad" : "warn");
    show(text, message);
    if (remedy.hint && item.children.length === 1) item.append(advice(remedy));
  };
  return item;
}

function tokenRow({ connector }) {
  const [name, subject, left, hits] = ["strong", "span", "span", "td"].map((tag) => element(tag));
  subject.className = "soft";
  hits.className = "number";
  const life = element("meter");
  Object.assign(life, { max: 1, low: 0.1, high: 0.25, optimum: 1 });
  life.setAttribute("aria-label", visible(`Life left of ${connector}`));
  const button = element("button", "", "Evict", element("span", "visually-hidden", ` ${connector}`));
  button.type = "button";
  button.addEventListener("click", () => evict(`?connector=${encodeURIComponent(connector)}`, connector));
  const row = element("tr", "", element("td", "", name, subject), element("td", "", left, life), hits, element("td", "", button));
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

async function evict(query, what) {
  try {
    const reply = await request("DELETE", `cache${query}`);
    const { evicted, error } = await reply.json();
    announce(reply.ok ? `Evicted ${what}: ${evicted} ${evicted === 1 ? "token" : "tokens"}` : error.message);
    await loadState();
    // If the focused button was removed, the focus is lost.
    if (document.activeElement === document.body) $("tokens-title").focus();
  } catch (error) {
    handleFailure(error);
  }
}

async function refresh() {
  const button = $("refresh");
  button.disabled = true;
  show("refreshed", "Refreshing…");
  try {
    const reply = await request("POST", "refresh");
    const { error } = await reply.json().catch(() => ({}));
    const outcome = reply.ok
      ? `Refreshed at ${timeOfDay(now())}`
      : reply.status === 404
        ? "This sidecar cannot refresh by itself. Run vercel env pull."
        : `Not refreshed. ${error?.message ?? `It answered ${reply.status}.`}${error?.command ? ` Run ${error.command}` : ""}`;
    show("refreshed", outcome);
    announce(outcome);
    await loadState();
  } catch (error) {
    if (!(error instanceof KeyRefused)) show("refreshed", "Not refreshed: the sidecar did not answer.");
    handleFailure(error);
  }
  button.disabled = false;
}

const isListHeld = () => paused || (matchMedia("(hover: hover)").matches && $("requests").matches(":hover")) || $("requests").contains(document.activeElement);

function showRequests() {
  const held = isListHeld() && pending.length > 0;
  $("held").hidden = !held;
  if (held) return void show("held", `Held: ${count(pending.length)}${pending.length === LIVE_ROWS ? " or more" : ""} new`);
  if (pending.length === 0) return;
  const body = $("requests");
  body.prepend(...pending.reverse().map(requestRow));
  pending = [];
  while (body.children.length > LIVE_ROWS) body.lastChild.remove();
  $("no-requests").hidden = true;
}

function requestRow({ at, action, connector, method, path, subject, cache, status, code, message, ms, line, ...remedy }) {
  const time = element("time", "soft", timeOfDay(at));
  time.dateTime = at;
  const what = element("div", "what", element("strong", "", connector ?? path ?? "refused"), element("span", "soft", [action ?? method, subject].filter(Boolean).join(" · ")));
  const isFine = status < 400;
  const pill = element("span", "pill", isFine ? (cache ?? "done") : String(status));
  setMood(pill, isFine ? (cache === "hit" || cache === "collapsed" ? "good" : "") : status < 500 ? "warn" : "bad");
  const result = element("div", "", pill, element("span", "soft", isFine ? String(status) : (code ?? "")));
  const row = element("li", "", time, what, result, element("span", "soft ms", ms === undefined ? "" : `${count(ms)} ms`));
  if (message) row.append(element("div", "soft advice", message));
  if (remedy.hint) row.append(advice(remedy));
  row.line = line;
  return row;
}

// --- Start and user actions ---

function storeKey(text) {
  key = text;
  try {
    if (text) sessionStorage.setItem(KEY_ITEM, text);
    else sessionStorage.removeItem(KEY_ITEM);
  } catch {
    // Storage is disabled in this browser.
  }
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_ITEM) ?? "";
  } catch {
    return "";
  }
}

function openPage() {
  const { hash } = location;
  // Removes the key from the address bar and the history.
  if (hash) history.replaceState(null, "", location.pathname);
  const found = /^#key=([\w-]+)$/.exec(hash);
  if (found) storeKey(found[1]);
  else key ||= storedKey();
  if (!key) return showClosed();
  stream.abort();
  followEvents();
}

$("refresh").addEventListener("click", refresh);
$("evict-all").addEventListener("click", () => evict("", "all"));
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  showRequests();
});
$("requests").addEventListener("pointerleave", () => showRequests());
addEventListener("hashchange", openPage);
document.addEventListener("visibilitychange", () => state && !document.hidden && scheduleLoad(0));
setInterval(() => {
  showTimeLeft();
  showRequests();
  if (state && Date.now() - lastDataAt > SILENCE_MS) stream.abort();
}, 1000);
setInterval(() => state && scheduleLoad(0), STATUS_EVERY_MS);
openPage();
