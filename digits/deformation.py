"""Random linear maps of digits about their centre, to enlarge a small set of them (as LeCun et al. 1998, Proc. IEEE 86, 2278).

Dimensions: B videos, N digits in a video, S side of a source image, D side of a sprite, all in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from machine.seeds import Purpose, stream

MAX_VARIATION = 0.4  # the determinant is at least 1 - 2 * variation: from 0.5 on a digit could be mirrored


def draw_deformations(seed: int, indices: Sequence[int], num_digits: int, variation: float) -> Tensor:
    """Linear maps (B, N, 2, 2) of the videos (seed, index): the identity plus U(-variation, variation) in every entry, which to first order
    is a rotation (0.15: up to 9 degrees), a slant and a stretch of either axis. Motion has another stream, so it does not change."""
    streams = [stream(seed, index, Purpose.DEFORMATION) for index in indices]
    added = np.stack([each.uniform(-variation, variation, size=(num_digits, 2, 2)) for each in streams])
    return torch.eye(2) + torch.from_numpy(added).float()


def deform(images: Tensor, deformations: Tensor, digit_size: int) -> Tensor:
    """Sprites (B, N, D, D), D = `digit_size`, of digits (B, N, S, S), ink in [0, 1], area-averaged: position x from the centre of a sprite
    shows the digit at (deformation x). Ink outside the box is lost."""
    flat, maps = images.flatten(0, 1).unsqueeze(1), functional.pad(deformations.flatten(0, 1), (0, 1))  # without a shift
    grid = functional.affine_grid(maps, flat.shape, align_corners=False)
    deformed = functional.grid_sample(flat, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return functional.interpolate(deformed, size=(digit_size, digit_size), mode="area").view(*images.shape[:2], digit_size, digit_size)
