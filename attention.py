"""What a token may see and where it stands: attention masks and the tables of 3-D RoPE. Pure functions, kept once made.

Dimensions: T, Y, X the patch grid, N = Y X tokens a patch row in time, S = T N tokens of a video, d the head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flow_matching import NUM_TRAIN_TIMESTEPS


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a kept mask must also serve later training
def block_causal_mask(
    num_frames: int, num_frames_per_block: int, window_frames: int | None, temporal_patch: int, tokens_per_patch_row: int,
    device: torch.device,
) -> Tensor:
    """(S, S) bool, True where a query may look: its own block and the earlier ones inside the window.

    The window ends with the query's block and counts it, exactly as `KVCache` does.
    """
    frame = torch.arange(0, num_frames, temporal_patch, device=device)  # (T,) first frame of each patch row
    block_end = (frame // num_frames_per_block + 1) * num_frames_per_block
    allowed = frame[None, :] < block_end[:, None]  # (T query, T key)
    if window_frames is not None:
        allowed &= frame[None, :] >= block_end[:, None] - max(window_frames, num_frames_per_block)
    return allowed.repeat_interleave(tokens_per_patch_row, 0).repeat_interleave(tokens_per_patch_row, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a kept mask must also serve later training
def teacher_forcing_mask(
    num_frames: int, num_frames_per_block: int, window_frames: int | None, temporal_patch: int, tokens_per_patch_row: int,
    device: torch.device,
) -> Tensor:
    """(2 S, 2 S) bool for the doubled sequence [clean | noisy], True where a query may look.

    A clean block sees what a causal one sees: clean blocks up to itself. A noisy block sees the clean blocks before it
    and itself, never another noisy block: what the KV cache shows it where the finished blocks are the clean ones.
    """
    causal = block_causal_mask(num_frames, num_frames_per_block, window_frames, temporal_patch, tokens_per_patch_row, device)
    own = causal & causal.T  # (S, S) query and key in the same block
    to_clean = torch.cat([causal, causal & ~own])  # (2 S, S)
    to_noisy = torch.cat([torch.zeros_like(own), own])  # (2 S, S)
    return torch.cat([to_clean, to_noisy], dim=1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a kept table must also serve later training
def rope_angles(
    grid: tuple[int, int], head_size: int, theta: float, first_row: int, num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """3-D RoPE (arXiv 2104.09864; axis split as in Wan) from patch row first_row on: cos (S, d), each angle twice, and sin (S, d),
    whose first half is negated, so that a rotation is two products."""
    grid_y, grid_x = grid
    half = head_size // 2
    sizes = (half - 2 * (half // 3), half // 3, half // 3)  # angles given to time, height, width
    positions = torch.meshgrid(
        torch.arange(first_row, first_row + num_rows, dtype=torch.float64),
        torch.arange(grid_y, dtype=torch.float64),
        torch.arange(grid_x, dtype=torch.float64), indexing="ij",
    )
    angles = []
    for size, position in zip(sizes, positions, strict=True):
        frequency = theta ** (-torch.arange(size, dtype=torch.float64) / size)
        angles.append(position.flatten()[:, None] * frequency)  # (S, size)
    angle = torch.cat(angles, dim=1)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=1).to(device), torch.cat([-sin, sin], dim=1).to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, h, S, d) by `rope_angles`: the pair (x_i, x_{i + d/2}) turns by the angle of token and frequency i."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """(..., width) cosines and sines of Wan's timestep 1000 t (arXiv 1706.03762)."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = NUM_TRAIN_TIMESTEPS * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
