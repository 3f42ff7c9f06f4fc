// Pictures from this export in a browser: everything that is drawn, and how, is said by contract.json. The loop is that
// of sample_min.py, which stands beside this file and draws the same picture for the same seed.

import { standardNormal } from "./philox.js";
import { Sessions, findBackends, inOrder, loadRuntime, oneAfterAnother } from "./runtime.js";
import { loadTokenizer } from "./tokenizer.js";

const SEEDS = 2n ** 63n;
const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array };
const byId = (id) => document.getElementById(id);
const pause = () => new Promise((done) => setTimeout(done)); // lets the browser paint, and touch be felt
const sizeOf = (dims) => dims.reduce((product, size) => product * size, 1);
const inMB = (bytes) => (bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 }) + " MB";
const inMs = (ms) => (ms < 10_000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

// ---------------------------------------------------------------- the files

/** The outputs of one of the export's files, by name, for inputs {name: {data, dims}} of any number of rows. A file for
 *  a fixed number runs as often as it takes, the last time filled up with copies of the last row. */
async function call(contract, sessions, key, given) {
  const { inputs, outputs } = contract.artefacts[key];
  const count = given[inputs[0].name].dims[0];
  const fixed = inputs[0].shape[0];
  const batch = typeof fixed === "number" ? fixed : count; // a name stands for an open size
  const found = {};
  for (let start = 0; start < count; start += batch) {
    const rows = Array.from({ length: batch }, (_, i) => Math.min(start + i, count - 1));
    const feeds = {};
    for (const { name, dtype } of inputs) {
      const { data, dims } = given[name];
      const size = sizeOf(dims.slice(1));
      const values = new ARRAYS[dtype](batch * size);
      rows.forEach((row, i) => {
        for (let j = 0; j < size; j++) {
          const value = data[row * size + j];
          values[i * size + j] = dtype === "int64" ? BigInt(value) : value;
        }
      });
      feeds[name] = { type: dtype, data: values, dims: [batch, ...dims.slice(1)] };
    }
    const values = await sessions.run(key, feeds);
    for (const { name } of outputs) {
      const { data, dims } = values[name];
      const size = sizeOf(dims.slice(1));
      found[name] ??= { data: new Float32Array(count * size), dims: [count, ...dims.slice(1)] };
      found[name].data.set(data.subarray(0, Math.min(batch, count - start) * size), start * size);
    }
  }
  return found;
}

// ---------------------------------------------------------------- text

/** The windows of token ids of a prompt: several for a long prompt of a CLIP-type encoder, else one, which is cut. */
function windowsOf(tokenizer, rule, prompt) {
  const ids = tokenizer.encode(prompt, { specials: false });
  if (rule.rule === "cut") {
    const whole = tokenizer.encode(prompt, { specials: true });
    const room = rule.max_tokens - (whole.length - ids.length);
    if (ids.length <= room) return [whole];
    let first = 0; // of the text, behind what the tokenizer puts before it
    while (!ids.every((id, i) => whole[first + i] === id)) first++;
    return [[...whole.slice(0, first), ...ids.slice(0, room), ...whole.slice(first + ids.length)]];
  }
  const before = rule.bos_token_id === null ? [] : [rule.bos_token_id];
  const behind = rule.eos_token_id === null ? [] : [rule.eos_token_id];
  const room = rule.max_tokens - before.length - behind.length;
  const windows = [];
  for (let i = 0; i < Math.max(ids.length, 1); i += room) windows.push([...before, ...ids.slice(i, i + room), ...behind]);
  return windows;
}

/** States [1, T, E] and mask [1, T] of every text encoder. */
async function encodeText(contract, sessions, tokenizers, prompt) {
  const texts = [];
  for (const [index, encoder] of contract.text.encoders.entries()) {
    const { tokens, width, artefact, tokenizer: rule } = encoder;
    const valid = []; // the windows' states one after the other, without padding
    if (artefact !== null) {
      const windows = windowsOf(tokenizers[index], rule, prompt);
      const count = windows.flat().length;
      if (count > tokens && !encoder.open) {
        throw new Error(`The prompt has ${count} tokens; this export takes ${tokens} at most. Shorten it.`);
      }
      const longest = Math.max(tokens, ...windows.map((ids) => ids.length));
      const dims = [windows.length, longest];
      const ids = windows.flatMap((row) => [...row, ...Array(longest - row.length).fill(rule.pad_token_id)]);
      const mask = windows.flatMap((row) => [...row.map(() => 1), ...Array(longest - row.length).fill(0)]);
      const inputs = { input_ids: { data: ids, dims }, attention_mask: { data: mask, dims } };
      const states = (await call(contract, sessions, artefact, inputs)).last_hidden_state.data;
      mask.forEach((counts, i) => counts && valid.push(states.subarray(i * width, (i + 1) * width)));
    }
    const length = Math.max(tokens, valid.length);
    const states = new Float32Array(length * width);
    valid.forEach((state, i) => states.set(state, i * width));
    const mask = new Float32Array(length).fill(1, 0, valid.length);
    texts.push({ states: { data: states, dims: [1, length, width] }, mask: { data: mask, dims: [1, length] } });
  }
  return texts;
}

// ---------------------------------------------------------------- the loop

/** What the network is told to draw. The first row: that; with guidance a second row: nothing. */
async function conditioning(contract, sessions, tokenizers, { label, prompt }) {
  const rows = contract.guidance.rows;
  if (contract.labels) {
    return { class_labels: { data: [label, contract.labels.null].slice(0, rows), dims: [rows] } };
  }
  const inputs = {};
  const texts = contract.text ? await encodeText(contract, sessions, tokenizers, prompt) : [];
  texts.forEach(({ states, mask }, index) => {
    for (const [name, { data, dims }] of [[`text_${index}`, states], [`mask_${index}`, mask]]) {
      const both = new Float32Array(rows * data.length);
      both.set(data);
      inputs[name] = { data: both, dims: [rows, ...dims.slice(1)] };
    }
  });
  return inputs;
}

/** The picture {data, dims: [1, channels, height, width]}, about -1 … 1. told(step, ms) is called after every step. */
async function sample(contract, sessions, tokenizers, asked, told) {
  const { guidance, latents, schedule, artefacts } = contract;
  const [rows, shape, plane] = [guidance.rows, latents.shape, latents.shape[2] * latents.shape[3]];
  const count = sizeOf(shape);
  const condition = await conditioning(contract, sessions, tokenizers, asked);
  let given = schedule.steps.map((step) => {
    return { timestep: { data: new Float32Array(rows).fill(step.timestep), dims: [rows] }, ...condition };
  });
  if (contract.split) { // once an image: afterwards the conditioners can be closed
    const texts = contract.text ? await call(contract, sessions, "text_conditioner", condition) : {};
    const table = [];
    for (const inputs of given) table.push({ ...inputs, ...(await call(contract, sessions, "conditioner", inputs)), ...texts });
    given = table;
  }
  await sessions.get("denoiser"); // its loading is no part of the first step's time
  const x = [standardNormal(asked.seed, count).map((value) => value * schedule.init_noise_sigma)];
  const m = [];
  let painted = performance.now();
  for (const [index, step] of schedule.steps.entries()) {
    const start = performance.now();
    const scaled = new Float32Array(rows * count);
    for (let i = 0; i < scaled.length; i++) scaled[i] = x[index][i % count] * step.input_scale;
    const inputs = { ...given[index], sample: { data: scaled, dims: [rows, ...shape.slice(1)] } };
    const { data, dims } = (await call(contract, sessions, "denoiser", inputs)).prediction;
    const whole = sizeOf(dims.slice(1)); // with channels of a learned variance, which are left out
    const prediction = data.slice(0, count);
    if (rows === 2) {
      const end = guidance.channels === null ? count : guidance.channels * plane;
      for (let i = 0; i < end; i++) prediction[i] = data[whole + i] + guidance.scale * (data[i] - data[whole + i]);
    }
    m.push(prediction);
    const next = new Float32Array(count);
    for (let i = 0; i < count; i++) {
      let sum = 0;
      for (const [j, factor] of step.x) sum += factor * x[j][i];
      for (const [j, factor] of step.m) sum += factor * m[j][i];
      next[i] = sum;
    }
    x.push(next);
    told(index + 1, performance.now() - start);
    if (performance.now() - painted > 50) {
      await pause();
      painted = performance.now();
    }
    if (asked.stop()) return null;
  }
  const last = x.at(-1);
  if (!artefacts.decoder) return { data: last, dims: shape };
  const [multiply, add] = [latents.multiply, latents.add];
  const of = (values, i) => values[values.length === 1 ? 0 : Math.floor(i / plane)];
  const scaled = last.map((value, i) => value * of(multiply, i) + of(add, i));
  return (await call(contract, sessions, "decoder", { latents: { data: scaled, dims: shape } })).image;
}

/** Draw a picture of 1 (grey), 3 (RGB) or 4 (RGBA) channels on the canvas. */
function draw(canvas, { data, dims: [, channels, height, width] }) {
  const plane = height * width;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 4; c++) {
      const from = channels === 1 ? 0 : c;
      pixels.data[4 * i + c] = c === 3 && channels < 4 ? 255 : toByte(data[from * plane + i]);
    }
  }
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function toByte(value) {
  const scaled = Math.fround(Math.min(Math.max(Math.fround(value / 2 + 0.5), 0), 1) * 255);
  const floor = Math.floor(scaled);
  return scaled - floor === 0.5 ? floor + (floor % 2) : Math.round(scaled); // halves to even
}

// ---------------------------------------------------------------- the page

const page = { contract: null, backends: [], backend: null, sessions: null, tokenizers: [], stop: false };

function say(state, text) {
  document.body.dataset.state = state;
  byId("status").textContent = text;
  byId("draw").disabled = state === "busy" || !page.contract;
  byId("stop").hidden = state !== "busy";
}

/** A row of a list of facts. */
function fact(list, name, value) {
  for (const [kind, text] of [["dt", name], ["dd", value]]) {
    list.append(Object.assign(document.createElement(kind), { textContent: text }));
  }
}

function option(select, value, text) {
  select.append(Object.assign(document.createElement("option"), { value, textContent: text }));
}

function describe(contract) {
  const [, channels, height, width] = contract.artefacts.decoder?.outputs[0].shape ?? contract.latents.shape;
  const bytes = Object.values(filesOf(contract)).flatMap(({ parts }) => Object.values(parts)).reduce((a, b) => a + b, 0);
  const facts = byId("facts");
  fact(facts, "Picture", `${width} × ${height}, ${channels} channel${channels > 1 ? "s" : ""}`);
  fact(facts, "Steps", String(contract.schedule.steps.length));
  fact(facts, "Guidance", contract.guidance.rows === 2 ? String(contract.guidance.scale) : "none");
  fact(facts, "Precision", contract.precision);
  fact(facts, "Files", inMB(bytes));
  const names = contract.labels?.names ?? {};
  const named = (i) => (names[i] && names[i] !== String(i) ? `${i}: ${names[i]}` : i);
  for (let i = 0; i < (contract.labels?.count ?? 0); i++) option(byId("label"), i, named(i));
  byId("label-row").hidden = !contract.labels;
  byId("prompt-row").hidden = !contract.text;
  byId("prompt").value = contract.reference.prompt ?? "";
}

/** key → {file, parts} of the files that the loop calls, weights beside them included. */
function filesOf(contract) {
  const found = {};
  for (const { artefact } of contract.order) {
    if (artefact === "encoder") continue; // makes latents of pictures, which this page has no use for
    const { file } = contract.artefacts[artefact];
    const names = [file, `${file}.data`].filter((name) => contract.files[name]);
    found[artefact] = { file, parts: Object.fromEntries(names.map((name) => [name, contract.files[name].bytes])) };
  }
  return found;
}

/** Open the denoiser in a backend; what fails is said, and the next one is tried. */
async function openBackend() {
  const chosen = byId("backend").value;
  if (page.sessions && page.chosen === chosen) return;
  await page.sessions?.close();
  const { runtime, memory } = page.contract.web;
  const failed = [];
  page.sessions = null;
  for (const backend of inOrder(page.backends, page.contract.precision, chosen)) {
    try {
      const ort = await loadRuntime(runtime.url, backend.name);
      const single = oneAfterAnother(memory.peak_bytes, memory.limit_bytes);
      const progress = (name, done, wanted) => say("busy", `Loading ${name}: ${inMB(done)} of ${inMB(wanted)}`);
      const files = filesOf(page.contract);
      const sessions = new Sessions(ort, backend, files, { single, progress });
      await sessions.get(single ? Object.keys(files)[0] : "denoiser");
      Object.assign(page, { sessions, backend, chosen });
      break;
    } catch (error) {
      failed.push(`${backend.label} failed: ${error.message ?? error}`);
    }
  }
  byId("failed").textContent = failed.join("\n");
  if (!page.sessions) throw new Error(failed.join("\n") || "This browser has no backend for this page.");
  const how = page.sessions.single ? "files are opened one after another, to save memory" : "all files stay open";
  byId("running").textContent = `${page.backend.label} (${page.backend.note}); ${how}`;
}

function askedFor() {
  const text = byId("seed").value.trim();
  if (!/^\d{1,19}$/.test(text) || BigInt(text) >= SEEDS) throw new Error(`The seed is ${text || "empty"}; give 0 … 2^63 - 1.`);
  return { seed: BigInt(text), label: Number(byId("label").value), prompt: byId("prompt").value, stop: () => page.stop };
}

async function run() {
  const { contract } = page;
  const steps = contract.schedule.steps.length;
  const [bar, times] = [byId("progress"), []];
  page.stop = false;
  try {
    const asked = askedFor();
    say("busy", "Loading …");
    await pause();
    await openBackend();
    Object.assign(bar, { max: steps, value: 0 });
    say("busy", "Preparing …");
    await pause();
    const start = performance.now();
    const picture = await sample(contract, page.sessions, page.tokenizers, asked, (step, ms) => {
      times.push(ms);
      bar.value = step;
      say("busy", `Step ${step} of ${steps}, ${inMs(ms)}`);
    });
    if (!picture) return say("ready", "Stopped.");
    if (!picture.data.every(Number.isFinite)) throw new Error("The picture holds numbers that are not finite.");
    draw(byId("canvas"), picture);
    const all = performance.now() - start;
    const median = [...times].sort((a, b) => a - b)[Math.floor((steps - 1) / 2)];
    report(asked, { times, median, all });
    say("done", `${steps} steps, ${inMs(median)} a step (median), ${inMs(all)} in all, with ${page.backend.label}`);
  } catch (error) {
    say("error", String(error.message ?? error));
    console.error(error);
  }
}

function report({ seed, label, prompt }, { times, median, all }) {
  const list = byId("timing");
  list.replaceChildren();
  for (const [key, ms] of Object.entries(page.sessions.loadMs)) fact(list, `Loading: ${key}`, inMs(ms));
  fact(list, "First step", inMs(times[0]));
  fact(list, "A step (median)", inMs(median));
  fact(list, "In all", inMs(all));
  const what = page.contract.labels ? byId("label").options[label].textContent : page.contract.text ? prompt : "picture";
  const slug = what.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60);
  byId("caption").textContent = `${what} (seed ${seed})`;
  byId("download").dataset.name = `${slug}-seed-${seed}.png`;
  byId("result").hidden = false;
}

function download() {
  byId("canvas").toBlob((blob) => {
    const href = URL.createObjectURL(blob);
    Object.assign(document.createElement("a"), { href, download: byId("download").dataset.name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  }, "image/png");
}

async function readJSON(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}; copy the folder again, whole.`);
  return answer.json();
}

async function start() {
  try {
    say("busy", "Reading contract.json …");
    const contract = await readJSON("contract.json");
    for (const encoder of contract.text?.encoders ?? []) {
      page.tokenizers.push(encoder.artefact === null ? null : loadTokenizer(await readJSON(encoder.tokenizer.file)));
    }
    page.backends = await findBackends();
    for (const { name, label, here, note } of page.backends) {
      fact(byId("backends"), label, `${here ? "here" : "not here"}${note ? `: ${note}` : ""}`);
      if (here) option(byId("backend"), name, label);
    }
    page.contract = contract;
    describe(contract);
    say("ready", "Ready.");
  } catch (error) {
    say("error", String(error.message ?? error));
    console.error(error);
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("stop").addEventListener("click", () => (page.stop = true));
byId("dice").addEventListener("click", () => (byId("seed").value = String(Math.floor(Math.random() * 2 ** 32))));
byId("download").addEventListener("click", download);
start();
