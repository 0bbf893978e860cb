"""Ink: what can be measured in a frame without knowing what it shows: how much, where, and how sharp its edges are.

Dimensions: H = W frame side. Intensities are grey values in [0, 1]. Positions are (x, y) in pixel indices, x to the right and y down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

HAZE = 0.1  # display intensity below which a pixel does not pull the centre of mass
FAINTEST_PEAK = 0.05  # display intensity of the brightest pixel below which a frame has no edges to speak of


def display_intensity(video: Tensor) -> Tensor:
    """Grey values (..., H, W) in [0, 1] of video (..., C, H, W) in [-1, 1]: clamped, channels averaged. Raises ValueError for values that
    are not finite."""
    if not torch.isfinite(video).all():
        raise ValueError("the video has values that are not finite: expected numbers in [-1, 1]")
    return (video.float().clamp(-1, 1).mean(dim=-3) + 1) / 2


def intensity_centres(intensity: Tensor, haze: float = HAZE) -> Tensor:
    """Centres of mass (..., 2) of intensities (..., H, W), counting pixels of at least `haze`; a blank frame gives its middle."""
    weights = torch.where(intensity >= haze, intensity, 0.0)
    mass = weights.sum(dim=(-2, -1)).unsqueeze(-1)
    height, width = intensity.shape[-2:]
    x = (weights.sum(dim=-2) * torch.arange(width, device=weights.device)).sum(dim=-1)
    y = (weights.sum(dim=-1) * torch.arange(height, device=weights.device)).sum(dim=-1)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=weights.device)
    return torch.where(mass == 0, middle, torch.stack((x, y), dim=-1) / mass.clamp_min(HAZE))  # (..., 2)


def intensity_sharpness(intensity: Tensor) -> Tensor:
    """Mean steepness (...,) of the edges in intensities (..., H, W): the share of the peak by which a pixel's neighbour differs.

    sum d^2 / sum d over the differences d between neighbours, in units of the frame's peak; differences below `HAZE` of it are
    background, not edges. So neither the brightness nor the length of the strokes counts; blur lowers it. A blank frame has 0.
    """
    peak = intensity.amax(dim=(-2, -1), keepdim=True)
    padded = functional.pad(intensity, (1, 1, 1, 1))
    across = padded[..., 1:-1, 1:] - padded[..., 1:-1, :-1]  # (..., H, W + 1)
    down = padded[..., 1:, 1:-1] - padded[..., :-1, 1:-1]  # (..., H + 1, W)
    steps = torch.cat((across.flatten(-2), down.flatten(-2)), dim=-1).abs() / peak.clamp_min(FAINTEST_PEAK).flatten(-2)
    steps = torch.where(steps >= HAZE, steps, 0.0)
    return steps.square().sum(dim=-1) / steps.sum(dim=-1).clamp_min(HAZE)
