// One video, block by block, as `OnnxStream` in tests/helpers/onnx_stream.py.

import type { Plan } from "./facts";
import type { Network, Tensor, Tensors } from "./network";
import { Noise } from "./noise";
import { RollingCache, type Row } from "./past";

export type Switch = "recache" | "keep" | "reset";

interface FinishedBlock {
  firstFrame: number;
  x_0: Float32Array;
}

/** What is seen while a block is made: x_t at time t of a step, and the x_0 that the network predicts from it. */
export type SeeStep = (step: number, t: number, x_t: Float32Array, x_0: Float32Array) => void;

export class Stream {
  numFrames = 0; // in the cache or fallen out of it
  private caches: RollingCache[] = [];
  private blocks: FinishedBlock[] = []; // those from which the cache can be made again
  private pending: Float32Array | null = null;
  private readonly noise: Noise;
  private readonly shape: number[];
  private promptNumber = 0;
  private promptOfRow = new Map<number, number>();

  private constructor(
    private readonly network: Network, private readonly plan: Plan, seed: number, private windowFrames: number, private sinkFrames: number,
  ) {
    const { block_frames, channels, frame_size } = network.facts;
    this.noise = new Noise(seed);
    this.shape = [1, block_frames, channels, frame_size, frame_size];
  }

  static async open(network: Network, plan: Plan, prompt: string, seed: number, windowFrames: number, sinkFrames: number): Promise<Stream> {
    const stream = new Stream(network, plan, seed, windowFrames, sinkFrames);
    stream.caches = (await stream.encoded(prompt)).map((encoded) => new RollingCache(network, encoded));
    return stream;
  }

  /** The number of the first frame of the next block. */
  get nextFrame(): number {
    return this.numFrames + (this.pending === null ? 0 : this.network.facts.block_frames);
  }

  /** The rows that the cache shows now, the oldest first. */
  get rows(): Row[] {
    return this.caches[0].rows.map((number) => ({ number, prompt: this.promptOfRow.get(number) ?? 0 }));
  }

  /** x_0 of the next block: its frames one behind the other. changed: the cache has been written. */
  async nextBlock(see: SeeStep = () => {}, changed: () => void = () => {}): Promise<Float32Array> {
    const { times, clamp_x_0, fresh_noise } = this.plan;
    if (this.pending !== null) {
      await this.append(true);
      changed();
    }
    let x_t = this.draw();
    let x_0 = x_t;
    for (const [step, t] of times.entries()) {
      const predicted = await this.predict(x_t, t);
      x_0 = clamp_x_0 ? predicted.map((value) => Math.min(Math.max(value, -1), 1)) : predicted;
      see(step, t, x_t, x_0);
      if (step + 1 < times.length) {
        const before = x_t;
        const eps = fresh_noise ? this.draw() : before.map((value, index) => value + ((1 - t) * (value - predicted[index])) / t);
        x_t = noised(x_0, eps, times[step + 1]);
      }
    }
    this.pending = x_0;
    return x_0;
  }

  /** From the next block on another prompt. */
  async switchPrompt(prompt: string, how: Switch): Promise<void> {
    if (this.pending !== null && how !== "reset") await this.append(how === "keep");
    const encoded = await this.encoded(prompt);
    this.caches.forEach((cache, index) => (cache.prompt = encoded[index]));
    this.promptNumber += 1;
    if (how === "recache") await this.encodeAgain();
    if (how === "reset") {
      this.pending = null;
      this.blocks = [];
      this.numFrames = 0;
      this.promptOfRow.clear();
      this.caches.forEach((cache) => cache.clear());
    }
  }

  /** From the next block on another window and sink. */
  async changeContext(windowFrames: number, sinkFrames: number): Promise<void> {
    this.windowFrames = windowFrames;
    this.sinkFrames = sinkFrames;
    await this.encodeAgain();
  }

  dispose(): void {
    this.caches.forEach((cache) => cache.dispose());
  }

  private async encodeAgain(): Promise<void> {
    if (this.pending !== null) await this.append(false);
    const block = this.network.facts.block_frames;
    const firstVisible = this.numFrames - (this.windowFrames - this.sinkFrames - block);
    this.caches.forEach((cache) => cache.clear());
    const sink = this.blocks.filter((each) => each.firstFrame < this.sinkFrames);
    const rest = this.blocks.filter((each) => each.firstFrame >= this.sinkFrames && each.firstFrame + block > firstVisible);
    for (const each of sink) {
      const isLast = each === sink[sink.length - 1];
      await this.write(each, isLast ? Math.max(Math.min(each.firstFrame + block, firstVisible), 0) : 0);
    }
    for (const each of rest) await this.write(each, 0);
  }

  private async encoded(prompt: string): Promise<Tensors[]> {
    const own = await this.network.encode(prompt);
    return this.plan.guidance === 1 ? [own] : [own, await this.network.encode("")];
  }

  private draw(): Float32Array {
    return this.noise.draw(this.shape.reduce((product, length) => product * length, 1));
  }

  private tensor(video: Float32Array): Tensor {
    return this.network.floats(video, this.shape);
  }

  /** x_0 under the plan's guidance. */
  private async predict(x_t: Float32Array, t: number): Promise<Float32Array> {
    const cond = await this.caches[0].denoise(this.tensor(x_t), t);
    if (this.caches.length === 1) return cond;
    const uncond = await this.caches[1].denoise(this.tensor(x_t), t);
    return cond.map((value, index) => uncond[index] + this.plan.guidance * (value - uncond[index]));
  }

  /** The pending block becomes part of the past. */
  private async append(isWritten: boolean): Promise<void> {
    const each: FinishedBlock = { firstFrame: this.numFrames, x_0: this.pending! };
    const longest = this.network.facts.window_frames;
    this.pending = null;
    this.numFrames += this.network.facts.block_frames;
    this.blocks = this.blocks.filter((old) => old.firstFrame < longest || old.firstFrame >= each.firstFrame - longest);
    this.blocks.push(each);
    if (isWritten) await this.write(each, 0);
    else if (this.plan.context_time !== 0) this.draw(); // what the rollout draws here and then never uses
  }

  private async write(each: FinishedBlock, forgetBefore: number): Promise<void> {
    const t = this.plan.context_time;
    const rate = this.network.facts.frames_per_row;
    const x = t === 0 ? each.x_0 : noised(each.x_0, this.draw(), t);
    const firstRow = each.firstFrame / rate;
    for (const cache of this.caches) {
      await cache.write(
        this.tensor(x), t, firstRow, Math.floor(this.windowFrames / rate), Math.floor(this.sinkFrames / rate), Math.floor(forgetBefore / rate),
      );
    }
    for (let row = firstRow; row < firstRow + this.network.facts.block_frames / rate; row++) this.promptOfRow.set(row, this.promptNumber);
    const shown = new Set(this.caches[0].rows);
    for (const row of this.promptOfRow.keys()) if (!shown.has(row)) this.promptOfRow.delete(row);
  }
}

function noised(x_0: Float32Array, eps: Float32Array, t: number): Float32Array {
  return x_0.map((value, index) => (1 - t) * value + t * eps[index]);
}
