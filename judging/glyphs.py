"""The shapes of digits: how varied a set of videos is within each class, and how near its shapes are to real ones.

Dimensions: B videos, F frames, N frames or videos, H, W frame, S side of a glyph, K components. Intensities are grey values in [0, 1].

The features of `video_judge` name digit, direction and speed and forget style: one image a class, moving exactly, is no further from
real video in them than real video itself. A glyph keeps the style: the digit of a video, recentred and averaged over its frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from digits.mnist import NUM_CLASSES
from judging.distribution import RESAMPLES, figure, frechet_figure, resampled_counts
from judging.ink import intensity_centres
from machine.seeds import Purpose, torch_generator

LEAST_STROKE = 0.3  # intensity of a stroke: what is fainter must not move the window, or noise would look like variety
LEAST_GLYPHS = 3  # of a class, for a spread
NUM_COMPONENTS = 24  # of the code in which distances are taken


def recentre(intensity: Tensor, side: int) -> Tensor:
    """Windows (N, side, side) of intensities (N, H, W) with the strokes' centre of mass in the middle, by bilinear interpolation; zero
    outside the frame."""
    height, width = intensity.shape[-2:]
    offset = torch.arange(side, device=intensity.device) - (side - 1) / 2
    centre = intensity_centres(intensity, LEAST_STROKE)  # (N, 2)
    x = 2 * (centre[:, :1] + offset) / (width - 1) - 1  # (N, side), in [-1, 1] over the frame
    y = 2 * (centre[:, 1:] + offset) / (height - 1) - 1
    grid = torch.stack((x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)), dim=-1)  # (N, side, side, 2)
    return functional.grid_sample(intensity[:, None], grid, align_corners=True)[:, 0]


def relative_spread(glyphs: Tensor, counts: Tensor | None = None) -> Tensor:
    """The variance of glyphs (N, S, S), summed over pixels, over the squared norm of their mean: (R,) for R weightings counts (R, N), (1,)
    without. Relative, so that a factor on all ink changes nothing."""
    counts = torch.ones(1, len(glyphs), dtype=torch.float64) if counts is None else counts
    flat, total = glyphs.flatten(1).double(), counts.sum(dim=1)
    mean = counts @ flat / total[:, None]  # (R, S S)
    norm = mean.square().sum(dim=1)
    variance = (counts @ flat.square().sum(dim=1) / total - norm) * total / (total - 1)
    return variance.clamp_min(0) / norm.clamp_min(1e-12)


def glyph_diversity(
    glyphs: Tensor, digits: Tensor, reference: Tensor, reference_digits: Tensor, seed: int = 0
) -> dict[str, float | list]:
    """The spread of glyphs (N, S, S) within their classes, digits (N,), over that of real ones, averaged over the classes: 1 is as varied
    as real digits, 0 one glyph a class. Classes with fewer than `LEAST_GLYPHS` on either side are left out; empty if all are. The interval
    is a bootstrap over the videos of each class."""
    rng = torch_generator(seed, Purpose.BOOTSTRAP)
    ratios, resampled = [], []
    for digit in range(NUM_CLASSES):
        found, real = glyphs[digits == digit], reference[reference_digits == digit]
        if min(len(found), len(real)) >= LEAST_GLYPHS:
            floor = relative_spread(real)
            ratios.append(relative_spread(found) / floor)
            resampled.append(relative_spread(found, resampled_counts(len(found), RESAMPLES, rng)) / floor)
    return figure("glyph_diversity", torch.cat(ratios).mean(), torch.stack(resampled).nanmean(dim=0)) if ratios else {}


class GlyphCode:
    """The leading principal components of real glyphs (N, S, S), N > `NUM_COMPONENTS`."""

    def __init__(self, glyphs: Tensor):
        flat = glyphs.flatten(1).double()
        self.mean = flat.mean(dim=0)  # (S S,)
        self.components = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:NUM_COMPONENTS].T  # (S S, K)

    def encode(self, glyphs: Tensor) -> Tensor:
        """(N, K) of glyphs (N, S, S), float64."""
        return (glyphs.flatten(1).double() - self.mean) @ self.components


def glyph_frechet(code: GlyphCode, glyphs: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float | list]:
    """Frechet distance between glyphs (N, S, S) and real ones (M, S, S), in the code, with a bootstrap interval over the N."""
    counts = resampled_counts(len(glyphs), RESAMPLES, torch_generator(seed, Purpose.BOOTSTRAP))
    return frechet_figure("glyph_frechet", code.encode(glyphs), code.encode(reference), counts)
