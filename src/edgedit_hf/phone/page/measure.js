// Times every network that plan.json names, as schedule.js orders it, and sends every run to the server. What is not
// acknowledged yet is kept in the browser, so that a closed page, a cut network or a killed server loses nothing.

import { LABELS, Sessions, findBackends, inOrder, loadRuntime, roomFor, threads } from "./runtime.js";
import { backoff, groupsOf, inWords, placeOf, runsOf, visitsOf } from "./schedule.js";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };
const SHORTEST = 0.005; // ms: the finest step of a browser's clock
const A_POST = 100; // rows
const PATIENCE = 15_000; // ms, of a request
const byId = (id) => document.getElementById(id);
const sleep = (ms = 0) => new Promise((done) => setTimeout(done, ms));
const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

const page = {
  plan: null, backends: [], setting: null, session: null, done: new Set(), queue: new Map(), battery: null, stop: false,
  client: null, tab: random(), hidden: 0, failed: 0, next: 0, summary: null,
};

/** A step that the server will not let this page go on from. */
class Refused extends Error {}
/** A step that may succeed later. */
class Unreachable extends Error {}

// ---------------------------------------------------------------- what the browser keeps

const store = {
  get(key) { try { return localStorage.getItem(`edgedit ${key}`); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(`edgedit ${key}`, value); } catch { /* private, or full */ } },
  remove(key) { try { localStorage.removeItem(`edgedit ${key}`); } catch { /* private */ } },
  keys() { try { return Object.keys(localStorage).map((key) => key.replace(/^edgedit /, "")); } catch { return []; } },
};

/** What this browser is called, by chance: for good, or as long as this page lives where nothing can be kept. */
function clientName() {
  page.client ??= store.get("client") ?? random();
  store.set("client", page.client);
  return page.client;
}

// ---------------------------------------------------------------- the server

async function post(name, values) {
  let answer;
  try {
    answer = await fetch(name, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values), cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch {
    throw new Unreachable("The computer that serves this page does not answer.");
  }
  const told = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
  if (answer.ok) return told;
  if (told.kind === "join") return join().then(() => null);
  throw answer.status >= 500 || told.kind === "later" ? new Unreachable(told.error) : new Refused(told.error);
}

/** Say who this is, and learn which runs are there. */
async function join() {
  const told = await post("hello", { bundle: page.plan.hash, client: clientName(), tab: page.tab, ...page.setting });
  page.session = told.session;
  page.summary = told.summary ?? null;
  page.done = new Set();
  for (const [network, phases] of Object.entries(told.done)) {
    for (const [phase, rounds] of Object.entries(phases)) {
      for (const round of rounds) page.done.add(placeOf({ network, phase, round }));
    }
  }
  const prefix = `${told.session} `;
  for (const key of store.keys().filter((key) => key.startsWith(prefix))) {
    page.queue.set(key.slice(prefix.length), JSON.parse(store.get(key)));
  }
  for (const place of [...page.queue.keys()]) {
    if (page.done.has(place)) forget(place); // it came, but the answer was lost
    else page.done.add(place);
  }
}

function forget(place) {
  page.queue.delete(place);
  store.remove(`${page.session} ${place}`);
}

/** Send what waits; whether nothing is left. A failure is remembered, and nothing is tried before its time. */
async function send() {
  while (page.queue.size && performance.now() >= page.next) {
    const places = [...page.queue.keys()].slice(0, A_POST);
    try {
      const told = await post("rows", { session: page.session, tab: page.tab, rows: places.map((p) => page.queue.get(p)) });
      page.failed = 0;
      if (told) {
        places.forEach(forget);
        page.summary = told.summary ?? null;
      } else {
        page.next = performance.now() + 1000 * backoff(0);
      }
    } catch (error) {
      lost(error);
    }
    showConnection();
  }
  return page.queue.size === 0;
}

function lost(error) {
  if (!(error instanceof Unreachable)) throw error;
  page.failed += 1;
  page.next = performance.now() + 1000 * backoff(page.failed);
  showConnection(error.message);
}

function showConnection(why = "") {
  const kept = page.queue.size ? ` ${page.queue.size} runs are kept here and sent later.` : "";
  if (!page.failed) byId("connection").textContent = "";
  else if (why) byId("connection").textContent = `${why}${kept}`;
}

/** What an attempt that needs the server comes to, as soon as it answers. */
async function reachable(attempt) {
  for (;;) {
    try {
      const found = await attempt();
      page.failed = 0;
      showConnection();
      return found;
    } catch (error) {
      if (page.stop) throw error;
      lost(error instanceof TypeError ? new Unreachable("The computer that serves this page does not answer.") : error);
    }
    while (performance.now() < page.next && !page.stop) await sleep(100);
  }
}

// ---------------------------------------------------------------- this device

async function describe() {
  const known = await navigator.userAgentData?.getHighEntropyValues(["model", "platformVersion", "fullVersionList"])
    .catch(() => null);
  const brands = known?.fullVersionList?.filter(({ brand }) => !/not.?a.?brand/i.test(brand.replace(/[^a-z]/gi, "")));
  const inBrackets = /\(([^)]*)\)/.exec(navigator.userAgent)?.[1];
  const system = known && `${known.platform} ${known.platformVersion}`.trim();
  const plain = (text, length) => text.replace(/[^\x20-\x7e]/g, "?").slice(0, length);
  return {
    device: plain([known?.model, system].filter(Boolean).join(", ") || inBrackets || "unknown", 300),
    browser: plain(brands?.map(({ brand, version }) => `${brand} ${version}`).join(", ") || navigator.userAgent, 500),
  };
}

async function stayAwake() {
  await navigator.wakeLock?.request("screen").catch(() => null);
}

// ---------------------------------------------------------------- one run

/** Milliseconds of an action, done again when the page was in the background meanwhile. */
async function timed(action) {
  for (;;) {
    while (document.hidden) await sleep(200);
    const before = page.hidden;
    const start = performance.now();
    await action();
    const ms = performance.now() - start;
    if (page.hidden === before && !document.hidden) return Math.max(ms, SHORTEST);
  }
}

function note(run, ms) {
  const row = {
    bundle: page.plan.hash, ...run, ms, ...page.setting, battery: page.battery?.level ?? null, temperature: null,
    time: new Date().toISOString(),
  };
  const place = placeOf(run);
  page.done.add(place);
  page.queue.set(place, row);
  store.set(`${page.session} ${place}`, JSON.stringify(row));
}

// ---------------------------------------------------------------- the measurement

/** The runs of a visit that are not there yet. Networks that cannot be open together are measured in two halves. */
async function visit(sessions, inputs, pass, names) {
  const left = () => runsOf(page.plan, { pass, names }).filter((run) => !page.done.has(placeOf(run)));
  const wanted = new Set(left().map(({ network }) => network));
  if (!wanted.size) return;
  const runs = new Map(left().map((run) => [placeOf(run), run]));
  for (const network of names.filter((name) => wanted.has(name))) {
    showProgress(`; loading ${network}`);
    await sleep();
    const files = await reachable(() => sessions.load(network));
    const [start, before] = [performance.now(), page.hidden];
    try {
      await sessions.create(network, files);
    } catch (error) {
      const together = Object.keys(sessions.open).length;
      await sessions.close();
      if (!together) throw new Error(`${network} cannot be opened with ${page.label}: ${error.message ?? error}`);
      const half = Math.ceil(names.length / 2);
      for (const part of [names.slice(0, half), names.slice(half)]) await visit(sessions, inputs, pass, part);
      return;
    }
    const ms = performance.now() - start;
    const cold = { network, phase: "cold", round: pass };
    if (runs.has(placeOf(cold)) && page.hidden === before) note(cold, Math.max(ms, SHORTEST));
    for (let i = 0; i < page.plan.warmups; i++) {
      const warm = { network, phase: "warm", round: pass * page.plan.warmups + i };
      const ms = await timed(() => sessions.run(network, inputs));
      if (runs.has(placeOf(warm))) note(warm, ms);
      await between();
    }
  }
  for (const run of left().filter(({ phase }) => phase === "timed")) {
    note(run, await timed(() => sessions.run(run.network, inputs)));
    await between();
  }
  await sessions.close();
}

/** Between two runs: about once a second what waits is sent, more often the page is painted. */
async function between() {
  if (page.stop) throw new Stopped();
  const now = performance.now();
  if (now - page.painted > 200) {
    showProgress();
    await sleep();
    page.painted = performance.now();
  }
  if (now - page.sent > 1000) {
    await send();
    page.sent = performance.now();
  }
}

class Stopped extends Error {}

function totalOf({ networks, passes, warmups, rounds }) {
  return networks.length * (passes + passes * warmups + rounds);
}

function showProgress(besides = "") {
  const total = totalOf(page.plan);
  Object.assign(byId("progress"), { max: total, value: page.done.size });
  const since = page.done.size - page.first;
  const left = ((performance.now() - page.started) / 1000 / Math.max(since, 1)) * (total - page.done.size);
  const eta = since > 20 ? `, about ${inWords(left)} left` : "";
  say("busy", `${page.done.size} of ${total} runs${eta}${besides}`);
}

async function readInputs() {
  const inputs = {};
  for (const { name, dtype, shape, file } of page.plan.inputs) {
    const answer = await fetch(file);
    if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}; reload this page.`);
    inputs[name] = { type: dtype, dims: shape, data: new ARRAYS[dtype](await answer.arrayBuffer()) };
  }
  return inputs;
}

async function measure() {
  const { plan } = page;
  const [backend] = inOrder(page.backends, plan.precision, byId("backend").value);
  Object.assign(page, { stop: false, summary: null, label: backend.label, failed: 0, next: 0 });
  let sessions = null;
  try {
    say("busy", "Starting …");
    await stayAwake();
    const ort = await loadRuntime(plan.runtime.url, backend.name);
    const count = backend.name === "wasm" ? threads() : 1;
    const version = ort.env.versions.web ?? plan.runtime.version;
    page.setting = { ...(await describe()), backend: backend.name, threads: count, version };
    page.queue = new Map();
    await reachable(join);
    store.set(`going ${plan.hash}`, backend.name);
    const inputs = await reachable(readInputs);
    Object.assign(page, { first: page.done.size, started: performance.now(), painted: 0, sent: performance.now() });
    const files = Object.fromEntries(plan.networks.map(({ name, file, parts }) => [name, { file, parts }]));
    sessions = new Sessions(ort, backend, files);
    const groups = groupsOf(plan.networks, plan.memory, roomFor(plan.memory.limit_bytes));
    byId("groups").textContent = groups.length > 1
      ? `not all fit into the memory at once: ${groups.length} groups, one after the other` : "all open at once";
    while (!page.summary) { // again only if the server has lost something
      for (const { pass, names } of visitsOf(plan, groups)) await visit(sessions, inputs, pass, names);
      showProgress();
      while (!(await send())) {
        await between();
        await sleep(100);
      }
      if (!page.summary) await reachable(join);
    }
    store.remove(`going ${plan.hash}`);
    report(page.summary);
    say("done", `Done: all ${totalOf(plan)} runs are sent. This page can be closed.`);
  } catch (error) {
    if (error instanceof Stopped || page.stop) {
      store.remove(`going ${plan.hash}`);
      say("ready", `Paused: ${page.done.size} of ${totalOf(plan)} runs.`);
    } else {
      say("error", String(error.message ?? error));
      console.error(error);
    }
  } finally {
    await sessions?.close().catch(() => null);
  }
}

// ---------------------------------------------------------------- the page

function say(state, text) {
  document.body.dataset.state = state;
  byId("status").textContent = text;
  byId("measure").disabled = state === "busy" || !page.plan || !byId("backend").options.length;
  byId("measure").textContent = page.done.size ? "Go on" : "Measure";
  byId("measure").hidden = state === "busy" || state === "done";
  byId("advice").hidden = state === "done";
  byId("backend").disabled = state === "busy";
  byId("stop").hidden = state !== "busy";
}

function fact(list, name, value, id = "") {
  for (const [kind, text] of [["dt", name], ["dd", value]]) {
    list.append(Object.assign(document.createElement(kind), { textContent: text, id: kind === "dd" ? id : "" }));
  }
}

const inMs = (ms) => ms.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });

function report({ drift, throttled, networks }) {
  const change = `${Math.abs(100 * drift).toFixed(1)} % ${drift < 0 ? "faster" : "slower"}`;
  byId("drift").textContent = `In the last rounds this device was ${change} than in the first.`
    + (throttled ? " It throttled: let it cool, plug it in, and measure again." : "");
  byId("drift").toggleAttribute("data-throttled", throttled);
  byId("rows").replaceChildren(...Object.entries(networks).map(([name, found]) => {
    const row = document.createElement("tr");
    for (const text of [name, ...[found.median_ms, found.p90_ms, found.iqr_ms, found.cold_ms].map(inMs)]) {
      row.append(Object.assign(document.createElement("td"), { textContent: text }));
    }
    return row;
  }));
  byId("result").hidden = false;
}

async function start() {
  try {
    say("busy", "Reading what is measured …");
    const answer = await fetch("plan.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`plan.json: ${answer.status} ${answer.statusText}; open the address that was given.`);
    const plan = await answer.json();
    page.battery = await navigator.getBattery?.().catch(() => null);
    page.backends = await findBackends();
    for (const { label, here, note: why } of page.backends) {
      fact(byId("backends"), label, `${here ? "here" : "not here"}${why ? `: ${why}` : ""}`);
    }
    for (const { name } of inOrder(page.backends, plan.precision)) {
      byId("backend").append(Object.assign(document.createElement("option"), { value: name, textContent: LABELS[name] }));
    }
    const facts = byId("facts");
    fact(facts, "Networks", `${plan.networks.length} in ${plan.precision}, ${plan.batch} image${plan.batch > 1 ? "s" : ""} a forward`);
    fact(facts, "Of each", `${plan.passes} loads, ${plan.passes * plan.warmups} warm-ups, ${plan.rounds} timed runs in rounds`);
    fact(facts, "Memory", "not known yet", "groups");
    fact(facts, "Bundle", plan.hash);
    page.plan = plan;
    const going = store.get(`going ${plan.hash}`);
    say("ready", "Ready.");
    if (going && page.backends.some(({ name, here }) => here && name === going)) {
      byId("backend").value = going;
      await measure();
    }
  } catch (error) {
    say("error", String(error.message ?? error));
    console.error(error);
  }
}

document.addEventListener("visibilitychange", () => {
  page.hidden += 1;
  if (!document.hidden && document.body.dataset.state === "busy") stayAwake();
});
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  measure();
});
byId("backend").addEventListener("change", () => {
  page.done = new Set(); // of this backend, which the server will tell
  say("ready", "Ready.");
});
byId("stop").addEventListener("click", () => (page.stop = true));
start();
