"""Few-step starts for a causal student: regression on ODE trajectories, and consistency distillation.

Dimensions: B batch, F frames, C channels, H height, W width, K blocks, S denoising steps of the student.

Both need a teacher that is sampled in many steps. Where it is a causal one that sees clean blocks, its targets depend
on nothing that the student cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamic_video_sf import rollout_blocks, sample_bidirectional
from machine.batch_random import BatchRandom
from method.flow_matching import add_noise, classifier_free_guidance, expand_time, sampling_times, x_0_from_velocity
from method.plans import BidirectionalPlan, many_step_plan
from network.attention import WHOLE_PAST, ContextWindow
from tiny_causal_wan import PromptContext, TinyCausalWanModel


@dataclass(frozen=True)
class Trajectory:
    """ODE trajectories of a teacher: x_t (S, B, F, C, H, W) at times (S,), and x_0 (B, F, C, H, W) where they end.

    Those of a bidirectional teacher have their end, at time 0, among the S too, see `ode_regression_loss`.
    """

    x_t: Tensor
    times: Tensor
    x_0: Tensor


@torch.no_grad()
def ode_trajectory(
    teacher: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[np.random.Generator], num_frames: int,
    num_frames_per_block: int, num_steps: int, kept_steps: list[int], time_shift: float, guidance: float, is_causal: bool,
    context: ContextWindow = WHOLE_PAST,
) -> Trajectory:
    """Euler trajectories of the guided teacher in num_steps steps; those of the steps in kept_steps are handed out.

    is_causal: block by block, each from the clean blocks before it; otherwise all frames at once.
    """
    if is_causal:
        plan = many_step_plan(num_steps, time_shift, num_frames_per_block, guidance, context)
        walks: list[list[Tensor]] = []
        num_blocks = len(context.block_sizes(num_frames, num_frames_per_block))
        x_0 = torch.cat(list(rollout_blocks(teacher, prompt, streams, num_blocks, plan, null_prompt, trace=walks)), dim=1)
        trace = [torch.cat(blocks, dim=1) for blocks in zip(*walks, strict=True)]
    else:
        trace = []
        x_0 = sample_bidirectional(
            teacher, prompt, null_prompt, streams, num_frames, BidirectionalPlan(num_steps, time_shift, guidance), trace
        )
    times, x_t = sampling_times(num_steps, time_shift)[kept_steps], [trace[step] for step in kept_steps]
    if not is_causal:
        times, x_t = torch.cat([times, times.new_zeros(1)]), [*x_t, x_0]
    return Trajectory(torch.stack(x_t), times.to(x_0.device), x_0)


def nearest_steps(num_steps: int, time_shift: float, times: tuple[float, ...]) -> list[int]:
    """Which of a trajectory's num_steps steps start nearest to these times: at them, unless the steps are so many that `sampling_times`
    spreads them otherwise."""
    grid = sampling_times(num_steps, time_shift)[:-1]
    return [int((grid - time).abs().argmin()) for time in times]


def draw_step_orders(num_steps: int, batch_size: int, num_blocks: int, generator: torch.Generator) -> Tensor:
    """(S, B, K): for every block an order of the S steps. Row i is one training input: each block at a step of its own,
    and over all rows each block meets each step once."""
    return torch.rand((num_steps, batch_size, num_blocks), generator=generator).argsort(0)


def ode_regression_loss(
    student: TinyCausalWanModel, trajectory: Trajectory, steps: Tensor, prompt: PromptContext, num_frames_per_block: int, is_causal: bool,
    context: ContextWindow = WHOLE_PAST,
) -> Tensor:
    """mean |G(x_t, t) - x_0|^2 along the teacher's trajectories (CausVid, arXiv 2412.07772, section 4.3).

    steps (B, K): which of the trajectory's times each block is at. is_causal: the student sees the clean blocks from
    which the teacher went on; otherwise, as the original, the earlier blocks at their own times. Among these is 0, at which inference
    writes the cache: there x_0 = x_t - t v is the target itself, so that such a block is context and adds neither loss nor gradient.
    """
    sizes = torch.tensor(context.block_sizes(trajectory.x_0.shape[1], num_frames_per_block))
    frame_steps = steps.repeat_interleave(sizes, 1).to(trajectory.times.device)  # (B, F)
    t = trajectory.times[frame_steps]
    x_t = trajectory.x_t.gather(0, expand_time(frame_steps, trajectory.x_0).expand_as(trajectory.x_0)[None])[0]
    if is_causal:
        v = student.forward_teacher_forced(x_t, t, trajectory.x_0, prompt, num_frames_per_block, context)
    else:
        v = student.forward_block_causal(x_t, t, prompt, num_frames_per_block, context)
    return (x_0_from_velocity(x_t, v, t) - trajectory.x_0).square().mean()


@dataclass(frozen=True)
class TeacherPrompts:
    """One batch of prompts, and the null prompt, as the teacher encodes them."""

    cond: PromptContext
    null: PromptContext


def consistency_loss(
    student: TinyCausalWanModel, target: TinyCausalWanModel, teacher: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext,
    target_prompt: PromptContext, teacher_prompts: TeacherPrompts, num_frames_per_block: int, times: Tensor, guidance: float,
    random: BatchRandom, context: ContextWindow = WHOLE_PAST,
) -> Tensor:
    """mean |f(x_t, t) - f_target(x_s, s)|^2 with f the prediction of x_0 (consistency distillation, arXiv 2303.01469, Eq. 7).

    s < t are neighbours in `times`, descending from 1 to 0, drawn for each block of the real videos x_0; x_s is one
    Euler step of the guided teacher from x_t. target is the student's moving average. All three see the clean blocks of
    x_0 before the block. At s = 0 the velocity does not count and f is x_s: the boundary condition holds by itself.
    """
    sizes = torch.tensor(context.block_sizes(x_0.shape[1], num_frames_per_block))
    index = random.draw(len(x_0), lambda total: torch.randint(len(times) - 1, (total, len(sizes)), generator=random.generator))
    index = index.repeat_interleave(sizes, 1)  # (B, F)
    t, s = times[index].to(x_0.device), times[index + 1].to(x_0.device)  # (B, F)
    x_t = add_noise(x_0, random.normal_like(x_0), t)
    with torch.no_grad():  # teacher and target are constants here
        cond, null = (
            teacher.forward_teacher_forced(x_t, t, x_0, encoded, num_frames_per_block, context)
            for encoded in (teacher_prompts.cond, teacher_prompts.null)
        )
        x_s = x_t + expand_time(s - t, x_t) * classifier_free_guidance(cond, null, guidance)
        goal = x_0_from_velocity(x_s, target.forward_teacher_forced(x_s, s, x_0, target_prompt, num_frames_per_block, context), s)
    v = student.forward_teacher_forced(x_t, t, x_0, prompt, num_frames_per_block, context)
    return (x_0_from_velocity(x_t, v, t) - goal).square().mean()
