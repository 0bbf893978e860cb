// Drawing: frames as pictures, the denoising steps, the cache as a strip.

import type { NetworkFacts } from "./facts";
import type { CacheState } from "./protocol";

/** One frame (C, H, W) of values in [-1, 1] as a picture. */
export function picture(frames: Float32Array, index: number, facts: NetworkFacts): ImageData {
  const { frame_size: side, channels } = facts;
  const image = new ImageData(side, side);
  const plane = side * side;
  const first = index * channels * plane;
  for (let pixel = 0; pixel < plane; pixel++) {
    for (let colour = 0; colour < 3; colour++) {
      image.data[4 * pixel + colour] = Math.round(127.5 * (frames[first + (channels === 3 ? colour : 0) * plane + pixel] + 1));
    }
    image.data[4 * pixel + 3] = 255;
  }
  return image;
}

/** A canvas of so many pixels, to be enlarged by the style sheet. */
export function canvasOf(width: number, height: number): HTMLCanvasElement {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** The denoising steps of a block: a picture a step, noisy frames above, predicted ones below. */
export class StepsView {
  private readonly canvases: HTMLCanvasElement[];
  private readonly labels: HTMLElement[];

  constructor(private readonly host: HTMLElement, private readonly facts: NetworkFacts, times: number[]) {
    const { frame_size: side, block_frames: block } = facts;
    this.canvases = times.map(() => canvasOf(block * side, 2 * side + 1));
    this.labels = times.map((t, step) => {
      const label = document.createElement("span");
      label.textContent = `step ${step + 1}: ${Math.round(100 * t)} % noise`;
      return label;
    });
    host.replaceChildren(
      ...times.map((t, step) => {
        const cell = document.createElement("div");
        this.canvases[step].setAttribute("role", "img");
        this.canvases[step].setAttribute("aria-label", `Denoising step ${step + 1} of ${times.length}, ${Math.round(100 * t)} % noise`);
        cell.append(this.canvases[step], this.labels[step]);
        return cell;
      }),
    );
  }

  show(step: number, x_t: Float32Array, x_0: Float32Array): void {
    const { frame_size: side, block_frames: block } = this.facts;
    const context = this.canvases[step].getContext("2d")!;
    for (let frame = 0; frame < block; frame++) {
      context.putImageData(picture(x_t, frame, this.facts), frame * side, 0);
      context.putImageData(picture(x_0, frame, this.facts), frame * side, side + 1);
    }
    this.labels.forEach((label, index) => label.classList.toggle("now", index === step));
    this.host.dataset.step = String(step + 1);
  }
}

// Colours of prompts, in turns: they differ in lightness too.
export const PROMPT_COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#db2777", "#8b5cf6", "#84cc16"];

export function promptColour(prompt: number): string {
  return PROMPT_COLOURS[prompt % PROMPT_COLOURS.length];
}

const FALL_MILLISECONDS = 450;
const GAP = 3;

/** The cache as a strip: the sink framed first, then the frames that roll; what has just left falls out below. */
export class CacheView {
  private readonly pictures = new Map<number, ImageBitmap | HTMLCanvasElement>();
  private state: CacheState = { rows: [], windowFrames: 0, sinkFrames: 0 };
  private falling: { frame: number; slot: number }[] = [];
  private changedAt = 0;
  private isDrawing = false;
  private readonly isStill = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(private readonly canvas: HTMLCanvasElement, private readonly words: HTMLElement, private readonly facts: NetworkFacts) {
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  clear(): void {
    this.pictures.clear();
    this.falling = [];
    this.state = { ...this.state, rows: [] };
    this.draw();
  }

  /** Frames as they are made, of which the strip shows those that the cache holds. */
  keep(firstFrame: number, frames: Float32Array): void {
    const { block_frames: block, frame_size: side, window_frames: longest } = this.facts;
    for (let index = 0; index < block; index++) {
      const small = canvasOf(side, side);
      small.getContext("2d")!.putImageData(picture(frames, index, this.facts), 0, 0);
      this.pictures.set(firstFrame + index, small);
    }
    for (const frame of this.pictures.keys()) {
      if (frame >= longest && frame < firstFrame - 2 * longest) this.pictures.delete(frame);
    }
  }

  show(state: CacheState): void {
    const before = this.frames();
    const slotOf = new Map(before.map(({ frame }, index) => [frame, this.slots() - before.length + index]));
    this.state = state;
    const shown = new Set(this.frames().map(({ frame }) => frame));
    this.falling = before.filter(({ frame }) => !shown.has(frame)).map(({ frame }) => ({ frame, slot: slotOf.get(frame)! }));
    this.changedAt = performance.now();
    this.say();
    this.draw();
  }

  /** The frames shown, the oldest first, and the number of the prompt they were written under. */
  private frames(): { frame: number; prompt: number }[] {
    const rate = this.facts.frames_per_row;
    return this.state.rows.flatMap(({ number, prompt }) => Array.from({ length: rate }, (_, index) => ({ frame: number * rate + index, prompt })));
  }

  private slots(): number {
    return this.facts.cache_rows * this.facts.frames_per_row;
  }

  private say(): void {
    const frames = this.frames();
    const { sinkFrames, windowFrames } = this.state;
    const sink = frames.filter(({ frame }) => frame < sinkFrames).length;
    const rest = frames.slice(sink);
    const span = (part: { frame: number }[]) => `${part[0].frame + 1} to ${part[part.length - 1].frame + 1}`;
    const said: string[] = [];
    if (frames.length === 0) said.push("Empty: the next block sees itself alone.");
    else {
      if (sink > 0) said.push(`The sink keeps frames ${span(frames.slice(0, sink))}.`);
      if (rest.length > 0) said.push(`In the window: frames ${span(rest)}.`);
    }
    if (this.falling.length > 0) said.push(`Fallen out: ${span(this.falling)}.`);
    this.words.textContent = said.join(" ");
    this.canvas.dataset.frames = frames.map(({ frame }) => frame).join(",");
    this.canvas.dataset.prompts = frames.map(({ prompt }) => prompt).join(",");
    this.canvas.dataset.window = String(windowFrames);
  }

  private draw(): void {
    if (this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame((now) => {
      this.isDrawing = false;
      const passed = this.isStill.matches ? 1 : Math.min((now - this.changedAt) / FALL_MILLISECONDS, 1);
      this.paint(passed);
      if (passed < 1 && this.falling.length > 0) this.draw();
    });
  }

  private paint(passed: number): void {
    const block = this.facts.block_frames;
    const columns = this.slots() + block;
    const width = this.canvas.clientWidth;
    if (width === 0) return;
    const perLine = width < 560 ? Math.ceil(columns / 2) : columns; // two lines on a phone
    const lines = Math.ceil(columns / perLine);
    const side = Math.floor((width - (perLine - 1) * GAP) / perLine);
    const high = side + 9;
    const room = Math.round(side * 0.8);
    const scale = devicePixelRatio;
    const height = lines * (high + room);
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d")!;
    const style = getComputedStyle(this.canvas);
    const [line, soft, sinkColour, accent] = ["--line", "--soft", "--sink", "--accent"].map((name) => resolved(name, style));
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    const place = (slot: number): [number, number] => [(slot % perLine) * (side + GAP), Math.floor(slot / perLine) * (high + room)];
    const frames = this.frames();
    const hiddenSlots = this.facts.window_frames - this.state.windowFrames;
    for (let slot = 0; slot < columns; slot++) {
      const [x, y] = place(slot);
      context.lineWidth = 1;
      context.strokeStyle = slot >= this.slots() ? accent : line;
      context.setLineDash(slot >= this.slots() ? [] : [2, 3]);
      context.globalAlpha = slot < hiddenSlots ? 0.35 : 1;
      context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
    }
    context.globalAlpha = 1;
    context.setLineDash([]);
    context.fillStyle = soft;
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    const [blockX, blockY] = place(this.slots());
    context.fillText("next block", blockX + block * side / 2 + GAP, blockY + side + 12, block * (side + GAP));
    frames.forEach(({ frame, prompt }, index) => {
      const [x, y] = place(this.slots() - frames.length + index);
      this.stamp(context, frame, x, y, side);
      context.fillStyle = promptColour(prompt);
      context.fillRect(x, y + side + 2, side, 4);
      if (frame < this.state.sinkFrames) {
        context.lineWidth = 3;
        context.strokeStyle = sinkColour;
        context.strokeRect(x + 1.5, y + 1.5, side - 3, side - 3);
      }
    });
    for (const { frame, slot } of this.falling) {
      const [x, y] = place(slot);
      context.globalAlpha = 1 - passed;
      this.stamp(context, frame, x, y + high + passed * (room - side / 2) - side / 4, side * 0.75);
      context.globalAlpha = 1;
    }
  }

  private stamp(context: CanvasRenderingContext2D, frame: number, x: number, y: number, side: number): void {
    const image = this.pictures.get(frame);
    if (image !== undefined) context.drawImage(image, x, y, side, side);
  }
}

/** A colour variable as the canvas understands it: light-dark() is for style sheets alone. */
function resolved(name: string, style: CSSStyleDeclaration): string {
  const value = style.getPropertyValue(name).trim();
  const match = /^light-dark\((.+?),\s*(.+)\)$/.exec(value);
  return match === null ? value : matchMedia("(prefers-color-scheme: dark)").matches ? match[2] : match[1];
}
