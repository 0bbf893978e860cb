"""The track of a video's ink: the constant-velocity path between walls that is nearest to its centres of mass.

Dimensions: B videos, F frames; A = 2B axes and K candidates in the fit. Positions are (x, y) in pixel indices, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moving_mnist import DatasetConfig, bounce

MAX_OFFSET = 1.0  # pixels from the digit's box centre to its centre of mass, on either axis
SPEED_MARGIN = 1.15  # the track search goes this far above the data's fastest speed
START_STEP = 0.5  # pixels between the starting points of the coarse search
PHASE_STEP = 0.5  # pixels by which neighbouring speeds of the coarse search differ in the last frame
NUM_CANDIDATES = 4  # coarse solutions that are refined, an axis
REFINE_STEPS = 12


@dataclass(frozen=True)
class FittedTrack:
    """The best bouncing track of B videos."""

    track: Tensor  # (B, F, 2) fitted centres of mass
    velocity: Tensor  # (B, 2) in the first frame, pixels a frame
    error: Tensor  # (B, F) pixels from every frame's centre of mass to the track

    @property
    def speed(self) -> Tensor:
        """Fitted speed (B,), pixels a frame."""
        return self.velocity.norm(dim=-1)


def fit_bouncing_track(centres: Tensor, config: DatasetConfig) -> FittedTrack:
    """The constant-velocity track between walls that is nearest, in least squares, to centres of mass (B, F, 2).

    For each axis, c(f) = wall + offset + bounce(start + velocity * f, span): the wall at the box centre's lowest position, (digit_size - 1)
    / 2, an offset of at most `MAX_OFFSET` from there to the glyph's centre of mass, |velocity| at most `SPEED_MARGIN` times
    `config.max_speed`. A grid over start and velocity, with the best offset in closed form, then damped Gauss-Newton steps from the best
    grid points. In float64 on the CPU. Raises ValueError for fewer than 3 frames, which some track always fits."""
    if centres.shape[1] < 3:
        raise ValueError(f"found {centres.shape[1]} frames: expected at least 3 to fit a track")
    wall, span = (config.digit_size - 1) / 2, config.frame_size - config.digit_size
    top_speed = SPEED_MARGIN * config.max_speed
    target = centres.detach().cpu().double().transpose(1, 2).flatten(0, 1) - wall  # (2B, F)
    start, velocity, offset = _refine(target, *_coarse_search(target, span, top_speed), span, top_speed)
    frame = torch.arange(centres.shape[1], dtype=target.dtype)
    position = start.unsqueeze(-1) + velocity.unsqueeze(-1) * frame  # (2B, F)
    fitted = wall + offset.unsqueeze(-1) + bounce(position, span)
    fitted = fitted.unflatten(0, (-1, 2)).transpose(1, 2).float()  # (B, F, 2)
    initial = (velocity * _bounce_slope(start, span)).unflatten(0, (-1, 2)).float()  # (B, 2)
    return FittedTrack(fitted, initial, (centres.cpu().float() - fitted).norm(dim=-1))


def _bounce_slope(position: Tensor, span: float) -> Tensor:
    """Derivative of `bounce`, +1 or -1."""
    return torch.where(torch.remainder(position, 2 * span) < span, 1.0, -1.0).to(position.dtype)


def _coarse_search(target: Tensor, span: float, top_speed: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best K starts of a grid with the best velocity and offset of each, all (A, K), for targets (A, F). The squared error is expanded,
    |r|^2 = |c|^2 - 2 c.m + |m|^2, so that a start is one matrix product."""
    num_frames = target.shape[1]
    frame = torch.arange(num_frames, dtype=target.dtype)
    num_speeds = 2 * int(top_speed * (num_frames - 1) / PHASE_STEP + 1) + 1
    velocities = torch.linspace(-top_speed, top_speed, num_speeds, dtype=target.dtype)
    starts = torch.linspace(0, span, int(span / START_STEP) + 1, dtype=target.dtype)
    found = []  # of every start: error, velocity, offset, (3, A)
    for start in starts:
        model = bounce(start + velocities.unsqueeze(1) * frame, span)  # (V, F)
        mean = target.mean(dim=1, keepdim=True) - model.mean(dim=1)  # (A, V) mean residual
        square = target.square().sum(dim=1, keepdim=True) - 2 * target @ model.T + model.square().sum(dim=1)
        offset = mean.clamp(-MAX_OFFSET, MAX_OFFSET)
        error, index = (square - 2 * num_frames * offset * mean + num_frames * offset.square()).min(dim=1)
        found.append(torch.stack((error, velocities[index], offset.gather(1, index.unsqueeze(1)).squeeze(1))))
    errors, velocity, offset = torch.stack(found, dim=-1)  # (A, S) each
    best = errors.topk(min(NUM_CANDIDATES, len(starts)), dim=1, largest=False).indices  # (A, K)
    return starts[best], velocity.gather(1, best), offset.gather(1, best)


def _refine(
    target: Tensor, start: Tensor, velocity: Tensor, offset: Tensor, span: float, top_speed: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best start, velocity and offset, each (A,), reached from K candidates (A, K) by Levenberg-Marquardt steps: between two bounces
    the track is linear in all three. A step that does not lower the error is not taken, and the next one is damped more."""
    frame = torch.arange(target.shape[1], dtype=target.dtype)
    target = target.unsqueeze(1)  # (A, 1, F)
    low = torch.tensor([-torch.inf, -top_speed, -MAX_OFFSET], dtype=target.dtype)
    x = torch.stack((start, velocity, offset), dim=-1)  # (A, K, 3)
    damping = torch.full(x.shape[:2], 1e-3, dtype=x.dtype)

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        position = x[..., :1] + x[..., 1:2] * frame  # (A, K, F)
        return target - x[..., 2:] - bounce(position, span), _bounce_slope(position, span)

    r, slope = residual(x)
    for _ in range(REFINE_STEPS):
        jacobian = torch.stack((slope, slope * frame, torch.ones_like(slope)), dim=-1)  # (A, K, F, 3)
        normal = jacobian.transpose(-1, -2) @ jacobian  # (A, K, 3, 3)
        ridge = damping[..., None, None] * torch.diag_embed(normal.diagonal(dim1=-2, dim2=-1) + 1e-9)
        step = torch.linalg.solve(normal + ridge, jacobian.transpose(-1, -2) @ r.unsqueeze(-1)).squeeze(-1)
        new_x = torch.maximum(torch.minimum(x + step, -low), low)
        new_r, new_slope = residual(new_x)
        is_better = new_r.square().sum(dim=-1) < r.square().sum(dim=-1)  # (A, K)
        keep = is_better.unsqueeze(-1)
        x, r, slope = torch.where(keep, new_x, x), torch.where(keep, new_r, r), torch.where(keep, new_slope, slope)
        damping = torch.where(is_better, damping / 4, damping * 8)
    best = r.square().sum(dim=-1).argmin(dim=1)
    start, velocity, offset = x[torch.arange(len(x)), best].unbind(dim=-1)
    return start, velocity, offset
