"""A stream of video by an exported network, with onnxruntime: what the page does in TypeScript, in Python.

`web/src/past.ts` and `web/src/stream.ts` are this module line by line; tests hold it to `sampling.streaming` and the page to it. Dimensions
as in `web.passes`; a frame's number counts from 0 in its video.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from network.text_encoder import split_words

Array = np.ndarray
DrawNoise = Callable[[tuple[int, ...]], Array]  # standard normal, float32, of a shape


class OnnxNetwork:
    """The graphs of a folder that `web.export` wrote. num_threads: of onnxruntime."""

    def __init__(self, folder: Path, num_threads: int = 1):
        self.facts: dict[str, Any] = json.loads((folder / "network.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self._sessions = {
            name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("text", "denoise", "cache")
        }

    def run(self, name: str, **inputs: Array) -> list[Array]:
        return self._sessions[name].run(None, inputs)

    def encode(self, prompt: str) -> dict[str, Array]:
        """What the other graphs need of a prompt; words that the grammar lacks are left out."""
        text = self.facts["text"]
        token_of = {word: text["first_word_token"] + index for index, word in enumerate(text["words"])}
        known = [token_of[word] for word in split_words(prompt) if word in token_of]
        tokens = [text["start_token"], *known][: text["max_tokens"]]
        padded = np.array([tokens + [0] * (text["max_tokens"] - len(tokens))], dtype=np.int64)
        names = ("prompt_keys", "prompt_values", "prompt_mask", "pooled")
        return dict(zip(names, self.run("text", tokens=padded), strict=True))


class RollingCache:
    """The cache of one video under one prompt. rows: the numbers of the patch rows that it shows, which fill its last places."""

    def __init__(self, network: OnnxNetwork, prompt: dict[str, Array]):
        self.network, self.prompt = network, prompt
        self.clear()

    def clear(self) -> None:
        self.rows: list[int] = []
        self.keys = np.zeros(self.network.facts["cache_shape"], dtype=np.float32)
        self.values = np.zeros_like(self.keys)

    def denoise(self, x_t: Array, t: float) -> Array:
        """x_0 of a noisy block that follows the cached rows."""
        return self.network.run("denoise", x_t=x_t, t=np.array([t], np.float32), **self._state())[0]

    def write(self, x: Array, t: float, first_row: int, window_rows: int, sink_rows: int, forget_before: int = 0) -> None:
        """Add a finished block whose first row has this number, and forget what the next block no longer sees: rows behind the sink
        that come before `forget_before`, and the first ones behind it that are too many for the window."""
        facts = self.network.facts
        capacity, block = facts["cache_rows"], facts["block_frames"] // facts["frames_per_row"]
        places = {row: capacity - len(self.rows) + index for index, row in enumerate(self.rows)}
        places |= {first_row + index: capacity + index for index in range(block)}
        kept = [row for row in places if row < sink_rows or row >= forget_before]
        surplus = max(len(kept) + block - window_rows, 0)
        kept = kept[:sink_rows] + kept[sink_rows + surplus:]
        order = np.array([0] * (capacity - len(kept)) + [places[row] for row in kept], dtype=np.int64)
        self.keys, self.values = self.network.run("cache", x=x, t=np.array([t], np.float32), order=order, **self._state())
        self.rows = kept

    def _state(self) -> dict[str, Array]:
        return {"keys": self.keys, "values": self.values, "visible": np.array([len(self.rows)], np.int64), **self.prompt}


@dataclass(frozen=True)
class FinishedBlock:
    """x_0 (1, F, C, H, W) and the number of its first frame."""

    first_frame: int
    x_0: Array


class OnnxStream:
    """Blocks of one video, one call each. plan: one of `facts["plans"]`. window_frames, sink_frames: as in `ContextWindow`."""

    def __init__(
        self, network: OnnxNetwork, prompt: str, draw_noise: DrawNoise, plan: dict[str, Any], window_frames: int, sink_frames: int
    ):
        self.network, self.plan, self.draw_noise = network, plan, draw_noise
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self._caches = [RollingCache(network, network.encode(each)) for each in self._branches(prompt)]
        self._blocks: list[FinishedBlock] = []  # those from which the cache can be made again
        self._num_frames, self._pending = 0, None

    def _branches(self, prompt: str) -> list[str]:
        return [prompt] if self.plan["guidance"] == 1 else [prompt, ""]

    def next_block(self) -> Array:
        """x_0 (1, F, C, H, W) of the next block."""
        facts, times = self.network.facts, self.plan["times"]
        if self._pending is not None:
            self._append()
        shape = (1, facts["block_frames"], facts["channels"], facts["frame_size"], facts["frame_size"])
        x_t = self.draw_noise(shape)
        for step, t in enumerate(times):
            predicted = self._predict(x_t, t)
            x_0 = predicted.clip(-1, 1) if self.plan["clamp_x_0"] else predicted
            if step + 1 < len(times):
                eps = self.draw_noise(shape) if self.plan["fresh_noise"] else x_t + (1 - t) * (x_t - predicted) / t
                x_t = _noised(x_0, eps, times[step + 1])
        self._pending = x_0
        return x_0

    def switch(self, prompt: str, how: str) -> None:
        """From the next block on another prompt; how: see `PromptSwitch`."""
        if self._pending is not None and how != "reset":
            self._append(is_written=how == "keep")  # under the prompt that it was made with
        for cache, each in zip(self._caches, self._branches(prompt), strict=True):
            cache.prompt = self.network.encode(each)
        if how == "recache":
            self.encode_again()
        if how == "reset":
            self._pending, self._blocks, self._num_frames = None, [], 0
            for cache in self._caches:
                cache.clear()

    def change_context(self, window_frames: int, sink_frames: int) -> None:
        """From the next block on another window and sink: the cache is made again, from the frames that these show."""
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.encode_again()

    def encode_again(self) -> None:
        """Make the cache again, block by block, from the frames that the next block sees."""
        if self._pending is not None:
            self._append(is_written=False)
        block = self.network.facts["block_frames"]
        first_visible = self._num_frames - (self.window_frames - self.sink_frames - block)
        for cache in self._caches:
            cache.clear()
        sink = [each for each in self._blocks if each.first_frame < self.sink_frames]
        rest = [each for each in self._blocks if each.first_frame >= self.sink_frames and each.first_frame + block > first_visible]
        for each in sink:
            is_last = each is sink[-1]
            self._write(each, forget_before=min(each.first_frame + block, first_visible) if is_last else 0)
        for each in rest:
            self._write(each)

    def _predict(self, x_t: Array, t: float) -> Array:
        """x_0 under the plan's guidance; as v is linear in x_0, guiding either is the same."""
        cond, *uncond = (cache.denoise(x_t, t) for cache in self._caches)
        return uncond[0] + np.float32(self.plan["guidance"]) * (cond - uncond[0]) if uncond else cond

    def _append(self, is_written: bool = True) -> None:
        """The pending block becomes part of the past."""
        each = FinishedBlock(self._num_frames, self._pending)
        self._pending = None
        self._num_frames += each.x_0.shape[1]
        longest = self.network.facts["window_frames"]
        self._blocks = [old for old in self._blocks if old.first_frame < longest or old.first_frame >= each.first_frame - longest] + [each]
        if is_written:
            self._write(each)
        elif self.plan["context_time"] != 0:
            self.draw_noise(each.x_0.shape)  # what the rollout draws here and then never uses

    def _write(self, each: FinishedBlock, forget_before: int = 0) -> None:
        t, rate = self.plan["context_time"], self.network.facts["frames_per_row"]
        x = each.x_0 if t == 0 else _noised(each.x_0, self.draw_noise(each.x_0.shape), t)
        for cache in self._caches:
            cache.write(x, t, each.first_frame // rate, self.window_frames // rate, self.sink_frames // rate, forget_before // rate)


def _noised(x_0: Array, eps: Array, t: float) -> Array:
    return (np.float32(1 - t) * x_0 + np.float32(t) * eps).astype(np.float32)
