"""Digits turned, slanted and stretched at random, so that a small set of them shows more shapes than it has images.

Linear maps about the digit's centre, as LeCun et al. 1998 (Proceedings of the IEEE 86, 2278) enlarged MNIST.

Dimensions: B videos, N digits in a video, S side of a source image, D side of a sprite, all in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from machine.seeds import Purpose, stream

MAX_VARIATION = 0.4  # the determinant of a deformation is at least 1 - 2 * variation: from 0.5 on a digit could turn inside out


def draw_deformations(seed: int, indices: Sequence[int], num_digits: int, variation: float) -> Tensor:
    """Linear maps (B, N, 2, 2): the identity with U(-variation, variation) added to every entry, of the videos (seed, index). To first
    order this is a turn (0.15 is up to 9 degrees), a slant and a stretch of either axis."""
    # Streams of their own: a video moves the same way with and without deformation.
    streams = [stream(seed, index, Purpose.DEFORMATION) for index in indices]
    moved = np.stack([each.uniform(-variation, variation, size=(num_digits, 2, 2)) for each in streams])
    return torch.eye(2) + torch.from_numpy(moved).float()


def deform(images: Tensor, deformations: Tensor, digit_size: int) -> Tensor:
    """Sprites (B, N, D, D), D = `digit_size`, of digits (B, N, S, S), ink in [0, 1]: the place x of a sprite, from its centre, shows what
    stands at deformation x in the digit, area-averaged. Ink that leaves the box is lost."""
    flat, maps = images.flatten(0, 1).unsqueeze(1), functional.pad(deformations.flatten(0, 1), (0, 1))  # without a shift
    grid = functional.affine_grid(maps, flat.shape, align_corners=False)
    deformed = functional.grid_sample(flat, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return functional.interpolate(deformed, size=(digit_size, digit_size), mode="area").view(*images.shape[:2], digit_size, digit_size)
