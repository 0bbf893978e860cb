// A network in memory: its graphs as sessions of onnxruntime, and the files they come from, checked.

import { FORMAT, type NetworkFacts } from "./facts";
import { readPrompt } from "./text";

export type Ort = typeof import("onnxruntime-web/wasm");
export type Tensor = import("onnxruntime-web/wasm").Tensor;
export type Tensors = Record<string, Tensor>;
type Session = import("onnxruntime-web/wasm").InferenceSession;
export type Progress = (bytes: number) => void;

export class LoadError extends Error {}

/** All bytes of a file. Throws a LoadError, in one line, where they do not all arrive. */
export async function download(url: string, progress: Progress = () => {}): Promise<Uint8Array<ArrayBuffer>> {
  const name = new URL(url).pathname.split("/").slice(-2).join("/");
  const parts: Uint8Array[] = [];
  let size = 0;
  try {
    const response = await fetch(url);
    if (!response.ok || response.body === null) throw new LoadError(`${name} is not there (${response.status}): build the page again.`);
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      size += part.value.length;
      progress(part.value.length);
    }
  } catch (error) {
    if (error instanceof LoadError) throw error;
    throw new LoadError(`The download of ${name} broke off after ${size.toLocaleString("en")} bytes: check the connection and reload the page.`);
  }
  const whole = new Uint8Array(size);
  parts.reduce((place, part) => (whole.set(part, place), place + part.length), 0);
  return whole;
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string | null> {
  if (!globalThis.crypto?.subtle) return null; // plain http, other than localhost
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

type GraphName = "text" | "denoise" | "cache";

/** What `python -m web.export` wrote of a network, checked. */
export interface NetworkFiles {
  facts: NetworkFacts;
  bytes: Record<GraphName | "weights", Uint8Array<ArrayBuffer>>;
}

/** Download a network's folder. total: called once with the bytes to come. */
export async function downloadNetwork(folder: string, total: (bytes: number) => void, progress: Progress): Promise<NetworkFiles> {
  let facts: NetworkFacts;
  try {
    facts = JSON.parse(new TextDecoder().decode(await download(`${folder}/network.json`)));
  } catch (error) {
    if (error instanceof LoadError) throw error;
    throw new LoadError(`${folder}/network.json cannot be read: build the page again.`);
  }
  if (facts.format !== FORMAT) throw new LoadError(`The network is of format ${facts.format}, the page reads ${FORMAT}: export and build again.`);
  total(Object.values(facts.files).reduce((sum, file) => sum + file.bytes, 0));
  const files = Object.entries(facts.files).map(async ([name, file]) => {
    const bytes = await download(`${folder}/${file.name}`, progress);
    const digest = await sha256(bytes);
    if (bytes.length !== file.bytes || (digest !== null && digest !== file.sha256)) {
      const found = `${bytes.length.toLocaleString("en")} of ${file.bytes.toLocaleString("en")} bytes`;
      throw new LoadError(`${file.name} arrived damaged (${found}, or other ones): reload the page.`);
    }
    return [name, bytes] as const;
  });
  return { facts, bytes: Object.fromEntries(await Promise.all(files)) as NetworkFiles["bytes"] };
}

export class Network {
  private constructor(readonly ort: Ort, readonly facts: NetworkFacts, private readonly sessions: Record<GraphName, Session>) {}

  /** Make the graphs' sessions on a device. */
  static async open(ort: Ort, { facts, bytes }: NetworkFiles, device: "wasm" | "webgpu"): Promise<Network> {
    const session = (name: GraphName): Promise<Session> =>
      ort.InferenceSession.create(bytes[name], {
        executionProviders: [device],
        graphOptimizationLevel: "all",
        logSeverityLevel: 3, // errors: on a GPU every session warns of what stays on the CPU by design
        extra: { session: { intra_op: { allow_spinning: "0" } } }, // threads wait asleep: other programs use the cores too
        externalData: [{ path: facts.files.weights.name, data: bytes.weights }],
        // The cache never leaves a GPU: what the cache pass writes there, the next passes read there.
        ...(device === "webgpu" && name === "cache" ? { preferredOutputLocation: { new_keys: "gpu-buffer", new_values: "gpu-buffer" } as const } : {}),
      });
    return new Network(ort, facts, { text: await session("text"), denoise: await session("denoise"), cache: await session("cache") });
  }

  run(name: GraphName, inputs: Tensors): Promise<Tensors> {
    return this.sessions[name].run(inputs) as Promise<Tensors>;
  }

  /** What the other graphs need of a prompt. */
  encode(prompt: string): Promise<Tensors> {
    const { tokens } = readPrompt(prompt, this.facts.text);
    return this.run("text", { tokens: new this.ort.Tensor("int64", tokens, [1, tokens.length]) });
  }

  floats(values: Float32Array, shape: number[]): Tensor {
    return new this.ort.Tensor("float32", values, shape);
  }

  integers(values: number[]): Tensor {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [values.length]);
  }
}
