"""Losses between distributions of videos: DMD, score identity distillation, and the relativistic GAN with its discriminator.

Dimensions: B batch, F frames, T rows of temporal patches, N tokens a row, D model width.

The three that Self-Forcing was shown with (arXiv 2506.08009, Table 2). Two scores, or one discriminator, look at a
noised video; all that is known of them here is what they answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batch_share import BatchShare, share_or_whole
from tiny_causal_wan import PromptContext, TinyCausalWanModel

Finding = tuple[bool, str]  # of a self-test: whether it holds, and what was seen

NORMALISER_FLOOR = 1e-3  # of mean |x_0 - x_0_real|: no division by zero on a perfect sample


@dataclass(frozen=True)
class Verdict:
    """What a generator's loss was made of, detached: the figures of a run's health are taken from it (`health`).

    terms: their mean is the loss; (B, F, C, H, W), or (B,) where a discriminator judges whole videos. t: (B,) noise levels.
    figures: scalars of this kind of loss. x_0, x_0_fake, x_0_real: the videos (B, F, C, H, W) and what critic and guided teacher
    made of them, noised; None with a discriminator, which denoises nothing.
    """

    terms: Tensor
    t: Tensor
    figures: dict[str, float]
    x_0: Tensor | None = None
    x_0_fake: Tensor | None = None
    x_0_real: Tensor | None = None


def dmd_gradient(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """(x_0_fake - x_0_real) / mean |x_0 - x_0_real|, the mean over each sample (DMD, arXiv 2311.18828, Eqs. 7 and 8).

    All (B, ...). The difference of the two scores' denoised estimates points away from the teacher's distribution.
    """
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
    """[(x_0_real - x_0_fake)(x_0_real - x_0) - alpha (x_0_real - x_0_fake)^2] / mean |x_0 - x_0_real|, all (B, ...); its mean counts.

    Score identity distillation in its data-prediction form (SiD, arXiv 2404.04057, section 4: (1 - alpha) |f_real - f_fake|^2 +
    (f_real - f_fake)(f_fake - x_g), the same after expanding). Unlike DMD it is differentiated through both estimates,
    which are functions of x_0. The divisor is a constant.
    """
    difference = x_0_real - x_0_fake
    loss = difference * (x_0_real - x_0) - alpha * difference.square()
    return loss / distance_to_teacher(x_0, x_0_real).detach()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(better - worse)) of pairs of logits (B,), whose mean counts (RpGAN, as in R3GAN, arXiv 2501.05441, Eq. 2).

    The discriminator lowers it with real videos as the better ones, the generator with its own.
    """
    return F.softplus(worse - better)


def gradient_penalty(
    logits: Callable[[Tensor], Tensor], x: Tensor, logits_at_x: Tensor, sigma: float, generator: torch.Generator,
    share: BatchShare | None = None,
) -> Tensor:
    """mean [(D(x + sigma eps) - D(x)) / sigma]^2: the expected |grad D(x)|^2 for small sigma, without a second derivative.

    R1 where x is real, R2 where it is generated (arXiv 2501.05441, section 2); the finite difference is arXiv 2501.08316's.
    """
    eps = share_or_whole(share, len(x)).draw_normal(tuple(x.shape[1:]), generator).to(x)
    return ((logits(x + sigma * eps) - logits_at_x) / sigma).square().mean()


def discriminator_loss(
    logits: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, penalty_weight: float, sigma: float, generator: torch.Generator,
    share: BatchShare | None = None,
) -> Tensor:
    """The relativistic loss, real videos the better ones, plus the weighted R1 and R2 (R3GAN, arXiv 2501.05441, section 2)."""
    at_real, at_fake = logits(real), logits(fake)
    r_1 = gradient_penalty(logits, real, at_real, sigma, generator, share)
    r_2 = gradient_penalty(logits, fake, at_fake, sigma, generator, share)
    return relativistic_loss(at_real, at_fake).mean() + penalty_weight * (r_1 + r_2)


class Discriminator(nn.Module):
    """The critic's network with a small head on its last tokens, in place of the velocity's: one logit a noised video."""

    def __init__(self, backbone: TinyCausalWanModel):
        super().__init__()
        width = backbone.config.width
        self.backbone = backbone
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """Logits (B,) of noised videos x_t (B, F, C, H, W) at times t (B, F); higher is more real."""
        return self.head(self.backbone.forward_features(x_t, t, prompt)).float().mean(dim=(1, 2, 3))  # of (B, T, N, 1)


def check_gaussians(random: torch.Generator) -> list[Finding]:
    """DMD between N(m_fake, s^2) and N(m_real, s^2), whose denoised estimates are known exactly."""
    m_fake, m_real, s, t = 0.8, -0.5, 0.6, 0.7
    x_0 = (m_fake + s * torch.randn((64, 3, 1, 4, 4), generator=random, dtype=torch.float64)).requires_grad_()
    x_t = (1 - t) * x_0.detach() + t * torch.randn(x_0.shape, generator=random, dtype=torch.float64)
    shrink = s**2 * (1 - t) / ((1 - t) ** 2 * s**2 + t**2)
    x_0_fake, x_0_real = (m + shrink * (x_t - (1 - t) * m) for m in (m_fake, m_real))  # E[x_0 | x_t]
    loss = dmd_loss(x_0, dmd_gradient(x_0.detach(), x_0_fake, x_0_real)).mean()
    (gradient,) = torch.autograd.grad(loss, x_0)
    scale = (x_0.detach() - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    closed_form = (m_fake - m_real) * t**2 / ((1 - t) ** 2 * s**2 + t**2) / scale / x_0.numel()
    error = ((gradient - closed_form) / closed_form).abs().max().item()
    start, stepped = x_0.mean().item(), (x_0 - 0.5 * x_0.numel() * gradient).mean().item()
    return [
        (error < 1e-12, f"on Gaussians the DMD gradient is the closed form to {error:.1e}"),
        (m_real < stepped < start, f"a step moves their mean from {start:.2f} to {stepped:.2f}, toward {m_real}"),
    ]
