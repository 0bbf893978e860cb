"""What `python tiny_causal_wan.py` checks: cache against mask, causality and patches on a small network, and the default one's speed."""

from __future__ import annotations

import time
from itertools import product

import torch
from torch import nn

from machine.seeds import Purpose, seed_global_generators
from method.flow_matching import x_0_from_velocity
from network.attention import ContextWindow
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel


def _time_blocks(model: TinyCausalWanModel, prompt: PromptContext, num_blocks: int, block: int, num_steps: int, is_cached: bool) -> float:
    """Frames per second of num_steps passes a block at batch 1, with the cache or with the mask over all frames so far."""
    cache, side = model.new_cache(), model.config.frame_size
    video = torch.zeros(1, num_blocks * block, model.config.channels, side, side)
    t = torch.full(video.shape[:2], 0.5)
    started = time.perf_counter()
    for first in range(0, num_blocks * block, block):
        now, so_far = slice(first, first + block), slice(0, first + block)
        for _ in range(num_steps):
            if is_cached:
                model.forward_cached(video[:, now], t[:, now], prompt, cache)
            else:
                model.forward_block_causal(video[:, so_far], t[:, so_far], prompt, block)
        if is_cached:
            model.write_cache(video[:, now], t[:, now], prompt, cache)
    return num_blocks * block / (time.perf_counter() - started)


def _cache_against_mask(model: TinyCausalWanModel) -> list[float]:
    """How far 27 frames through the cache are from those under the mask: x_0, v from t = 0.5 on, as in a student's steps, and v."""
    x_t, t = torch.randn(2, 27, 1, 8, 8), 0.1 + 0.9 * torch.rand(2, 27)
    prompt = model.encode_prompt(torch.randn(2, 5, model.config.text_width), torch.ones(2, 5, dtype=torch.bool))
    found = {}
    for block, window, sink in product((1, 3), (None, 6, 9, 21), (0, 1, 3)):
        cache, parts = model.new_cache(window, sink), []
        for x, times in zip(x_t.split(block, 1), t.split(block, 1), strict=True):
            parts.append(model.forward_cached(x, times, prompt, cache))
            model.write_cache(x, times, prompt, cache)
        v, expected = torch.cat(parts, 1), model.forward_block_causal(x_t, t, prompt, block, ContextWindow(window, sink))
        x_0 = x_0_from_velocity(x_t, v, t) - x_0_from_velocity(x_t, expected, t)  # of what the network predicts
        found[block, window, sink] = [x.abs().max().item() for x in (x_0, (v - expected)[t >= 0.5], v - expected)]
    for block in (1, 3):
        row = ", ".join(f"{window}/{sink} {x_0:.0e} {v:.0e}" for (size, window, sink), (x_0, _, v) in found.items() if size == block)
        print(f"     cache against mask, blocks of {block}, window/sink x_0 v: {row}")
    return [max(column) for column in zip(*found.values(), strict=True)]


@torch.no_grad()
def self_test(seed: int = 0) -> bool:
    """Check a small network, time the default one, print every finding, and say whether all is well."""
    seed_global_generators(seed, Purpose.SELF_TEST)
    block, num_frames = 3, 12
    small = TinyCausalWanModel(ModelConfig(frame_size=8, width=16, num_layers=2, num_heads=2, patch_size=[1, 4, 4]))
    for parameter in small.parameters():
        if not parameter.any():  # zeros would hide what a path does
            nn.init.normal_(parameter, std=0.2)
    x_t, t = torch.randn(2, num_frames, 1, 8, 8), 0.1 + 0.9 * torch.rand(2, num_frames)
    prompt = small.encode_prompt(torch.randn(2, 5, small.config.text_width), torch.ones(2, 5, dtype=torch.bool))

    x_0, late, v = _cache_against_mask(small)
    other = x_t.clone()
    other[:, -block:] += 1
    change = small.forward_block_causal(other, t, prompt, block) - small.forward_block_causal(x_t, t, prompt, block)
    past, present = change[:, :-block].abs().max().item(), change[:, -block:].abs().max().item()
    seen = (small.forward_bidirectional(other, t, prompt) - small.forward_bidirectional(x_t, t, prompt))[:, :-block].abs().max().item()

    small.patch_embedding.weight.copy_(torch.eye(small.config.patch_values).view_as(small.patch_embedding.weight))
    small.patch_embedding.bias.zero_()
    round_trip = (small.unpatchify(small.patchify(x_t)) - x_t).abs().max().item()

    model = TinyCausalWanModel(ModelConfig())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    prompt = model.encode_prompt(torch.randn(1, 5, model.config.text_width), torch.ones(1, 5, dtype=torch.bool))
    _time_blocks(model, prompt, 1, block, 1, is_cached=True)  # the first pass pays for set-up
    num_blocks, num_steps = 5, 4
    with_cache, without = (_time_blocks(model, prompt, num_blocks, block, num_steps, is_cached) for is_cached in (True, False))
    checks = (
        (max(x_0, late) < 1e-5, "blocks through the cache equal the full pass under the mask, for every block, window and sink: x_0 "
         f"{x_0:.1e} apart at most, v, which divides by t, {late:.1e} from t = 0.5 on and {v:.1e} from 0.1 on"),
        (past == 0 and present > 0, f"the past does not see the future: it moves by {past:.1e}, the changed block by {present:.1e}"),
        (seen > 0, f"the bidirectional network does see it: the past moves by {seen:.1e}"),
        (round_trip == 0, f"patchify, then unpatchify, is the identity: {round_trip:.1e} apart at most"),
        (3.5e6 < num_parameters < 4.5e6, f"the default network has {num_parameters:,} parameters"),
    )
    for is_ok, finding in checks:
        print(f"{'ok  ' if is_ok else 'FAIL'} {finding}")
    print(f"     {num_blocks * block} frames in blocks of {block}, {num_steps} passes a block, batch 1: "
          f"{with_cache:.1f} frames per second with the cache, {without:.1f} without")
    return all(is_ok for is_ok, _ in checks)


if __name__ == "__main__":
    raise SystemExit(0 if self_test() else 1)
