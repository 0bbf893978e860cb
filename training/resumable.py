"""What every kind of training shares: how its networks are sampled, the update, which prompts it has drawn, and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from machine.batch_random import BatchRandom
from machine.runtime import Runtime
from method.plans import BidirectionalPlan, RolloutPlan, baseline_plans, many_step_plan, teacher_plan
from method.settings import TrainingConfig
from network.text_encoder import TextEncoder
from tiny_causal_wan import TinyCausalWanModel
from training.checkpoint import CheckpointError, LoadedNetworks, digits_seen, load_state, merge_counts, merge_splits, splits_learned
from training.config import Config
from training.distributed import BatchParts, Processes
from training.sharding import load_optimizer, whole


@dataclass(frozen=True)
class Sampler:
    """A network and how `sampling.samplers.sample` makes videos with it."""

    network: TinyCausalWanModel
    text_encoder: TextEncoder
    plan: RolloutPlan | BidirectionalPlan


def many_step_samplers(
    name: str, network: TinyCausalWanModel, text_encoder: TextEncoder, config: TrainingConfig, is_causal: bool = False
) -> dict[str, Sampler]:
    """A network that takes many steps, in `teacher_steps` of all frames at once or block by block, and in few (`baseline_plans`)."""
    plan, num_steps = teacher_plan(config), config.teacher_steps
    if is_causal:
        plan = many_step_plan(num_steps, config.time_shift, config.num_frames_per_block, config.guidance, config.context)
    plans = {f"{name}, {num_steps} steps": plan, **baseline_plans(config)}
    return {name: Sampler(network, text_encoder, plan) for name, plan in plans.items()}


class Stage(ABC):
    """One kind of training: its networks, averages and optimizers. The loop around it (`train.SimplifiedTrainer`) owns the step counter,
    the files and the logs. All randomness comes from one generator and data are numbered: the state is complete in `state_dict`."""

    columns: tuple[str, ...]  # the scalars that train_step reports
    counter = "num_prompts_seen"  # its key in a checkpoint

    def __init__(self, config: Config, runtime: Runtime, random: torch.Generator, processes: Processes):
        self.config, self.runtime, self.seed = config.training, runtime, config.seed
        self.random, self.parts = BatchRandom(random), BatchParts(processes, config.training.accumulation_steps)
        self.parts.check_divides("training.batch_size", config.training.batch_size)
        self.num_prompts_seen = 0
        self.earlier_prompts: dict[int, int] = {}  # prompts drawn by the runs that this one continues
        self.digits_seen = splits_learned(config.dataset)  # by this run and those
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]: ...

    @abstractmethod
    def shown(self) -> dict[str, Sampler]: ...

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Those that are trained."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """All that a checkpoint holds, by its key there."""

    def continue_from(self, networks: LoadedNetworks) -> None:
        """Count what the networks of a file have seen as seen."""
        self.earlier_prompts = merge_counts(self.earlier_prompts, networks.prompts_drawn)
        self.digits_seen = merge_splits(self.digits_seen, networks.digits_seen)

    def next_indices(self, batch_size: int) -> range:
        """The numbers of a batch's prompts, each drawn once."""
        self.num_prompts_seen += batch_size
        return range(self.num_prompts_seen - batch_size, self.num_prompts_seen)

    def set_rates(self, rates: dict[str, float]) -> None:
        """Set the learning rate of every optimizer, by its name."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]

    def step_optimizers(self, network: nn.Module, prefix: str = "") -> float:
        """Clip the gradients of a network, step its optimizers, whose names begin with prefix, and clear the gradients. Returns the norm
        before clipping."""
        norm = self.parts.clip(network.parameters(), self.config.clip_norm)
        for name, optimizer in self.optimizers.items():
            if name.startswith(prefix):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return whole({
            **{key: module.state_dict() for key, module in self.modules().items()},
            "optimizer_state_dict": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random_state": self.random.generator.get_state(),
            self.counter: self.num_prompts_seen,
            "prompts_drawn": merge_counts(self.earlier_prompts, {self.seed: self.num_prompts_seen}),
            "digits_seen": list(self.digits_seen),
        })

    def load_state_dict(self, checkpoint: dict[str, Any], name: str) -> None:
        """Restore a run's state from a checkpoint of this name. Raises CheckpointError."""
        for key, module in self.modules().items():
            if key not in checkpoint:
                raise CheckpointError(f"{name} lacks {key}: it was stripped for generation, or is of another kind of training; resume "
                                      "from a checkpoint in the run's own folder")
            load_state(module, checkpoint[key], f"{name}: {key}")
        self.load_optimizers(checkpoint["optimizer_state_dict"], name)
        self.random.generator.set_state(checkpoint["random_state"])
        self.num_prompts_seen, self.earlier_prompts = checkpoint[self.counter], checkpoint["prompts_drawn"]
        self.digits_seen = merge_splits(self.digits_seen, digits_seen(checkpoint))

    def load_optimizers(self, stored: dict[str, Any], name: str) -> None:
        for key, optimizer in self.optimizers.items():
            load_optimizer(optimizer, stored[key])
