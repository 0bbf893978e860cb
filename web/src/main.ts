// The page: controls, the clock that shows frames, and what the engine reports.

import "./style.css";
import type { NetworkFacts } from "./facts";
import type { Backend, CacheState, Command, NetworkName, Report } from "./protocol";
import type { Switch } from "./stream";
import { caption, octant, readPrompt, wishOf, type Wish } from "./text";
import { TOURS, type TourStep } from "./tours";
import { CacheView, StepsView, canvasOf, picture, promptColour } from "./view";

const byId = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const query = new URLSearchParams(location.search);
const BASE = new URL("./", location.href).href;
const STUDENT = "student";
const UNLIMITED = 63; // the last place of the speed slider: as fast as blocks are made
const COMPARED: { id: string; plan: string; title: string }[] = [
  { id: "guided", plan: "guided", title: "before Self-Forcing, guided" },
  { id: "unguided", plan: "no guidance", title: "before Self-Forcing, no guidance" },
];
const SWITCHES: { value: Switch; label: string }[] = [ // what becomes of the cache where the prompt changes
  { value: "recache", label: "recache" }, { value: "keep", label: "keep" }, { value: "reset", label: "reset" },
];
// Buttons of the compass, row by row: direction numbers, counter-clockwise from right; null is no direction.
const COMPASS: { direction: number | null; sign: string }[] = [
  { direction: 3, sign: "↖" }, { direction: 2, sign: "↑" }, { direction: 1, sign: "↗" },
  { direction: 4, sign: "←" }, { direction: null, sign: "free" }, { direction: 0, sign: "→" },
  { direction: 5, sign: "↙" }, { direction: 6, sign: "↓" }, { direction: 7, sign: "↘" },
];

/** One video on the page. Frames wait in a queue until the clock shows them. */
interface Player {
  id: string;
  network: NetworkName;
  plan: string;
  canvas: HTMLCanvasElement;
  figure: HTMLElement;
  waiting: { number: number; image: ImageData }[];
}

const facts = new Map<NetworkName, NetworkFacts>();
const engine = new Worker(new URL("./engine.worker.ts", import.meta.url), { type: "module" });
const send = (command: Command): void => engine.postMessage(command);

let wish: Wish = { digit: 3, direction: 0, speed: null };
let prompt = "";
let players: Player[] = [];
let epoch = 0; // of the videos: what is reported of earlier ones is dropped
let isPlaying = false;
let framesOwed = 0; // to be shown although the page pauses: "step" asks for a block
let inFlight = 0;
let shown = 0; // frames shown of these videos
let openedAt = 0;
let isFirstBlock = true;
let steps: StepsView;
let cache: CacheView;
let prompts: string[] = [];
const madeAt: { milliseconds: number; frames: number }[] = []; // of the last blocks
const shownAt: number[] = [];
const loadedNetworks = new Map<NetworkName, (facts: NetworkFacts) => void>();

// --- engine -----------------------------------------------------------------------------------------------------------

engine.onerror = (event) => fail(`The engine could not start: ${event.message ?? "a file of the page is missing"}.`);
engine.onmessage = ({ data }: MessageEvent<Report>) => {
  if (data.kind === "progress") {
    byId<HTMLProgressElement>("loading").value = data.loaded / data.total;
  } else if (data.kind === "error") {
    fail(data.message);
  } else if (data.kind === "loaded") {
    facts.set(data.network, data.facts);
    byId("loading").hidden = true;
    byId("device").textContent = `${data.device}${data.device === "WASM" ? `, ${data.threads} thread${data.threads > 1 ? "s" : ""}` : ""}`;
    if (data.note !== "") say(`${data.note}: WASM instead.`);
    loadedNetworks.get(data.network)?.(data.facts);
  } else if (data.epoch === epoch) {
    hear(data);
  }
};

function hear(data: Extract<Report, { epoch: number }>): void {
  const player = players.find((each) => each.id === data.id);
  if (player === undefined) return;
  const own = facts.get(player.network)!;
  if (data.kind === "step") {
    steps.show(data.step, data.x_t, data.x_0);
  } else if (data.kind === "cache") {
    if (player.id === STUDENT) showCache(data.cache);
  } else {
    inFlight -= 1;
    for (let index = 0; index < own.block_frames; index++) {
      player.waiting.push({ number: data.firstFrame + index, image: picture(data.frames, index, own) });
    }
    if (player.id === STUDENT) {
      cache.keep(data.firstFrame, data.frames);
      madeAt.push({ milliseconds: 0, frames: own.block_frames });
      if (madeAt.length > 20) madeAt.shift();
    }
    madeAt[madeAt.length - 1].milliseconds += data.milliseconds;
    if (isFirstBlock && inFlight === 0) {
      isFirstBlock = false;
      byId("first-frame").textContent = `${Math.round(performance.now() - openedAt)} ms`;
    }
    askForMore();
  }
}

function fail(message: string): void {
  const line = byId("message");
  line.textContent = message;
  line.hidden = false;
  byId("loading").hidden = true;
  isPlaying = false;
  showPlaying();
}

function say(words: string): void {
  byId("status").textContent = words;
}

function load(network: NetworkName): Promise<NetworkFacts> {
  const known = facts.get(network);
  if (known !== undefined) return Promise.resolve(known);
  byId("loading").hidden = false;
  return new Promise((done) => {
    loadedNetworks.set(network, done);
    const cores = Math.min(navigator.hardwareConcurrency || 1, 4);
    const threads = Number(query.get("threads") ?? cores);
    send({ kind: "load", network, base: BASE, backend: (query.get("backend") ?? "auto") as Backend, threads });
  });
}

// --- videos -----------------------------------------------------------------------------------------------------------

function addPlayer(id: string, network: NetworkName, plan: string, title: string): void {
  const own = facts.get(network)!;
  const canvas = canvasOf(own.frame_size, own.frame_size);
  canvas.id = `video-${id}`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Video, ${title}`);
  const figure = document.createElement("figure");
  figure.className = "player";
  const words = document.createElement("figcaption");
  const { times, guidance } = own.plans[plan];
  const cost = document.createElement("small");
  cost.textContent = `${times.length * (guidance === 1 ? 1 : 2)} + ${guidance === 1 ? 1 : 2} evaluations a block`;
  words.append(title, cost);
  figure.append(canvas, words);
  document.getElementById("placeholder")?.remove();
  byId("players").append(figure);
  players.push({ id, network, plan, canvas, figure, waiting: [] });
}

/** Start all videos anew, from the seed. */
function restart(): void {
  epoch += 1;
  inFlight = 0;
  shown = 0;
  isFirstBlock = true;
  openedAt = performance.now();
  madeAt.length = 0;
  shownAt.length = 0;
  prompts = [prompt];
  cache.clear();
  showPrompts();
  const { windowFrames, sinkFrames } = context();
  for (const player of players) {
    player.waiting = [];
    send({ kind: "open", id: player.id, network: player.network, plan: player.plan, prompt, seed: seed(), windowFrames, sinkFrames, epoch });
  }
  framesOwed = isPlaying ? 0 : facts.get(STUDENT)!.block_frames; // so that there is something to see
  askForMore();
}

/** Ask for the next block of every video, where none is being made and few frames wait. */
function askForMore(): void {
  const ahead = isPlaying ? facts.get(STUDENT)!.block_frames + 1 : framesOwed;
  if (inFlight > 0 || players.every((player) => player.waiting.length >= ahead)) return;
  for (const player of players) {
    inFlight += 1;
    send({ kind: "block", id: player.id, epoch, seesSteps: player.id === STUDENT });
  }
}

function changePrompt(words: string): void {
  const { warnings } = readPrompt(words, facts.get(STUDENT)!.text);
  byId("warning").textContent = warnings.join(" ");
  byId<HTMLInputElement>("prompt").value = words;
  wish = wishOf(words, facts.get(STUDENT)!.grammar);
  showWish();
  if (words === prompt) return;
  prompt = words;
  const how = switchMode();
  prompts = [...prompts, words];
  showPrompts();
  say(`The prompt is now “${words}”, from the next block on.`);
  for (const player of players) send({ kind: "switch", id: player.id, epoch, prompt, how });
}

function changeContext(): void {
  const { windowFrames, sinkFrames } = context();
  for (const player of players) send({ kind: "context", id: player.id, epoch, windowFrames, sinkFrames });
}

// --- the clock --------------------------------------------------------------------------------------------------------

let due = 0;

function tick(now: number): void {
  requestAnimationFrame(tick);
  if ((!isPlaying && framesOwed === 0) || players.some((player) => player.waiting.length === 0)) return;
  const rate = Number(byId<HTMLInputElement>("speed").value);
  if (rate < UNLIMITED) {
    if (now < due - 2) return;
    due = Math.max(due, now - 1000 / rate) + 1000 / rate;
  }
  for (const player of players) {
    const { number, image } = player.waiting.shift()!;
    player.canvas.getContext("2d")!.putImageData(image, 0, 0);
    player.canvas.dataset.frame = String(number);
  }
  shown += 1;
  if (!isPlaying) framesOwed -= 1;
  shownAt.push(now);
  if (shownAt.length > 60) shownAt.shift();
  document.dispatchEvent(new CustomEvent("frame", { detail: shown }));
  askForMore();
}

setInterval(() => {
  byId("frame-number").textContent = shown.toLocaleString("en");
  const first = shownAt[0];
  const last = shownAt[shownAt.length - 1];
  byId("shown-rate").textContent = shownAt.length > 5 && isPlaying ? `${(((shownAt.length - 1) * 1000) / (last - first)).toFixed(1)} frames/s` : "–";
  const made = madeAt.reduce((sum, each) => ({ milliseconds: sum.milliseconds + each.milliseconds, frames: sum.frames + each.frames }), { milliseconds: 0, frames: 0 });
  byId("made-rate").textContent = made.milliseconds > 0 ? `${((1000 * made.frames) / made.milliseconds).toFixed(1)} frames/s` : "–";
}, 400);

// --- controls ---------------------------------------------------------------------------------------------------------

function choice(name: string, value: string, label: string, spoken = label): HTMLLabelElement {
  const holder = document.createElement("label");
  holder.className = "choice";
  const input = document.createElement("input");
  input.type = "radio";
  input.name = name;
  input.value = value;
  input.setAttribute("aria-label", spoken);
  const face = document.createElement("span");
  face.textContent = label;
  face.setAttribute("aria-hidden", "true");
  holder.append(input, face);
  return holder;
}

const chosen = (name: string): string => document.querySelector<HTMLInputElement>(`input[name="${name}"]:checked`)?.value ?? "";
function choose(name: string, value: string): void {
  for (const input of document.querySelectorAll<HTMLInputElement>(`input[name="${name}"]`)) input.checked = input.value === value;
}

const switchMode = (): Switch => chosen("switch") as Switch;
const seed = (): number => Math.min(Math.max(Math.floor(Number(byId<HTMLInputElement>("seed").value) || 0), 0), 2 ** 32 - 1);

function context(): { windowFrames: number; sinkFrames: number } {
  return { windowFrames: Number(byId<HTMLInputElement>("window").value), sinkFrames: Number(byId<HTMLInputElement>("sink").value) };
}

/** Set what the sliders allow, and say what they say. */
function fitContext(): void {
  const { block_frames: block, frames_per_row: rate } = facts.get(STUDENT)!;
  const window = byId<HTMLInputElement>("window");
  const sink = byId<HTMLInputElement>("sink");
  sink.min = "0";
  sink.step = String(rate);
  sink.max = String(Number(window.value) - block);
  sink.disabled = sink.max === "0";
  if (Number(sink.value) > Number(sink.max)) sink.value = sink.max;
  byId("window-value").textContent = `${window.value} frames`;
  byId("sink-value").textContent = sink.value === "0" ? "none" : `${sink.value} frames`;
}

function showSpeed(): void {
  const rate = Number(byId<HTMLInputElement>("speed").value);
  byId("speed-value").textContent = rate < UNLIMITED ? `${rate} frames/s` : "no limit";
}

function showWish(): void {
  choose("digit", String(wish.digit));
  choose("direction", String(wish.direction));
  choose("tempo", String(wish.speed));
}

function showPrompts(): void {
  const recent = prompts.map((words, number) => ({ words, number })).slice(-4);
  byId("prompts").replaceChildren(
    ...recent.map(({ words, number }) => {
      const item = document.createElement("li");
      const mark = document.createElement("i");
      mark.style.background = promptColour(number);
      item.append(mark, words === "" ? "(no prompt)" : words);
      return item;
    }),
  );
}

function showPlaying(): void {
  const button = byId("play");
  button.textContent = isPlaying ? "Pause" : "Play";
  byId<HTMLButtonElement>("step").disabled = isPlaying;
}

function showCache(state: CacheState): void {
  cache.show(state);
}

function play(isOn: boolean): void {
  isPlaying = isOn;
  framesOwed = 0;
  showPlaying();
  askForMore();
}

function step(): void {
  if (isPlaying) return;
  framesOwed += facts.get(STUDENT)!.block_frames;
  askForMore();
}

async function compare(isOn: boolean): Promise<void> {
  const button = byId<HTMLButtonElement>("compare");
  if (isOn === (players.length > 1)) return;
  button.setAttribute("aria-pressed", String(isOn));
  if (!isOn) {
    for (const { id, figure } of players.slice(1)) {
      send({ kind: "close", id });
      figure.remove();
    }
    players = players.slice(0, 1);
    restart();
    return;
  }
  button.disabled = true;
  say("Loads the network before Self-Forcing.");
  await load("start");
  button.disabled = false;
  for (const { id, plan, title } of COMPARED) addPlayer(id, "start", plan, title);
  say("All start anew, from the same noise.");
  restart();
}

function wishFor(change: Partial<Wish>): void {
  wish = { ...wish, ...change };
  if (wish.direction === null) wish.speed = null;
  changePrompt(caption(wish, facts.get(STUDENT)!.grammar));
}

function build(own: NetworkFacts): void {
  const { grammar } = own;
  byId("digits").append(...grammar.digit_words.map((word, digit) => choice("digit", String(digit), String(digit), word)));
  byId("directions").append(
    ...COMPASS.map(({ direction, sign }) => choice("direction", String(direction), sign, direction === null ? "no direction" : grammar.directions[direction])),
  );
  byId("speeds").append(...Object.entries(grammar.speeds).map(([speed, word]) => choice("tempo", speed, word)));
  byId("switches").append(...SWITCHES.map(({ value, label }) => choice("switch", value, label)));
  choose("switch", "recache");
  const window = byId<HTMLInputElement>("window");
  window.min = String(own.block_frames);
  window.max = String(own.window_frames);
  window.step = String(own.block_frames);
  window.value = window.max;
  byId<HTMLInputElement>("sink").value = String(own.plans[STUDENT].sink_frames);
  fitContext();
  showSpeed();

  byId("controls").addEventListener("change", (event) => {
    const input = event.target as HTMLInputElement;
    if (input.name === "digit") wishFor({ digit: Number(input.value) });
    if (input.name === "direction") wishFor({ direction: input.value === "null" ? null : Number(input.value) });
    if (input.name === "tempo") wishFor({ speed: input.value, direction: wish.direction ?? 0 });
    if (input.id === "window" || input.id === "sink") {
      fitContext();
      changeContext();
    }
    if (input.id === "seed") restart();
  });
  byId("controls").addEventListener("input", () => {
    fitContext();
    showSpeed();
  });
  byId("say").onclick = () => changePrompt(byId<HTMLInputElement>("prompt").value.trim());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter") byId("say").click();
  });
  byId("play").onclick = () => play(!isPlaying);
  byId("step").onclick = step;
  byId("restart").onclick = restart;
  byId("compare").onclick = () => void compare(players.length === 1);
  steer();
}

// --- keys -------------------------------------------------------------------------------------------------------------

function steer(): void {
  const held = new Set<string>();
  const arrows: Record<string, [number, number]> = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    const ownsKeys = target instanceof HTMLInputElement; // text is typed there, and arrows move between choices and on sliders
    if (ownsKeys || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in arrows) {
      event.preventDefault();
      held.add(event.key);
      const [x, y] = [...held].reduce(([sumX, sumY], key) => [sumX + arrows[key][0], sumY + arrows[key][1]], [0, 0]);
      const direction = octant(x, y);
      if (direction !== null && direction !== wish.direction) wishFor({ direction });
    } else if (/^[0-9]$/.test(event.key)) wishFor({ digit: Number(event.key) });
    else if (event.key === " " && !(target instanceof HTMLButtonElement)) {
      event.preventDefault();
      play(!isPlaying);
    } else if (event.key === ".") step();
    else if (event.key.toLowerCase() === "r") restart();
  });
  addEventListener("keyup", (event) => held.delete(event.key));
  addEventListener("blur", () => held.clear());
}

// --- tours ------------------------------------------------------------------------------------------------------------

async function setPage(step: TourStep): Promise<void> {
  if (step.compare !== undefined) await compare(step.compare);
  if (step.switch !== undefined) choose("switch", step.switch);
  for (const name of ["window", "sink", "speed"] as const) {
    if (step[name] !== undefined) byId<HTMLInputElement>(name).value = String(step[name]);
    fitContext(); // the window says how long a sink may be
  }
  showSpeed();
  if (step.window !== undefined || step.sink !== undefined) changeContext();
  if (step.prompt !== undefined) changePrompt(step.prompt);
  if (step.restart) restart();
  play(true);
}

function buildTours(): void {
  let tour = TOURS[0];
  let at = 0;
  const point = (selector: string | null) => {
    document.querySelectorAll(".pointed").forEach((each) => each.classList.remove("pointed"));
    if (selector !== null) document.querySelector(selector)?.classList.add("pointed");
  };
  const show = async () => {
    const step = tour.steps[at];
    byId("tour").hidden = false;
    byId("tour-title").textContent = `${tour.title} (${at + 1} of ${tour.steps.length})`;
    byId("tour-text").textContent = step.text;
    byId("tour-next").hidden = at + 1 === tour.steps.length;
    point(step.at);
    document.querySelector(step.at)?.scrollIntoView({ block: "nearest" });
    await setPage(step);
  };
  byId("tour-list").append(
    ...TOURS.map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = each.title;
      button.onclick = async () => {
        tour = each;
        at = 0;
        await show();
        byId("tour-title").focus({ preventScroll: true });
      };
      return button;
    }),
  );
  byId("tour-next").onclick = async () => {
    at += 1;
    await show();
  };
  byId("tour-end").onclick = () => {
    byId("tour").hidden = true;
    point(null);
  };
}

// --- start ------------------------------------------------------------------------------------------------------------

async function main(): Promise<void> {
  say("Loads the network and warms it up.");
  const own = await load(STUDENT);
  build(own);
  cache = new CacheView(byId<HTMLCanvasElement>("cache"), byId("cache-words"), own);
  steps = new StepsView(byId("steps"), own, own.plans[STUDENT].times);
  addPlayer(STUDENT, STUDENT, STUDENT, "the student");
  prompt = query.get("prompt") ?? caption(wish, own.grammar);
  if (query.has("seed")) byId<HTMLInputElement>("seed").value = query.get("seed")!;
  changePrompt(prompt);
  for (const id of ["play", "restart", "compare"]) byId<HTMLButtonElement>(id).disabled = false;
  buildTours();
  showPlaying();
  requestAnimationFrame(tick);
  say("");
  play(!query.has("paused"));
  restart();
  document.body.dataset.ready = String(Math.round(performance.now())); // milliseconds since the visit began
}

void main();
