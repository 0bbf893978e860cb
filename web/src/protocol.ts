// What page and engine say to each other. The engine works in a worker and does one command after the other.

import type { NetworkFacts } from "./facts";
import type { Row } from "./past";
import type { Switch } from "./stream";

export type NetworkName = "student" | "start";
export type Backend = "auto" | "wasm" | "webgpu";

export type Command =
  | { kind: "load"; network: NetworkName; base: string; backend: Backend; threads: number }
  | { kind: "open"; id: string; network: NetworkName; plan: string; prompt: string; seed: number; windowFrames: number; sinkFrames: number; epoch: number }
  | { kind: "close"; id: string }
  | { kind: "block"; id: string; epoch: number; seesSteps: boolean }
  | { kind: "switch"; id: string; epoch: number; prompt: string; how: Switch }
  | { kind: "context"; id: string; epoch: number; windowFrames: number; sinkFrames: number };

/** What a stream's cache shows, and which prompts its rows were written under. */
export interface CacheState {
  rows: Row[];
  windowFrames: number;
  sinkFrames: number;
}

export type Report =
  | { kind: "progress"; loaded: number; total: number }
  | { kind: "loaded"; network: NetworkName; facts: NetworkFacts; device: "WebGPU" | "WASM"; threads: number; note: string }
  | { kind: "step"; id: string; epoch: number; step: number; t: number; x_t: Float32Array; x_0: Float32Array }
  | { kind: "cache"; id: string; epoch: number; cache: CacheState }
  | { kind: "block"; id: string; epoch: number; firstFrame: number; frames: Float32Array; milliseconds: number }
  | { kind: "error"; message: string };
