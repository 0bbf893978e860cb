"""Attention: windows, masks, 3-D RoPE and the product. Pure functions; tables are cached.

Dimensions: T, Y, X the patch grid, N = Y X tokens a patch row in time, S = T N tokens of a video, d the head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin (S, d)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # self-attention of a layer: rotated q and k, v (B, h, S, d) to (B, h, S, d)

NUM_TRAIN_TIMESTEPS = 1000  # Wan's integer scale: timestep 1000 is t = 1


@dataclass(frozen=True)
class ContextWindow:
    """How a video is divided into blocks and what a block sees of the past; all in frames."""

    window_frames: int | None = None  # that a block sees, itself and the sink included; None for all
    # Initial frames kept in the cache (attention sink, arXiv 2309.17453). Once frames after them have left the window, they are placed
    # right before the remaining ones, so that no two visible frames are further apart than the window.
    sink_frames: int = 0
    hide_first_block: bool = False  # the last block of a video does not see the first one (Self-Forcing, arXiv 2506.08009, section 3.4)
    independent_first_frame: bool = False  # the first block is one frame, [1, 3, 3, ...]

    def check(self, num_frames_per_block: int, prefix: str = "") -> None:
        """Raise ValueError naming, after the prefix, a key that does not fit blocks of num_frames_per_block frames."""
        window, sink, block = self.window_frames, self.sink_frames, num_frames_per_block
        if window is not None and window < block:
            raise ValueError(f"{prefix}window_frames is {window}: a block counts itself, so expected at least num_frames_per_block={block}")
        if sink < 0 or (window is not None and sink > window - block):
            room = " or more" if window is None else f" to {window - block}, window_frames={window} less a block of {block}"
            raise ValueError(f"{prefix}sink_frames is {sink}: expected 0{room}; a sink is part of the window")
        if self.hide_first_block and sink:
            raise ValueError(f"{prefix}sink_frames is {sink}: expected 0 where the first block is hidden from the last one")

    def block_sizes(self, num_frames: int, num_frames_per_block: int) -> list[int]:
        """Frames of each block of a video. Raises ValueError if blocks do not add up to num_frames."""
        first = [1] if self.independent_first_frame and num_frames else []
        num_blocks, rest = divmod(num_frames - len(first), num_frames_per_block)
        if rest:
            one = "one frame and " if first else ""
            raise ValueError(f"{num_frames} frames: expected {one}a multiple of the block of {num_frames_per_block}")
        return first + [num_frames_per_block] * num_blocks


WHOLE_PAST = ContextWindow()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a kept mask must also serve later training
def block_causal_mask(
    num_frames: int, num_frames_per_block: int, context: ContextWindow, temporal_patch: int, tokens_per_patch_row: int,
    device: torch.device,
) -> tuple[Tensor, tuple[int, ...]]:
    """Mask (S, S + copies), True for visible keys, and the patch row at which each copy of the sink starts.

    Each query sees its own block and the earlier ones inside the window, which ends with that block, as `KVCache` shows them. A block
    whose window has left frame 0 behind sees a copy of the sink, placed right before the remaining frames; all copies follow the keys."""
    sizes = torch.tensor(context.block_sizes(num_frames, num_frames_per_block))
    ends = sizes.cumsum(0)  # (K,) where each block ends
    frame = torch.arange(0, num_frames, temporal_patch)  # (T,) first frame of each patch row
    block_end = ends.repeat_interleave(sizes)[frame]  # (T,) of each row's block
    allowed = frame[None, :] < block_end[:, None]  # (T query, T key)
    copies: list[int] = []  # ends of the blocks that see a copy of the sink
    if context.window_frames is not None:
        window, sink = context.window_frames, context.sink_frames
        has_rolled = (block_end > window)[:, None]
        allowed &= ~has_rolled | (frame[None, :] >= block_end[:, None] - (window - sink))
        copies = [end for end in ends.tolist() if end > window] if sink else []
    if context.hide_first_block and len(sizes) > 1:
        allowed &= ~((block_end == num_frames)[:, None] & (frame < sizes[0])[None, :])
    seen = [(block_end == end)[:, None].expand(-1, context.sink_frames // temporal_patch) for end in copies]  # (T, sink rows) each
    mask = torch.cat([allowed, *seen], dim=1).repeat_interleave(tokens_per_patch_row, 0).repeat_interleave(tokens_per_patch_row, 1)
    return mask.to(device), tuple((end - (context.window_frames or 0)) // temporal_patch for end in copies)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a kept mask must also serve later training
def teacher_forcing_mask(
    num_frames: int, num_frames_per_block: int, context: ContextWindow, temporal_patch: int, tokens_per_patch_row: int,
    device: torch.device,
) -> tuple[Tensor, tuple[int, ...]]:
    """The same for the doubled sequence [clean | noisy], then the copies of the clean sink. A clean block sees the clean blocks up to
    itself; a noisy one sees the clean blocks before it and itself, as it would with the clean blocks in the KV cache."""
    mask, copy_rows = block_causal_mask(num_frames, num_frames_per_block, context, temporal_patch, tokens_per_patch_row, device)
    sizes = torch.tensor(context.block_sizes(num_frames, num_frames_per_block))
    block = torch.arange(len(sizes)).repeat_interleave(sizes)[::temporal_patch].repeat_interleave(tokens_per_patch_row).to(device)
    own = block[:, None] == block[None, :]  # (S, S) query and key in the same block
    causal, copies = mask[:, :len(own)], mask[:, len(own):]
    to_clean = torch.cat([causal, causal & ~own])  # (2 S, S)
    to_noisy = torch.cat([torch.zeros_like(own), own])  # (2 S, S)
    return torch.cat([to_clean, to_noisy, copies.repeat(2, 1)], dim=1), copy_rows


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., S, d) by `rope_angles`: the pair (x_i, x_{i + d/2}) turns by the angle of token and frequency i."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


def shifted(keys: Tensor, num_rows: int, theta: float) -> Tensor:
    """Rotated keys (..., S, d) as they would be num_rows patch rows later: rotations add up, and only the angle of time changes."""
    return apply_rope(keys, *rope_angles((1, 1), keys.shape[-1], theta, num_rows, 1, keys.device))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a kept table must also serve later training
def rope_angles(grid: tuple[int, int], head_size: int, theta: float, first_row: int, num_rows: int, device: torch.device) -> Rope:
    """3-D RoPE (arXiv 2104.09864; axis split as in Wan) from patch row first_row on: cos (S, d), each angle twice, and sin (S, d),
    whose first half is negated, so that a rotation is two products."""
    half = head_size // 2
    sizes = (half - 2 * (half // 3), half // 3, half // 3)  # angles given to time, height, width
    bounds = ((first_row, first_row + num_rows), (0, grid[0]), (0, grid[1]))
    positions = torch.meshgrid(*(torch.arange(*each, dtype=torch.float64) for each in bounds), indexing="ij")
    angles = []
    for size, position in zip(sizes, positions, strict=True):
        frequency = theta ** (-torch.arange(size, dtype=torch.float64) / size)
        angles.append(position.flatten()[:, None] * frequency)  # (S, size)
    angle = torch.cat(angles, dim=1)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=1).to(device), torch.cat([-sin, sin], dim=1).to(device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, Eq. 1) over (B, h, S, d); mask is True where a query may look. Written out in bfloat16
    on the CPU: at a few hundred tokens that can be 4 times as fast as the fused kernel's backward pass."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, h, S_q, S_k)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """(..., width) cosines and sines of Wan's timestep 1000 t (arXiv 1706.03762)."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = NUM_TRAIN_TIMESTEPS * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
