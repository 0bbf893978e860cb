"""Rectified flow: the path's algebra, time shift, time sampling, guidance and the Euler sampler. No networks here.

Conventions of the whole project
    Video        (B, F, C, H, W): batch, frames, channels, height, width; values in [-1, 1], (x + 1) / 2 for display.
    Blocks       F is a multiple of `num_frames_per_block`; a video is generated block by block.
    Path         x_t = (1 - t) x_0 + t eps, with t in [0, 1]: t = 0 is data, t = 1 is noise (Liu et al., arXiv 2209.03003).
    Velocity     v = dx_t/dt = eps - x_0, so x_0 = x_t - t v.
    Time         one t per frame, shape (B, F), float32. Users write Wan-style timesteps 0..1000, converted once
                 (`method.plans.warp_steps`).
    Time shift   t' = s t / (1 + (s - 1) t), s = 1 for none (Esser et al., arXiv 2403.03206, Eq. 23).
    Guidance     x_cfg = x_uncond + w (x_cond - x_uncond): w = 1 means no guidance. The public Self-Forcing code writes
                 x_cond + w' (x_cond - x_uncond): its w' equals w - 1 here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

VELOCITY_TIME_FLOOR = 0.05  # below this t a velocity made from a predicted x_0 stops growing like 1 / t


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """View t (B, F) so that it broadcasts against x (B, F, C, H, W)."""
    if t.shape != x.shape[:2]:
        raise ValueError(f"t has shape {tuple(t.shape)}: expected one time per frame, {tuple(x.shape[:2])}")
    return t.reshape(*t.shape, *(1,) * (x.ndim - 2))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps (arXiv 2209.03003, Eq. 1, with time reversed). x_0, eps (B, F, C, H, W); t (B, F)."""
    t = expand_time(t, x_0)
    return (1 - t) * x_0 + t * eps


def x_0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = x_t - t v."""
    return x_t - expand_time(t, x_t) * v


def eps_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps = x_t + (1 - t) v."""
    return x_t + (1 - expand_time(t, x_t)) * v


def velocity_from_x_0(x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x_0) / max(t, VELOCITY_TIME_FLOOR): exact from the floor on, bounded below it."""
    return (x_t - x_0) / expand_time(t, x_t).clamp(min=VELOCITY_TIME_FLOOR)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t) (arXiv 2403.03206, Eq. 23): moves times toward noise for s > 1; keeps 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def sample_time(shape: tuple[int, ...], shift: float, generator: torch.Generator) -> Tensor:
    """Training times: uniform in [0, 1), then shifted. float32, on the generator's device."""
    return shift_time(torch.rand(shape, generator=generator, device=generator.device), shift)


def even_times(shape: tuple[int, ...], shift: float, generator: torch.Generator) -> Tensor:
    """Training times of one batch: each uniform in [0, 1), evenly spaced in the order of their flat index, then shifted."""
    number = math.prod(shape)
    first = torch.rand((), generator=generator, device=generator.device)
    return shift_time((torch.arange(number, device=generator.device) + first).reshape(shape) / number, shift)


def sampling_times(num_steps: int, shift: float) -> Tensor:
    """The num_steps + 1 times of a sampler, float32, from 1 to 0, distinct and uniform before the shift. The last step starts at
    VELOCITY_TIME_FLOOR or above: from below it a velocity would not lead to x_0. If the uniform grid goes below, the steps before the last
    are uniform between 1 and the floor."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: expected at least 1")
    times = shift_time(torch.linspace(1, 0, num_steps + 1), shift)
    if times[-2] >= VELOCITY_TIME_FLOOR:
        return times
    floor = unshift_time(torch.tensor(VELOCITY_TIME_FLOOR), shift).item()
    times = shift_time(torch.linspace(1, floor, num_steps), shift).clamp(min=VELOCITY_TIME_FLOOR)  # against rounding
    return torch.cat([times, torch.zeros(1)])


def classifier_free_guidance(cond: Tensor, uncond: Tensor, weight: float | Tensor) -> Tensor:
    """uncond + w (cond - uncond) (Ho and Salimans, arXiv 2207.12598, Eq. 6, whose w is w - 1 here), of v or of x_0. weight: a number, or a
    tensor that broadcasts against cond."""
    return uncond + weight * (cond - uncond)


def projected_guidance(cond: Tensor, uncond: Tensor, weight: float | Tensor, direction: Tensor, kept: float) -> Tensor:
    """`classifier_free_guidance` that keeps a share, 0 to 1, of what it adds to each video along a direction (projected guidance, arXiv
    2410.02416, section 4). All (B, F, C, H, W). Along the predicted ink, x_0 + 1, guidance makes strokes bolder; across it, it makes them
    obey the prompt."""
    added = cond - uncond
    share = (added * direction).sum((1, 2, 3, 4), keepdim=True) / direction.square().sum((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
    return cond + (weight - 1) * (added - (1 - kept) * share * direction)


def interval_weight(t: Tensor, weight: float, interval: list[float]) -> Tensor:
    """w where low <= t <= high, else 1 (Kynkaanniemi et al., arXiv 2404.07724, Eq. 6): guidance in some noise levels only."""
    low, high = interval
    return torch.where((t >= low) & (t <= high), weight, 1.0)


def euler_sampler(velocity_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """Integrate dx/dt = velocity_fn(x, t) along the descending times by Euler's method: x (B, F, C, H, W) from times[0] to times[-1].
    velocity_fn takes x and one time per frame (B, F)."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity_fn(x, t.to(x).expand(x.shape[:2]))
        x = x + (t_next - t).to(x) * v
    return x


def fresh_share(t: Tensor, t_next: Tensor, eta: float) -> Tensor:
    """Standard deviation of the fresh noise over that of all noise in a step from t to t_next, 0 <= t_next <= t <= 1, t_next < 1.

    eta sqrt(1 - (a_t s_next / (a_next s_t))^2) with a = 1 - t, s = t: DDIM's eta (arXiv 2010.02502, Eq. 16); 0 is the ODE, 1 ancestral."""
    return eta * (1 - ((1 - t) * t_next / ((1 - t_next) * t)).square()).sqrt()


def ancestral_sampler(
    velocity_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, eta: float, draw: Callable[[], Tensor]
) -> Tensor:
    """As `euler_sampler`, but part of every step's noise is fresh (DDIM, arXiv 2010.02502, Eq. 12): later steps can mend what earlier ones
    got wrong. draw returns standard normal noise in the shape of x, and is called only if some is needed."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        here, there = t.to(x).expand(x.shape[:2]), t_next.to(x).expand(x.shape[:2])
        v = velocity_fn(x, here)
        x_0, eps = x_0_from_velocity(x, v, here), eps_from_velocity(x, v, here)
        share = fresh_share(t, t_next, eta).to(x)
        if share > 0 and t_next > 0:
            eps = (1 - share.square()).sqrt() * eps + share * draw()
        x = add_noise(x_0, eps, there)
    return x
