// onnxruntime-web as a page needs it: which backends a browser has, a build of the runtime that knows the chosen one,
// and sessions of files, opened one after another where memory is short.

export const LABELS = { webgpu: "WebGPU", webnn: "WebNN", wasm: "WebAssembly" };
const BUNDLES = { webgpu: "ort.webgpu.min.mjs", webnn: "ort.webgpu.min.mjs", wasm: "ort.wasm.min.mjs" };
const UNKNOWN_MEMORY = 4; // GiB, of a device that does not say (only browsers made from Chromium do)
const MOST_THREADS = 4; // beyond the big cores of a phone, more threads wait for the slow ones

/** Every backend, in the order in which they are preferred: {name, label, here, note}. The note says what was found, or
 *  why it is not here. */
export async function findBackends() {
  const count = threads();
  const why = crossOriginIsolated
    ? ""
    : " (the page is not isolated: its server sends no Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy)";
  return [
    { name: "webgpu", label: LABELS.webgpu, ...(await findWebGPU()) },
    { name: "webnn", label: LABELS.webnn, ...(await findWebNN()) },
    { name: "wasm", label: LABELS.wasm, here: typeof WebAssembly === "object",
      note: `${count} thread${count > 1 ? "s" : ""}${why}` },
  ];
}

async function findWebGPU() {
  if (!isSecureContext) return { here: false, note: "needs https, or localhost" };
  if (!navigator.gpu) return { here: false, note: "this browser has none" };
  try {
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) return { here: false, note: "this browser has it, but finds no graphics processor for it" };
    const info = adapter.info ?? {};
    return { here: true, note: [info.vendor, info.architecture, info.description].filter(Boolean).join(" ") };
  } catch (error) {
    return { here: false, note: String(error.message ?? error) };
  }
}

async function findWebNN() {
  if (!isSecureContext) return { here: false, note: "needs https, or localhost" };
  if (!navigator.ml) return { here: false, note: "this browser has none" };
  for (const deviceType of ["npu", "gpu"]) {
    try {
      await navigator.ml.createContext({ deviceType });
      return { here: true, note: deviceType.toUpperCase(), deviceType };
    } catch {
      continue; // without this kind of processor
    }
  }
  return { here: false, note: "this browser has it, but neither NPU nor GPU for it" };
}

/** Threads of the WebAssembly build: several only where memory may be shared between them. */
export function threads() {
  return crossOriginIsolated ? Math.max(1, Math.min(MOST_THREADS, navigator.hardwareConcurrency ?? 1)) : 1;
}

/** Bytes that open sessions may take together: the runtime's memory, or a quarter of the device's. */
export function roomFor(limit) {
  return Math.min(limit, ((navigator.deviceMemory ?? UNKNOWN_MEMORY) * 2 ** 30) / 4);
}

/** Which backends are tried, in order: the chosen one, or all that are here. Files in 8 bits are made for the integer
 *  instructions of a processor, which WebAssembly has. */
export function inOrder(backends, precision, chosen = "auto") {
  const here = backends.filter(({ here }) => here);
  if (chosen !== "auto") return here.filter(({ name }) => name === chosen);
  const first = precision === "int8" ? "wasm" : here[0]?.name;
  return [...here.filter(({ name }) => name === first), ...here.filter(({ name }) => name !== first)];
}

/** Whether sessions are closed after use, so that only one is open at a time: all of them together would take more than
 *  the runtime's memory, or more than a quarter of the device's. peaks: bytes of every session. */
export function oneAfterAnother(peaks, limit) {
  return Object.values(peaks).reduce((total, bytes) => total + bytes, 0) > roomFor(limit);
}

/** The runtime for a backend, from the folder at `base`. */
export async function loadRuntime(base, backend) {
  const folder = new URL(base, document.baseURI).href.replace(/\/*$/, "/");
  const ort = await import(folder + BUNDLES[backend]);
  ort.env.wasm.wasmPaths = folder;
  ort.env.wasm.numThreads = threads();
  ort.env.logLevel = "error";
  return ort;
}

/** A file's bytes. wanted: how many there must be; progress(done, wanted) is called on the way. */
export async function fetchBytes(url, wanted, progress = () => {}) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const bytes = new Uint8Array(wanted);
  let done = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const part = await reader.read();
    if (part.done) break;
    if (done + part.value.length <= wanted) bytes.set(part.value, done);
    done += part.value.length;
    progress(done, wanted);
  }
  if (done !== wanted) throw new Error(`${url} has ${done} bytes, not ${wanted}; copy the folder again, whole.`);
  return bytes;
}

/** Sessions of an export's files in one backend.
 *
 *  files: key → {file, parts}: the .onnx file, and {name: bytes} of it and of the weights beside it.
 *  single: whether at most one session is open at a time. */
export class Sessions {
  constructor(ort, backend, files, { single = false, progress = () => {} } = {}) {
    Object.assign(this, { ort, backend, files, single, progress, open: {}, loadMs: {} });
  }

  /** The session of a key, opened if it is not. */
  async get(key) {
    if (this.open[key]) return this.open[key];
    if (this.single) await this.close();
    const start = performance.now();
    await this.create(key, await this.load(key));
    this.loadMs[key] = performance.now() - start;
    return this.open[key];
  }

  /** A key's files, fetched. */
  async load(key) {
    const { file, parts } = this.files[key];
    const folder = file.slice(0, file.lastIndexOf("/") + 1);
    const loaded = { model: null, externalData: [] };
    for (const [name, wanted] of Object.entries(parts)) {
      const data = await fetchBytes(name, wanted, (done) => this.progress(name, done, wanted));
      if (name === file) loaded.model = data;
      else loaded.externalData.push({ path: name.slice(folder.length), data });
    }
    return loaded;
  }

  /** Open the session of a key with its files. */
  async create(key, { model, externalData }) {
    const provider = this.backend.name === "webnn"
      ? { name: "webnn", deviceType: this.backend.deviceType } : this.backend.name;
    this.open[key] = await this.ort.InferenceSession.create(model, { executionProviders: [provider], externalData });
  }

  /** The outputs, {name: {data, dims}}, for inputs {name: {data, dims, type}}. */
  async run(key, inputs) {
    const session = await this.get(key);
    const feeds = {};
    for (const [name, { type, data, dims }] of Object.entries(inputs)) {
      feeds[name] = new this.ort.Tensor(type, data, dims);
    }
    const outputs = {};
    for (const [name, tensor] of Object.entries(await session.run(feeds))) {
      outputs[name] = { data: await tensor.getData(true), dims: tensor.dims };
    }
    return outputs;
  }

  /** Close every session, and free its memory. */
  async close() {
    for (const [key, session] of Object.entries(this.open)) {
      delete this.open[key];
      await session.release();
    }
  }
}
