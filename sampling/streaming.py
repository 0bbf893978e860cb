"""Streams: a trained causal network makes video without end, one block at a time, and takes a new prompt between blocks.

Dimensions: B batch, F frames, C channels, H height, W width.

    stream = stream_video(model, text_encoder, ["a 3 moving up"], [0], plan, runtime)
    block = next(stream)                         # (1, 3, 1, 32, 32)
    block = stream.send(["a 7 moving left"])     # the next block, under another prompt

If the plan has a window, memory and time of a block stay constant.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynamic_video_sf import PromptSwitch, make_noise_streams, rollout_blocks
from machine.runtime import Runtime
from method.plans import RolloutPlan
from network.text_encoder import NULL_PROMPT, TextEncoder
from tiny_causal_wan import TinyCausalWanModel


def stream_video(
    model: TinyCausalWanModel, text_encoder: TextEncoder, prompts: list[str], seeds: list[int], plan: RolloutPlan, runtime: Runtime,
    num_blocks: int | None = None, switch: str = "recache", first_frames: Tensor | None = None,
) -> Generator[Tensor, list[str] | None, None]:
    """Yield blocks (B, F_block, C, H, W), float32, without gradient, from the one rollout; num_blocks None for no end.

    prompts, seeds: one for each video. Send B new prompts to change them from the next block on, which `send` returns; switch: what
    happens to the cache then, see `PromptSwitch`. first_frames (B, F, C, H, W): frames before the first block.
    """
    plan = replace(plan, context=replace(plan.context, hide_first_block=False))  # which is for training only

    def encode(texts: list[str]) -> PromptSwitch:
        null = None if plan.guidance == 1 else model.encode_prompt(*text_encoder.encode([NULL_PROMPT] * len(texts)))
        return PromptSwitch(model.encode_prompt(*text_encoder.encode(texts)), switch, null)

    # The contexts are closed before each yield: they must not hold for the consumer of the stream.
    with torch.no_grad(), runtime.autocast():
        first = encode(prompts)
        blocks = rollout_blocks(
            model, first.prompt, make_noise_streams(seeds), num_blocks, plan, first.null_prompt, first_frames=first_frames
        )
    sent: list[str] | None = None
    while True:
        try:
            with torch.no_grad(), runtime.autocast():
                block = blocks.send(None if sent is None else encode(sent))
        except StopIteration:
            return
        sent = yield block.float()
        if sent is not None and len(sent) != len(prompts):
            raise ValueError(f"{len(sent)} new prompts for {len(prompts)} videos: expected one each")


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of a video by their first frame, as (frame, prompt): frames ascend from 0. switch: see `PromptSwitch`."""

    entries: tuple[tuple[int, str], ...]
    switch: str = "recache"

    def __post_init__(self) -> None:
        frames = [frame for frame, _ in self.entries]
        if not frames or frames[0] != 0 or any(a >= b for a, b in zip(frames, frames[1:], strict=False)):
            raise ValueError(f"--schedule changes the prompt at the frames {frames}: expected ascending frames, the first one 0")

    @classmethod
    def parse(cls, texts: list[str], switch: str = "recache") -> PromptSchedule:
        """From texts such as "42: a 7 moving left". Raises ValueError."""
        entries = []
        for text in texts:
            match = re.fullmatch(r"\s*(\d+)\s*:\s?(.*)", text, flags=re.DOTALL)
            if match is None:
                raise ValueError(f"--schedule has {text!r}: expected a frame and a prompt, such as \"42: a 7 moving left\"")
            entries.append((int(match.group(1)), match.group(2)))
        return cls(tuple(entries), switch)

    def check(self, starts: list[int]) -> None:
        """Raise ValueError unless every change is at one of `starts`, the first frames of the generated blocks."""
        for frame, prompt in self.entries[1:]:
            if frame <= starts[0]:  # within given frames
                raise ValueError(f"--schedule changes the prompt at frame {frame}, but the first frame that is made is {starts[0]}: give "
                                 f"{prompt!r} as the first prompt, or change it at a later block")
            if frame > starts[-1]:
                raise ValueError(f"--schedule asks for {prompt!r} from frame {frame} on, but the last block starts at frame {starts[-1]}: "
                                 "make the video longer or change the prompt earlier")
            if frame not in starts:
                nearest = [max(start for start in starts if start < frame), min(start for start in starts if start > frame)]
                raise ValueError(f"--schedule changes the prompt at frame {frame}: expected the start of a block, such as {nearest}")

    def __str__(self) -> str:
        return " | ".join(prompt if frame == 0 else f"{frame}: {prompt}" for frame, prompt in self.entries)
