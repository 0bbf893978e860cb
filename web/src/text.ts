// Prompts, read as `network/text_encoder.py` reads them.

import type { NetworkFacts } from "./facts";

/** Lower-case words and single digits of a prompt, in order. */
export function splitWords(prompt: string): string[] {
  return prompt.toLowerCase().match(/[0-9]|[\p{L}\p{Nl}\p{No}]+/gu) ?? [];
}

export interface Reading {
  tokens: BigInt64Array;
  warnings: string[];
}

/** Token numbers of a prompt, padded, and what is to be said of words that are unknown or too many. */
export function readPrompt(prompt: string, text: NetworkFacts["text"]): Reading {
  const tokenOf = new Map(text.words.map((word, index) => [word, text.first_word_token + index]));
  const words = splitWords(prompt);
  const known = words.filter((word) => tokenOf.has(word)).map((word) => tokenOf.get(word)!);
  const ids = [text.start_token, ...known].slice(0, text.max_tokens);
  const warnings: string[] = [];
  const unknown = [...new Set(words.filter((word) => !tokenOf.has(word)))];
  if (unknown.length > 0) {
    const named = unknown.slice(0, 20).map((word) => word.slice(0, 40)).join(", ");
    const more = unknown.length > 20 ? ` and ${unknown.length - 20} more` : "";
    warnings.push(`Unknown words left out of the prompt: ${named}${more}. Known words: ${text.words.join(", ")}.`);
  }
  if (known.length + 1 > text.max_tokens) warnings.push(`The prompt is longer than ${text.max_tokens - 1} words: the rest was cut.`);
  const tokens = new BigInt64Array(text.max_tokens);
  ids.forEach((id, index) => (tokens[index] = BigInt(id)));
  return { tokens, warnings };
}

export interface Wish {
  digit: number | null;
  direction: number | null; // 0 to 7, counter-clockwise from right
  speed: string | null;
}

/** A caption of the grammar for what the buttons say. */
export function caption(wish: Wish, grammar: NetworkFacts["grammar"]): string {
  const subject = wish.digit === null ? "" : `the digit ${wish.digit}`;
  const motion = wish.direction === null ? "" : ` moving ${grammar.directions[wish.direction]}`;
  const speed = wish.speed === null || wish.direction === null ? "" : ` ${grammar.speeds[wish.speed]}`;
  return (subject + motion + speed).trim();
}

/** What a prompt says of its first digit, as far as the buttons can show it. */
export function wishOf(prompt: string, grammar: NetworkFacts["grammar"]): Wish {
  const wish: Wish = { digit: null, direction: null, speed: null };
  const horizontal: Record<string, number> = { right: 1, rightwards: 1, left: -1, leftwards: -1 };
  const vertical: Record<string, number> = { up: 1, upwards: 1, upper: 1, down: -1, downwards: -1, lower: -1 };
  let x = 0;
  let y = 0;
  for (const word of splitWords(prompt)) {
    const spelt = grammar.digit_words.indexOf(word);
    if (/^[0-9]$/.test(word) || spelt >= 0) {
      if (wish.digit !== null) break;
      wish.digit = spelt >= 0 ? spelt : Number(word);
    } else if (word in horizontal) x = horizontal[word];
    else if (word in vertical) y = vertical[word];
    for (const [speed, own] of Object.entries(grammar.speeds)) if (word === own) wish.speed = speed;
  }
  wish.direction = octant(x, y);
  return wish;
}

/** 0 to 7 of a direction of steps in {-1, 0, 1}, y upwards; null where nothing moves. */
export function octant(x: number, y: number): number | null {
  return x === 0 && y === 0 ? null : (Math.round(Math.atan2(y, x) / (Math.PI / 4)) + 8) % 8;
}
