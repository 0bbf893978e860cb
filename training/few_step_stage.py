"""Training of a few-step start for a causal student (see `few_step`), as one object like those of `stages`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_video_sf import make_noise_streams
from machine.batch_random import BatchRandom
from machine.runtime import Runtime
from method.flow_matching import sampling_times
from method.plans import baseline_plans, few_step_plan, many_step_plan, teacher_plan
from method.settings import CausalConsistencyConfig, CausalODEConfig
from network.text_encoder import NULL_PROMPT
from network.weights import update_average
from training.checkpoint import digits_seen, merge_counts, merge_splits, splits_learned
from training.config import Config
from training.data import open_data
from training.distributed import ONE_PROCESS, BatchParts, Processes, mean_figures
from training.few_step import TeacherPrompts, consistency_loss, draw_step_orders, nearest_steps, ode_regression_loss, ode_trajectory
from training.sharding import load_optimizer, shard_blocks, whole
from training.stages import Sampler, draw_num_frames, rate_factor, set_rate
from training.starting_networks import check_is_bidirectional, load_modules, load_teacher


class FewStepStage:
    """A student that starts as a copy of its teacher and learns few steps from it; its average is what is shipped."""

    columns = ("loss_few_step", "gradient_norm", "num_frames")

    def __init__(self, config: Config, runtime: Runtime, random: torch.Generator, processes: Processes = ONE_PROCESS):
        assert isinstance(config.training, (CausalODEConfig, CausalConsistencyConfig))
        self.config, self.runtime, self.seed = config.training, runtime, config.seed
        self.random, self.parts = BatchRandom(random), BatchParts(processes, self.config.accumulation_steps)
        self.parts.check_divides("training.batch_size", self.config.batch_size)
        self.data = open_data(config.dataset)
        self.num_prompts_seen = 0
        loaded = load_teacher(Path(self.config.pretrained_checkpoint), config, runtime.device)
        self.is_causal = not isinstance(self.config, CausalODEConfig) or self.config.trajectory_teacher == "causal"
        if not self.is_causal:
            check_is_bidirectional(self.config.pretrained_checkpoint, loaded.config)
        self.teacher, self.text_encoder, self.earlier_prompts = loaded.generator, loaded.text_encoder, loaded.prompts_drawn
        self.digits_seen = merge_splits(splits_learned(config.dataset), loaded.digits_seen)
        self.student = copy.deepcopy(self.teacher).train().requires_grad_(True)
        self.average = copy.deepcopy(self.teacher)
        if self.config.activation_checkpointing:
            self.student.recompute_activations()
        if self.config.sharding == "fsdp2":
            shard_blocks((self.student, self.average, self.teacher), processes.count, runtime.device)
        self.plan = few_step_plan(self.config)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=self.config.lr, betas=tuple(self.config.adam_betas), weight_decay=self.config.weight_decay
        )

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        num_frames = draw_num_frames(config, self.random.generator)
        indices = range(self.num_prompts_seen, self.num_prompts_seen + config.batch_size)
        self.num_prompts_seen += config.batch_size
        losses = []
        for part in self.parts.of(config.batch_size, self.random):
            if isinstance(config, CausalODEConfig):
                loss = self._regress_on_trajectories(config, indices[part], num_frames)
            else:
                loss = self._make_neighbours_agree(config, indices[part], num_frames)
            losses.append({"loss_few_step": loss})
        norm = self.parts.clip(self.student.parameters(), config.clip_norm)
        set_rate(self.optimizer, rate_factor(config, step) * config.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.student, config.ema_decay, step)
        return {**mean_figures(losses), "gradient_norm": norm, "num_frames": num_frames}

    def _regress_on_trajectories(self, config: CausalODEConfig, indices: Sequence[int], num_frames: int) -> float:
        """Make one batch of trajectories and let every block meet every denoising step on it; leaves the gradient."""
        text, prompts = self._encode(self.data.captions(self.seed, indices))
        random, streams = self.random, make_noise_streams(self.random.seeds(len(indices)))
        kept = nearest_steps(config.trajectory_steps, config.time_shift, self.plan.times)
        with self.runtime.autocast():
            trajectory = ode_trajectory(
                self.teacher, prompts.cond, prompts.null, streams, num_frames, config.num_frames_per_block, config.trajectory_steps,
                kept, config.time_shift, config.guidance, self.is_causal, config.context,
            )
        total = 0.0
        num_blocks = len(config.context.block_sizes(num_frames, config.num_frames_per_block))
        num_times = len(trajectory.times)
        orders = random.draw(len(indices), lambda total: draw_step_orders(num_times, total, num_blocks, random.generator), dim=1)
        for steps in orders:
            with self.runtime.autocast():
                loss = ode_regression_loss(
                    self.student, trajectory, steps, self.student.encode_prompt(*text), config.num_frames_per_block, self.is_causal,
                    config.context,
                ) / len(kept)  # every block counts once at each of them
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
                target_prompt, prompts, config.num_frames_per_block, sampling_times(config.consistency_steps, config.time_shift),
                config.guidance, self.random, config.context,
            )
        self.parts.backward(loss)
        return loss.item()

    @torch.no_grad()  # text encoder and teacher are frozen
    def _encode(self, captions: list[str]) -> tuple[tuple[Tensor, Tensor], TeacherPrompts]:
        """The captions' tokens, for the student to read, and what the teacher makes of them and of the null prompt."""
        with self.runtime.autocast():
            text, null = self.text_encoder.encode(captions), self.text_encoder.encode([NULL_PROMPT] * len(captions))
            return text, TeacherPrompts(self.teacher.encode_prompt(*text), self.teacher.encode_prompt(*null))

    def shown(self) -> dict[str, Sampler]:
        """The averaged student beside its teacher, in many steps and block by block in few (`baseline_plans`)."""
        config, num_steps = self.config, self.config.teacher_steps
        if self.is_causal:
            many = many_step_plan(num_steps, config.time_shift, config.num_frames_per_block, config.guidance, config.context)
        else:
            many = teacher_plan(config)
        plans = {f"teacher, {num_steps} steps": many, **baseline_plans(config)}
        samplers = {name: Sampler(self.teacher, self.text_encoder, each) for name, each in plans.items()}
        return samplers | {f"student, {len(self.plan.times)} steps": Sampler(self.average, self.text_encoder, self.plan)}

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.student}

    def state_dict(self) -> dict[str, Any]:
        return whole({
            "generator_state_dict": self.student.state_dict(),
            "generator_ema_state_dict": self.average.state_dict(),
            "teacher_state_dict": self.teacher.state_dict(),
            "text_encoder_state_dict": self.text_encoder.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "random_state": self.random.generator.get_state(),
            "num_prompts_seen": self.num_prompts_seen,
            "prompts_drawn": merge_counts(self.earlier_prompts, {self.seed: self.num_prompts_seen}),
            "digits_seen": list(self.digits_seen),
        })

    def load_state_dict(self, checkpoint: dict[str, Any], name: str) -> None:
        targets = {
            "generator_state_dict": self.student, "generator_ema_state_dict": self.average, "teacher_state_dict": self.teacher,
            "text_encoder_state_dict": self.text_encoder,
        }
        load_modules(targets, checkpoint, name)
        load_optimizer(self.optimizer, checkpoint["optimizer_state_dict"])
        for group in self.optimizer.param_groups:  # the command line's wishes, not those of the run that is resumed; rate: train_step
            group.update(betas=tuple(self.config.adam_betas), weight_decay=self.config.weight_decay)
        self.random.generator.set_state(checkpoint["random_state"])
        self.num_prompts_seen = checkpoint["num_prompts_seen"]
        self.earlier_prompts, self.digits_seen = checkpoint["prompts_drawn"], merge_splits(self.digits_seen, digits_seen(checkpoint))
