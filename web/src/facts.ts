// What `python -m web.export` says of a network in network.json.

export interface Plan {
  times: number[];
  fresh_noise: boolean;
  context_time: number;
  guidance: number;
  clamp_x_0: boolean;
  sink_frames: number;
}

export interface FileFacts {
  name: string;
  bytes: number;
  sha256: string;
}

export interface NetworkFacts {
  format: number;
  source: { checkpoint: string; sha256: string; training_type: string; step: number };
  frame_size: number;
  channels: number;
  num_digits: number;
  block_frames: number;
  window_frames: number;
  frames_per_row: number;
  cache_rows: number;
  cache_shape: number[];
  plans: Record<string, Plan>;
  text: { words: string[]; first_word_token: number; start_token: number; max_tokens: number };
  grammar: { digit_words: string[]; directions: string[]; speeds: Record<string, string> };
  check: number[]; // pixels of x_0 of a known input: see `check_values` in web/export.py
  files: Record<"weights" | "text" | "denoise" | "cache", FileFacts>;
}

export const FORMAT = 1;
