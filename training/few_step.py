"""Few-step starts for a causal student: regression on ODE trajectories of a teacher, and consistency distillation.

Dimensions: B batch, F frames, C channels, H height, W width, K blocks, S denoising steps of the student.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamic_video_sf import Text, make_noise_streams, rollout_blocks, sample_bidirectional
from machine.batch_random import BatchRandom
from machine.runtime import Runtime
from method.flow_matching import add_noise, classifier_free_guidance, expand_time, sampling_times, x_0_from_velocity
from method.plans import BidirectionalPlan, few_step_plan, many_step_plan
from method.settings import CausalConsistencyConfig, CausalODEConfig
from network.text_encoder import NULL_PROMPT
from network.weights import exponential_decay, update_average
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training.config import Config
from training.data import draw_num_frames, open_data
from training.distributed import ONE_PROCESS, Processes, mean_figures
from training.resumable import Sampler, Stage, many_step_samplers
from training.sharding import shard_blocks
from training.stages import rate_factor
from training.starting_networks import check_is_bidirectional, load_teacher


@dataclass(frozen=True)
class Trajectory:
    """ODE trajectories of a teacher: x_t (S, B, F, C, H, W) at times (S,), and x_0 (B, F, C, H, W) where they end. Those of a bidirectional
    teacher have their end, at time 0, among the S too, see `ode_regression_loss`."""

    x_t: Tensor
    times: Tensor
    x_0: Tensor


@torch.no_grad()
def ode_trajectory(
    teacher: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[np.random.Generator], num_frames: int,
    config: CausalODEConfig,
) -> Trajectory:
    """Euler trajectories of the guided teacher, at the points nearest to the student's times. A causal teacher makes them block by block,
    each from the clean blocks before it: the targets depend on nothing that the student cannot see. A bidirectional one makes all frames
    at once."""
    num_steps, shift, block = config.trajectory_steps, config.time_shift, config.num_frames_per_block
    trace: list[Tensor] = []
    if config.trajectory_teacher == "causal":
        plan = many_step_plan(num_steps, shift, block, config.guidance, config.context)
        walks: list[list[Tensor]] = []
        num_blocks = len(config.context.block_sizes(num_frames, block))
        x_0 = torch.cat(list(rollout_blocks(teacher, prompt, streams, num_blocks, plan, null_prompt, trace=walks)), dim=1)
        trace = [torch.cat(blocks, dim=1) for blocks in zip(*walks, strict=True)]
    else:
        at_once = BidirectionalPlan(num_steps, shift, config.guidance)
        x_0 = sample_bidirectional(teacher, prompt, null_prompt, streams, num_frames, at_once, trace)
    steps = nearest_steps(num_steps, shift, few_step_plan(config).times)
    times, x_t = sampling_times(num_steps, shift)[steps], [trace[step] for step in steps]
    if config.trajectory_teacher == "bidirectional":
        times, x_t = torch.cat([times, times.new_zeros(1)]), [*x_t, x_0]
    return Trajectory(torch.stack(x_t), times.to(x_0.device), x_0)


def nearest_steps(num_steps: int, time_shift: float, times: tuple[float, ...]) -> list[int]:
    """The steps of a trajectory that start nearest to these times: at them, unless `sampling_times` spreads many steps otherwise."""
    grid = sampling_times(num_steps, time_shift)[:-1]
    return [int((grid - time).abs().argmin()) for time in times]


def ode_regression_loss(
    student: TinyCausalWanModel, trajectory: Trajectory, steps: Tensor, prompt: PromptContext, config: CausalODEConfig
) -> Tensor:
    """mean |G(x_t, t) - x_0|^2 along the teacher's trajectories (CausVid, arXiv 2412.07772, section 4.3).

    steps (B, K): which of the trajectory's times each block is at. With a causal teacher the student sees the clean blocks that the teacher
    continued; otherwise, as the original, the earlier blocks at their own times. Among these is 0, at which inference writes the cache:
    there x_0 = x_t - t v is the target itself, so such a block is context and adds neither loss nor gradient.
    """
    block, context = config.num_frames_per_block, config.context
    sizes = torch.tensor(context.block_sizes(trajectory.x_0.shape[1], block))
    frame_steps = steps.repeat_interleave(sizes, 1).to(trajectory.times.device)  # (B, F)
    t = trajectory.times[frame_steps]
    x_t = trajectory.x_t.gather(0, expand_time(frame_steps, trajectory.x_0).expand_as(trajectory.x_0)[None])[0]
    if config.trajectory_teacher == "causal":
        v = student.forward_teacher_forced(x_t, t, trajectory.x_0, prompt, block, context)
    else:
        v = student.forward_block_causal(x_t, t, prompt, block, context)
    return (x_0_from_velocity(x_t, v, t) - trajectory.x_0).square().mean()


def consistency_loss(
    student: TinyCausalWanModel, target: TinyCausalWanModel, teacher: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext,
    target_prompt: PromptContext, teacher_prompts: tuple[PromptContext, PromptContext], config: CausalConsistencyConfig,
    random: BatchRandom,
) -> Tensor:
    """mean |f(x_t, t) - f_target(x_s, s)|^2 with f the prediction of x_0 (consistency distillation, arXiv 2303.01469, Eq. 7).

    s < t are neighbours among `consistency_steps` times from 1 to 0, drawn for each block of the real videos x_0; x_s is one Euler step of
    the guided teacher from x_t. target is the student's moving average. All three see the clean blocks of x_0 before the block. At s = 0 f
    is x_s whatever the velocity: the boundary condition holds by itself. teacher_prompts: prompt and null prompt.
    """
    times, block, context = sampling_times(config.consistency_steps, config.time_shift), config.num_frames_per_block, config.context
    sizes = torch.tensor(context.block_sizes(x_0.shape[1], block))
    index = random.draw(len(x_0), lambda total: torch.randint(len(times) - 1, (total, len(sizes)), generator=random.generator))
    index = index.repeat_interleave(sizes, 1)  # (B, F)
    t, s = times[index].to(x_0.device), times[index + 1].to(x_0.device)  # (B, F)
    x_t = add_noise(x_0, random.normal_like(x_0), t)
    with torch.no_grad():  # teacher and target are constants here
        cond, null = (teacher.forward_teacher_forced(x_t, t, x_0, encoded, block, context) for encoded in teacher_prompts)
        x_s = x_t + expand_time(s - t, x_t) * classifier_free_guidance(cond, null, config.guidance)
        goal = x_0_from_velocity(x_s, target.forward_teacher_forced(x_s, s, x_0, target_prompt, block, context), s)
    v = student.forward_teacher_forced(x_t, t, x_0, prompt, block, context)
    return (x_0_from_velocity(x_t, v, t) - goal).square().mean()


class FewStepStage(Stage):
    """A student that starts as a copy of its teacher and learns few steps from it; its average is what is shipped."""

    config: CausalODEConfig | CausalConsistencyConfig
    columns = ("loss_few_step", "gradient_norm", "num_frames")

    def __init__(self, config: Config, runtime: Runtime, random: torch.Generator, processes: Processes = ONE_PROCESS):
        super().__init__(config, runtime, random, processes)
        self.data = open_data(config.dataset)
        loaded = load_teacher(Path(self.config.pretrained_checkpoint), config, runtime.device)
        self.is_causal = not isinstance(self.config, CausalODEConfig) or self.config.trajectory_teacher == "causal"
        if not self.is_causal:
            check_is_bidirectional(self.config.pretrained_checkpoint, loaded.config)
        self.continue_from(loaded)
        self.teacher, self.text_encoder = loaded.generator, loaded.text_encoder
        self.student = copy.deepcopy(self.teacher).train().requires_grad_(True)
        self.average = copy.deepcopy(self.teacher)
        if self.config.activation_checkpointing:
            self.student.recompute_activations()
        if self.config.sharding == "fsdp2":
            shard_blocks((self.student, self.average, self.teacher), processes.count, runtime.device)
        self.plan = few_step_plan(self.config)
        self.optimizers["adamw"] = torch.optim.AdamW(
            self.student.parameters(), lr=self.config.lr, betas=tuple(self.config.adam_betas), weight_decay=self.config.weight_decay,
        )

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        num_frames = draw_num_frames(config, self.random.generator)
        indices = self.next_indices(config.batch_size)
        losses = []
        for part in self.parts.of(config.batch_size, self.random):
            if isinstance(config, CausalODEConfig):
                loss = self._regress_on_trajectories(config, indices[part], num_frames)
            else:
                loss = self._make_neighbours_agree(config, indices[part], num_frames)
            losses.append({"loss_few_step": loss})
        self.set_rates({"adamw": rate_factor(config, step) * config.lr})
        norm = self.step_optimizers(self.student)
        update_average(self.average, self.student, exponential_decay(config.ema_decay, step))
        return {**mean_figures(losses), "gradient_norm": norm, "num_frames": num_frames}

    def _regress_on_trajectories(self, config: CausalODEConfig, indices: Sequence[int], num_frames: int) -> float:
        """Let every block meet every denoising step on one batch of trajectories; leaves the gradient."""
        text, prompts = self._encode(self.data.captions(self.seed, indices))
        random, streams = self.random, make_noise_streams(self.random.seeds(len(indices)))
        with self.runtime.autocast():
            trajectory = ode_trajectory(self.teacher, *prompts, streams, num_frames, config)
        # Every block has its own order of the S times. A row of the orders (S, B, K) is one input of the student.
        num_times, num_blocks = len(trajectory.times), len(config.context.block_sizes(num_frames, config.num_frames_per_block))
        orders = random.draw(
            len(indices), lambda size: torch.rand((num_times, size, num_blocks), generator=random.generator).argsort(0), dim=1
        )
        total = 0.0
        for steps in orders:
            with self.runtime.autocast():
                loss = ode_regression_loss(self.student, trajectory, steps, self.student.encode_prompt(*text), config)
                loss = loss / len(self.plan.times)  # every block counts once at each of them
            self.parts.backward(loss)  # row by row: the memory of one
            total += loss.item()
        return total

    def _make_neighbours_agree(self, config: CausalConsistencyConfig, indices: Sequence[int], num_frames: int) -> float:
        """Consistency distillation on one batch of real videos; leaves the gradient."""
        batch = self.data.sample(self.seed, indices, num_frames)
        text, prompts = self._encode(batch.captions)
        with self.runtime.autocast():
            with torch.no_grad():  # the target is a constant here
                target_prompt = self.average.encode_prompt(*text)
            loss = consistency_loss(
                self.student, self.average, self.teacher, batch.video.to(self.runtime.device), self.student.encode_prompt(*text),
                target_prompt, prompts, config, self.random,
            )
        self.parts.backward(loss)
        return loss.item()

    @torch.no_grad()  # text encoder and teacher are frozen
    def _encode(self, captions: list[str]) -> tuple[Text, tuple[PromptContext, PromptContext]]:
        """The embedded captions, for the student, and what the teacher makes of them and of the null prompt."""
        with self.runtime.autocast():
            text, null_text = self.text_encoder.encode(captions), self.text_encoder.encode([NULL_PROMPT] * len(captions))
            return text, (self.teacher.encode_prompt(*text), self.teacher.encode_prompt(*null_text))

    def shown(self) -> dict[str, Sampler]:
        """The averaged student beside its teacher."""
        samplers = many_step_samplers("teacher", self.teacher, self.text_encoder, self.config, self.is_causal)
        return samplers | {f"student, {len(self.plan.times)} steps": Sampler(self.average, self.text_encoder, self.plan)}

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.student}

    def modules(self) -> dict[str, nn.Module]:
        return {
            "generator_state_dict": self.student, "generator_ema_state_dict": self.average, "teacher_state_dict": self.teacher,
            "text_encoder_state_dict": self.text_encoder,
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"optimizer_state_dict": state["optimizer_state_dict"]["adamw"]}

    def load_optimizers(self, stored: dict[str, Any], name: str) -> None:
        super().load_optimizers({"adamw": stored}, name)
