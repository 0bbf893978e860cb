// The rolling cache, as `RollingCache` in tests/helpers/onnx_stream.py: two tensors of a fixed size, and the numbers of their rows.

import type { Network, Tensor, Tensors } from "./network";

export interface Row {
  number: number; // of the patch row in its video
  prompt: number; // the number of the prompt that it was written under
}

/** Which rows stay and where they go: pure, so that it can be read alone. */
export function roll(
  rows: number[], firstRow: number, blockRows: number, capacity: number, windowRows: number, sinkRows: number, forgetBefore: number,
): { kept: number[]; order: number[] } {
  const places = new Map(rows.map((row, index) => [row, capacity - rows.length + index]));
  for (let index = 0; index < blockRows; index++) places.set(firstRow + index, capacity + index);
  const candidates = [...places.keys()].filter((row) => row < sinkRows || row >= forgetBefore);
  const surplus = Math.max(candidates.length + blockRows - windowRows, 0);
  const kept = [...candidates.slice(0, sinkRows), ...candidates.slice(sinkRows + surplus)];
  const order = [...new Array<number>(capacity - kept.length).fill(0), ...kept.map((row) => places.get(row)!)];
  return { kept, order };
}

export class RollingCache {
  rows: number[] = [];
  private keys!: Tensor;
  private values!: Tensor;

  constructor(private readonly network: Network, public prompt: Tensors) {
    this.clear();
  }

  clear(): void {
    this.dispose();
    const shape = this.network.facts.cache_shape;
    const size = shape.reduce((product, length) => product * length, 1);
    this.rows = [];
    this.keys = this.network.floats(new Float32Array(size), shape);
    this.values = this.network.floats(new Float32Array(size), shape);
  }

  /** x_0 of a noisy block that follows the cached rows. */
  async denoise(x_t: Tensor, t: number): Promise<Float32Array> {
    const { x_0 } = await this.network.run("denoise", { x_t, t: this.network.floats(Float32Array.of(t), [1]), ...this.state() });
    return x_0.data as Float32Array;
  }

  /** Add a finished block whose first row has this number, and forget what the next block no longer sees. */
  async write(x: Tensor, t: number, firstRow: number, windowRows: number, sinkRows: number, forgetBefore: number): Promise<void> {
    const { cache_rows, block_frames, frames_per_row } = this.network.facts;
    const { kept, order } = roll(this.rows, firstRow, block_frames / frames_per_row, cache_rows, windowRows, sinkRows, forgetBefore);
    const written = await this.network.run("cache", {
      x, t: this.network.floats(Float32Array.of(t), [1]), order: this.network.integers(order), ...this.state(),
    });
    this.dispose();
    this.keys = written.new_keys;
    this.values = written.new_values;
    this.rows = kept;
  }

  /** Give memory back that lies on a GPU. */
  dispose(): void {
    this.keys?.dispose();
    this.values?.dispose();
  }

  private state(): Tensors {
    return { keys: this.keys, values: this.values, visible: this.network.integers([this.rows.length]), ...this.prompt };
  }
}
