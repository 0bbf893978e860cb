// The engine: networks and streams, off the page's thread.

import { LoadError, Network, download, downloadNetwork, type Ort } from "./network";
import { RollingCache } from "./past";
import type { Backend, Command, NetworkName, Report } from "./protocol";
import { Stream } from "./stream";

// What of a worker's own scope is used here: its types and those of a page exclude each other.
const scope = self as unknown as {
  onmessage: (event: MessageEvent<Command>) => void;
  postMessage(message: Report): void;
  crossOriginIsolated: boolean;
};
const networks = new Map<NetworkName, Network>();
const streams = new Map<string, { stream: Stream; epoch: number; windowFrames: number; sinkFrames: number }>();
let ort: Ort | null = null;
let device: "wasm" | "webgpu" = "wasm";
let note = "";

// A module with one SIMD instruction: what onnxruntime's own file is full of.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

function report(message: Report): void {
  scope.postMessage(message);
}

async function hasAdapter(): Promise<boolean> {
  try {
    const { gpu } = navigator as unknown as { gpu?: { requestAdapter(): Promise<object | null> } };
    return gpu !== undefined && (await gpu.requestAdapter()) !== null;
  } catch {
    return false; // a browser that offers WebGPU and then refuses it
  }
}

async function loadRuntime(base: string, wanted: Backend, threads: number, total: (bytes: number) => void, progress: (bytes: number) => void): Promise<Ort> {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new LoadError("This browser has no WebAssembly SIMD, which the network runs on: use a current Chrome, Edge, Firefox or Safari (16.4 or newer).");
  }
  const canUseGpu = wanted !== "wasm" && (await hasAdapter());
  if (wanted === "webgpu" && !canUseGpu) note = "no WebGPU here";
  device = canUseGpu ? "webgpu" : "wasm";
  const runtime: Ort = device === "webgpu" ? ((await import("onnxruntime-web/webgpu")) as unknown as Ort) : await import("onnxruntime-web/wasm");
  const file = `${base}ort/ort-wasm-simd-threaded${device === "webgpu" ? ".asyncify" : ""}`;
  total(device === "webgpu" ? 26_800_000 : 14_300_000); // about: a compressed answer does not say how long it is
  runtime.env.wasm.numThreads = scope.crossOriginIsolated ? threads : 1;
  runtime.env.wasm.wasmPaths = { mjs: `${file}.mjs`, wasm: `${file}.wasm` };
  runtime.env.wasm.wasmBinary = (await download(`${file}.wasm`, progress)).buffer;
  runtime.env.logLevel = "error";
  return runtime;
}

const WARM_UP_ROUNDS = { least: 3, most: 6 };
const CHECK_TOLERANCE = 0.02; // of a pixel in [-1, 1]: rounding is far below, a wrong kernel far above

/**
 * Runs every graph until that takes no less time than before, so that the first block of a video is as fast as any: browsers compile WASM
 * a second time, to faster code, while it runs. Throws where this device computes other pixels than torch did when the network was exported.
 */
async function warmUp(network: Network): Promise<void> {
  const { check: expected, block_frames, channels, frame_size, frames_per_row, window_frames } = network.facts;
  const shape = [1, block_frames, channels, frame_size, frame_size];
  const x_t = network.floats(Float32Array.from({ length: shape.reduce((product, length) => product * length, 1) }, (_, index) => Math.sin(index)), shape);
  let before = Infinity;
  for (let round = 1; round <= WARM_UP_ROUNDS.most; round++) {
    const start = performance.now();
    const cache = new RollingCache(network, await network.encode(""));
    await cache.write(network.floats(await cache.denoise(x_t, 1), shape), 0, 0, window_frames / frames_per_row, 0, 0);
    const x_0 = await cache.denoise(x_t, 1);
    cache.dispose();
    const stride = Math.floor(x_0.length / expected.length);
    const worst = Math.max(...expected.map((value, index) => Math.abs(value - x_0[index * stride])));
    if (!(worst < CHECK_TOLERANCE)) throw new Error(`pixels differ by ${worst} from those of the export`);
    const milliseconds = performance.now() - start;
    if (round >= WARM_UP_ROUNDS.least && milliseconds > 0.9 * before) break;
    before = milliseconds;
  }
}

async function load(command: Extract<Command, { kind: "load" }>): Promise<void> {
  let loaded = 0;
  let total = 0;
  const expect = (bytes: number) => void (total += bytes);
  const progress = (bytes: number) => {
    loaded += bytes;
    report({ kind: "progress", loaded, total: Math.max(total, loaded) });
  };
  const runtime = (backend: Backend) => loadRuntime(command.base, backend, command.threads, expect, progress);
  const files = downloadNetwork(`${command.base}networks/${command.network}`, expect, progress);
  let network: Network;
  try {
    [ort] = await Promise.all([ort ?? runtime(command.backend), files]);
    network = await Network.open(ort, await files, device);
    await warmUp(network);
  } catch (error) {
    if (error instanceof LoadError || device === "wasm") throw error;
    console.warn(error);
    note = "WebGPU does not run this network rightly here";
    ort = await runtime("wasm");
    network = await Network.open(ort, await files, device);
    await warmUp(network);
  }
  networks.set(command.network, network);
  const threads = device === "wasm" ? (ort.env.wasm.numThreads ?? 1) : 1;
  report({ kind: "loaded", network: command.network, facts: network.facts, device: device === "webgpu" ? "WebGPU" : "WASM", threads, note });
}

async function open(command: Extract<Command, { kind: "open" }>): Promise<void> {
  const network = networks.get(command.network)!;
  const { id, epoch, windowFrames, sinkFrames } = command;
  streams.get(id)?.stream.dispose();
  const stream = await Stream.open(network, network.facts.plans[command.plan], command.prompt, command.seed, windowFrames, sinkFrames);
  streams.set(id, { stream, epoch, windowFrames, sinkFrames });
  reportCache(id);
}

function reportCache(id: string): void {
  const { stream, epoch, windowFrames, sinkFrames } = streams.get(id)!;
  report({ kind: "cache", id, epoch, cache: { rows: stream.rows, windowFrames, sinkFrames } });
}

async function obey(command: Command): Promise<void> {
  if (command.kind === "load") return load(command);
  if (command.kind === "open") return open(command);
  const { id } = command;
  const held = streams.get(id);
  if (command.kind === "close") {
    held?.stream.dispose();
    streams.delete(id);
    return;
  }
  if (held === undefined || held.epoch !== command.epoch) return; // of a stream that has been closed since
  const { stream, epoch } = held;
  if (command.kind === "block") {
    const start = performance.now();
    const firstFrame = stream.nextFrame;
    const frames = await stream.nextBlock(
      (step, t, x_t, x_0) => command.seesSteps && report({ kind: "step", id, epoch, step, t, x_t, x_0 }),
      () => reportCache(id),
    );
    report({ kind: "block", id, epoch, firstFrame, frames, milliseconds: performance.now() - start });
  } else if (command.kind === "switch") {
    await stream.switchPrompt(command.prompt, command.how);
    reportCache(id);
  } else {
    held.windowFrames = command.windowFrames;
    held.sinkFrames = command.sinkFrames;
    await stream.changeContext(command.windowFrames, command.sinkFrames);
    reportCache(id);
  }
}

let work: Promise<void> = Promise.resolve();
scope.onmessage = (event) => {
  work = work.then(() => obey(event.data)).catch((error: unknown) => {
    const message = error instanceof Error ? error.message.split("\n")[0] : String(error);
    report({ kind: "error", message: error instanceof LoadError ? message : `The engine stopped: ${message}` });
  });
};
