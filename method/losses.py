"""Losses: flow matching's regression on data, and Self-Forcing's three between distributions of videos (arXiv 2506.08009, Table 2): DMD,
score identity distillation (SiD) and the relativistic GAN. Nothing here draws random numbers.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from method.flow_matching import expand_time, x_0_from_velocity

NORMALISER_FLOOR = 1e-3  # of mean |x_0 - x_0_real|: no division by zero on a perfect sample


def x_0_prediction_loss(
    v: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, time_floor: float, frame_weight: Tensor | None = None,
    num_counted: Tensor | None = None,
) -> Tensor:
    """Mean of |x_0_hat - x_0|^2 / max(t, time_floor)^2, with x_0_hat = x_t - t v; a scalar.

    For t >= time_floor this is flow matching's |v_hat - v|^2 (arXiv 2210.02747, Eq. 14); below it the weight stops growing. frame_weight
    (B, F) selects the frames that count. num_counted: what their sum is divided by; their number if not given."""
    error = (x_0_from_velocity(x_t, v, t) - x_0) / expand_time(t, x_t).clamp(min=time_floor)
    per_frame = error.square().mean(dim=(2, 3, 4))  # (B, F)
    if frame_weight is None:
        return per_frame.mean()
    return (per_frame * frame_weight).sum() / (frame_weight.sum() if num_counted is None else num_counted).clamp(min=1)


def dmd_gradient(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """(x_0_fake - x_0_real) / mean |x_0 - x_0_real|, the mean over each sample, all (B, ...): points away from the teacher's distribution.
    DMD's Eqs. 7 and 8 (arXiv 2311.18828) but for their factor alpha_t = 1 - t, which the public code of DMD2 and Self-Forcing drops."""
    return (x_0_fake - x_0_real) / distance_to_teacher(x_0, x_0_real)


def distance_to_teacher(x_0: Tensor, x_0_real: Tensor) -> Tensor:
    """mean |x_0 - x_0_real| over each sample (B, ...), at least `NORMALISER_FLOOR`; shaped to divide (B, ...)."""
    distance = (x_0 - x_0_real).abs().flatten(1).mean(1).clamp(min=NORMALISER_FLOOR)
    return distance.view(-1, *(1,) * (x_0.ndim - 1))


def dmd_loss(x_0: Tensor, gradient: Tensor) -> Tensor:
    """0.5 (x_0 - stop_grad(x_0 - gradient))^2, (B, ...): the derivative of its mean by x_0 is gradient / numel (arXiv 2405.14867)."""
    target = (x_0 - gradient).detach()  # the scores are constants here: no gradient into teacher or critic
    return 0.5 * (x_0 - target).square()


def sid_loss(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor, alpha: float) -> Tensor:
    """[(x_0_real - x_0_fake)(x_0_real - x_0) - alpha (x_0_real - x_0_fake)^2] / mean |x_0 - x_0_real|, all (B, ...).

    SiD in its data-prediction form (arXiv 2404.04057, section 4: (1 - alpha) |f_real - f_fake|^2 + (f_real - f_fake)(f_fake - x_g), which
    expands to this). Unlike DMD it is differentiated through both estimates, which are functions of x_0; the divisor is a constant."""
    difference = x_0_real - x_0_fake
    loss = difference * (x_0_real - x_0) - alpha * difference.square()
    return loss / distance_to_teacher(x_0, x_0_real).detach()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(better - worse)) of pairs of logits (B,) (RpGAN, as in R3GAN, arXiv 2501.05441, Eq. 2): better are the real videos for
    the discriminator, the generated ones for the generator."""
    return F.softplus(worse - better)


def gradient_penalty(logits: Callable[[Tensor], Tensor], x: Tensor, logits_at_x: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """mean [(D(x + sigma eps) - D(x)) / sigma]^2: the expected |grad D(x)|^2 for small sigma, without a second derivative (arXiv
    2501.08316). R1 for a real x, R2 for a generated one (arXiv 2501.05441, section 2). eps: standard normal, in the shape of x."""
    return ((logits(x + sigma * eps) - logits_at_x) / sigma).square().mean()


def discriminator_loss(
    logits: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, eps_real: Tensor, eps_fake: Tensor, sigma: float, penalty_weight: float
) -> Tensor:
    """The relativistic loss plus the weighted R1 and R2 (R3GAN, arXiv 2501.05441, section 2); eps_real, eps_fake, sigma: see
    `gradient_penalty`."""
    at_real, at_fake = logits(real), logits(fake)
    r_1 = gradient_penalty(logits, real, at_real, eps_real, sigma)
    r_2 = gradient_penalty(logits, fake, at_fake, eps_fake, sigma)
    return relativistic_loss(at_real, at_fake).mean() + penalty_weight * (r_1 + r_2)
