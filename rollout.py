"""The rollout: how a video is made, block by block with a KV cache (Huang et al. 2025, arXiv 2506.08009, Algorithm 1).

Dimensions: B batch, F frames, C channels, H height, W width; a rollout makes F frames in blocks of
`num_frames_per_block`.

There is one rollout, `rollout_blocks`. Training, generation and evaluation all call it; training only adds an exit step
and says which blocks carry gradient. The bidirectional teacher, which makes all frames at once, has a sampler beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flow_matching import (
    add_noise,
    ancestral_sampler,
    classifier_free_guidance,
    eps_from_velocity,
    euler_sampler,
    sampling_times,
    shift_time,
    timestep_to_time,
    x_0_from_velocity,
)
from tiny_causal_wan import KVCache, PromptContext, TinyCausalWanModel
from training_config import FewStepConfig


@dataclass(frozen=True)
class RolloutPlan:
    """How a block is denoised. times: descending, each in (0, 1]; one forward pass of the network at each.

    fresh_noise: between two times re-noise the predicted x_0 with new noise (few-step models, as in Self-Forcing's
    Algorithm 1); otherwise keep the predicted noise, which is Euler's method.
    context_time: the time in [0, 1] at which finished blocks enter the cache. window_frames: how many frames a block
    may see, itself included; None for all. guidance: weight of classifier-free guidance, 1 for none. clamp_x_0: keep every
    predicted x_0 in [-1, 1], as data are, see `clamp_to_data`.
    """

    times: tuple[float, ...]
    num_frames_per_block: int
    fresh_noise: bool = True
    context_time: float = 0.0
    window_frames: int | None = None
    guidance: float = 1.0
    clamp_x_0: bool = False


def few_step_plan(config: FewStepConfig, window_frames: int | None = None) -> RolloutPlan:
    """The plan of a few-step model: its denoising steps, warped by the time shift."""
    return RolloutPlan(
        warp_steps(config.denoising_steps, config.time_shift), config.num_frames_per_block,
        context_time=config.context_time, window_frames=window_frames, clamp_x_0=config.clamp_x_0,
    )


def warp_steps(denoising_steps: list[int], time_shift: float) -> tuple[float, ...]:
    """Timesteps 1..1000 to shifted times: [1000, 750, 500, 250] at shift 3 are (1, .9, .75, .5)."""
    return tuple(shift_time(timestep_to_time(torch.tensor(denoising_steps)), time_shift).tolist())


def many_step_plan(
    num_steps: int, time_shift: float, num_frames_per_block: int, guidance: float, window_frames: int | None = None,
    context_time: float = 0.0,
) -> RolloutPlan:
    """Euler's method with num_steps steps a block: how a causal network is sampled that was not distilled."""
    times = tuple(sampling_times(num_steps, time_shift)[:-1].tolist())
    return RolloutPlan(times, num_frames_per_block, False, context_time, window_frames, guidance)


def make_noise_streams(seeds: list[int]) -> list[torch.Generator]:
    """One random stream per video, on the CPU: a video's noise depends on its seed alone, not on batch or device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(streams: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, *shape) standard normal, one slice from each stream."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)


def clamp_to_data(x_0: Tensor) -> Tensor:
    """x_0 cut to [-1, 1], with the gradient passed straight through: what the losses see is what is shown, and a value beyond the
    range is still pulled back (static thresholding, arXiv 2205.11487, section 2.3; straight-through, arXiv 1308.3432)."""
    return x_0 + (x_0.clamp(-1, 1) - x_0).detach()


def rollout_blocks(
    model: TinyCausalWanModel, prompt: PromptContext, streams: list[torch.Generator], num_blocks: int, plan: RolloutPlan,
    null_prompt: PromptContext | None = None, exit_steps: list[int] | None = None, first_gradient_block: int | None = None,
    trace: list[list[Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Make a video block by block (Self-Forcing, Algorithm 1); yields x_0 of each block, (B, F_block, C, H, W).

    exit_steps: per block, the index into `plan.times` whose prediction is the result; None for the last.
    first_gradient_block: from this block on, the exit step's forward pass carries gradient; None for no gradient.
    null_prompt: the unconditional branch, needed where plan.guidance is not 1. trace: collects, for each block, its x_t
    at every time of the walk.
    """
    if plan.guidance != 1.0:
        if null_prompt is None:
            raise ValueError(f"guidance {plan.guidance} needs the null prompt")
        prompt = prompt.concatenate(null_prompt)
    device = next(model.parameters()).device
    config = model.config
    shape = (plan.num_frames_per_block, config.channels, config.frame_size, config.frame_size)
    cache = model.new_cache(plan.window_frames)
    for block in range(num_blocks):
        carries_gradient = first_gradient_block is not None and block >= first_gradient_block
        exit_step = len(plan.times) - 1 if exit_steps is None else exit_steps[block]
        x_t = draw_noise(streams, shape, device)
        walk: list[Tensor] = []
        for step in range(exit_step + 1):
            walk.append(x_t)
            t = torch.full(x_t.shape[:2], plan.times[step], device=device)
            # Only the exit step's pass builds a graph: the steps before it are inference, simulated.
            with torch.set_grad_enabled(carries_gradient and step == exit_step):
                v = _guided_velocity(model, x_t, t, prompt, cache, plan.guidance)
                x_0 = x_0_from_velocity(x_t, v, t)
                if plan.clamp_x_0:
                    x_0 = clamp_to_data(x_0)
            if step < exit_step:
                eps = draw_noise(streams, shape, device) if plan.fresh_noise else eps_from_velocity(x_t, v, t)
                x_t = add_noise(x_0, eps, torch.full_like(t, plan.times[step + 1]))
        if trace is not None:
            trace.append(walk)
        yield x_0
        if block + 1 < num_blocks:
            _write_context(model, x_0.detach(), prompt, cache, plan, streams)


def _guided_velocity(
    model: TinyCausalWanModel, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache, guidance: float
) -> Tensor:
    if guidance == 1.0:
        return model.forward_cached(x_t, t, prompt, cache)
    cond, uncond = model.forward_cached(torch.cat([x_t, x_t]), torch.cat([t, t]), prompt, cache).chunk(2)
    return classifier_free_guidance(cond, uncond, guidance)


def _write_context(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, cache: KVCache, plan: RolloutPlan, streams: list[torch.Generator]
) -> None:
    """Run the finished block once more at the context time to append its keys and values."""
    t = torch.full(x_0.shape[:2], plan.context_time, device=x_0.device)
    x = x_0 if plan.context_time == 0 else add_noise(x_0, draw_noise(streams, tuple(x_0.shape[1:]), x_0.device), t)
    if plan.guidance != 1.0:
        x, t = torch.cat([x, x]), torch.cat([t, t])
    model.write_cache(x, t, prompt, cache)


@dataclass(frozen=True)
class BidirectionalPlan:
    """How the teacher is sampled: all frames at once, in num_steps guided steps. guidance: 1 for none. eta: how much of a
    step's noise is fresh, see `fresh_share`: 0 is Euler's method, 1 ancestral sampling."""

    num_steps: int
    time_shift: float
    guidance: float
    eta: float = 0.0


@torch.no_grad()
def sample_bidirectional(
    model: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[torch.Generator], num_frames: int,
    plan: BidirectionalPlan, trace: list[Tensor] | None = None,
) -> Tensor:
    """The teacher's own sampler. Returns (B, F, C, H, W). trace: collects x_t at every time at which the network is asked."""
    both = prompt.concatenate(null_prompt)

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        if trace is not None:
            trace.append(x)
        if plan.guidance == 1.0:
            return model.forward_bidirectional(x, t, prompt)
        cond, uncond = model.forward_bidirectional(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return classifier_free_guidance(cond, uncond, plan.guidance)

    config = model.config
    shape = (num_frames, config.channels, config.frame_size, config.frame_size)
    draw, times = partial(draw_noise, streams, shape, next(model.parameters()).device), sampling_times(plan.num_steps, plan.time_shift)
    if plan.eta == 0:
        return euler_sampler(velocity_fn, draw(), times)
    return ancestral_sampler(velocity_fn, draw(), times, plan.eta, draw)
