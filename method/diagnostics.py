"""Figures of a Self-Forcing run's health, from what the generator's loss computes anyway.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor

NOISE_LEVELS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.0)}  # of t; the lower bound is inside
LEAST_PUSH = 1e-12  # mean square of x_0_fake - x_0_real below which a critic that equals the teacher has no lag
STEP_COLUMNS = ("critic_lag", *(f"score_distance_{name}" for name in NOISE_LEVELS))


def mean_by_noise_level(values: Tensor, t: Tensor) -> dict[str, float]:
    """Mean of values (B,) over the videos whose time t (B,) lies in each of `NOISE_LEVELS`; a level without a video is left out."""
    level = sum((t >= low).long() for low, _ in NOISE_LEVELS.values()) - 1  # (B,)
    return {name: values[level == index].mean().item() for index, name in enumerate(NOISE_LEVELS) if (level == index).any()}


def exit_columns(denoising_steps: list[int]) -> tuple[str, ...]:
    """The column of the loss at each exit step, by its timestep: loss_exit_750."""
    return tuple(f"loss_exit_{step}" for step in denoising_steps)


def mean_by_exit_step(terms: Tensor, frame_exits: Tensor, denoising_steps: list[int]) -> dict[str, float]:
    """Mean of a loss's terms over the frames with each exit step; exit steps without a frame are left out.

    terms: (B, F, ...), or (B,) of a loss on whole videos; then the result is empty if the blocks of a video differ in their exit step.
    frame_exits: (B, F), indices into denoising_steps, -1 for clean data."""
    frame_exits = frame_exits.to(terms.device)
    if terms.ndim == 1:
        of_videos = frame_exits.amax(dim=1)
        if ((frame_exits != of_videos[:, None]) & (frame_exits >= 0)).any():
            return {}
        frame_exits = of_videos
    columns = exit_columns(denoising_steps)
    return {columns[index]: terms[frame_exits == index].mean().item() for index in frame_exits.unique().tolist() if index >= 0}


def critic_lag(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> float:
    """The share of the generator's push that is the critic's own error: sum (x_0_fake - x_0) d / sum d^2, d = x_0_fake - x_0_real.

    All (B, ...): new videos of the generator, and what critic and guided teacher predict of them, noised. A critic that keeps up predicts
    E[x_0 | x_t], whose error is orthogonal to every function of x_t, such as d: its lag is 0. With Gaussians that differ in their mean, the
    lag of a critic of an earlier generator is the share of the way to the teacher that it has missed: 1 once the generator has arrived,
    more once it has gone past."""
    push = x_0_fake.float() - x_0_real.float()
    energy = push.square().mean().item()
    return ((x_0_fake.float() - x_0.float()) * push).mean().item() / energy if energy > LEAST_PUSH else 0.0


def score_figures(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor, t: Tensor) -> dict[str, float]:
    """Distance of critic and guided teacher, in all and by noise level, and the critic's lag. x_0, x_0_fake, x_0_real: see `critic_lag`;
    t (B,): the time to which each video was noised."""
    difference = (x_0_fake - x_0_real).detach().abs()
    by_level = mean_by_noise_level(difference.flatten(1).mean(1), t)
    return {
        "score_distance": difference.mean().item(), **{f"score_distance_{name}": value for name, value in by_level.items()},
        "critic_lag": critic_lag(x_0.detach(), x_0_fake.detach(), x_0_real.detach()),
    }
