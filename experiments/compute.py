"""FLOPs of a training step: matrix products, convolutions and attention.

They are linear in the batch size (Muon's are the constant part) and, in a Self-Forcing rollout, in the exit step: each step before it
is one more forward pass. So a few steps of one or two videos give the exact mean over the random exit steps.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import torch

from experiments.timing import flop_counter
from machine.runtime import Runtime
from machine.seeds import Purpose, torch_generator
from method.choices import require
from method.settings import PretrainConfig, SelfForcingConfig
from training.config import Config
from training.data import window_starts
from training.stages import PretrainStage, SelfForcingStage

CPU = Runtime(torch.device("cpu"), torch.float32)  # counted here, wherever the training runs
IN_ONE_PASS = {"accumulation_steps": 1, "activation_checkpointing": False, "sharding": "none"}  # their overhead does not count
MAX_TRIES = 200  # steps to draw two different exit steps: far more than needed


def flops_per_step(config: Config) -> float:
    """Mean FLOPs of a training step, over whole cycles of generator and critic updates; runs a few steps of a fresh stage on the CPU.
    Raises ValueError for videos of several lengths, and what the stage raises."""
    training = config.training
    require(
        training.min_num_frames == training.max_num_frames, "training.min_num_frames", training.min_num_frames,
        f"training.max_num_frames={training.max_num_frames}: compute is counted for videos of one length",
    )
    random = torch_generator(0, Purpose.TRAINING)
    flops_of = _pretrain_flops if isinstance(training, PretrainConfig) else _self_forcing_flops
    one, two = (flops_of(config, replace(training, batch_size=batch_size, **IN_ONE_PASS), random) for batch_size in (1, 2))
    return one + (training.batch_size - 1) * (two - one)


def _pretrain_flops(config: Config, training: PretrainConfig, random: torch.Generator) -> float:
    """Of a step on whole videos."""
    stage = PretrainStage(replace(config, training=replace(training, clip_steps=0)), CPU, random)
    steps = (0, 1) if training.objective == "mixed" else (0,)
    return sum(_count_step(stage, step)[0] for step in steps) / len(steps)


def _self_forcing_flops(config: Config, training: SelfForcingConfig, random: torch.Generator) -> float:
    """Mean over a cycle. One exit step a block has the same mean as one for all, as the cost is a sum over blocks."""
    stage = SelfForcingStage(replace(config, training=replace(training, same_exit_step=True)), CPU, random)
    return sum(share * _mean_over_windows(stage, step) for step, share in turns(training).values())


def turns(config: SelfForcingConfig) -> dict[str, tuple[int, float]]:
    """A step that updates "generator" and critic, and one of the "critic" alone, if there are any, with their shares of all steps after
    the warm-up."""
    ratio = config.dfake_gen_update_ratio
    generator = next(step for step in count(config.critic_warmup_steps) if (step + 1) % ratio == 0)
    critic = {"critic": (generator + 1, 1 - 1 / ratio)} if ratio > 1 else {}
    return {"generator": (generator, 1 / ratio), **critic}


def _count_step(stage: PretrainStage | SelfForcingStage, step: int, first_frame: int = 0) -> tuple[int, int]:
    """FLOPs of one step, and its exit step, 0 if it has none. first_frame: of the scored window, in its rollout."""
    with flop_counter() as counter:
        if isinstance(stage, SelfForcingStage):
            figures = stage.train_on_window(step, stage.config.max_num_frames, first_frame)
        else:
            figures = stage.train_step(step)
    return counter.get_total_flops(), int(figures.get("exit_step", 0))


def _mean_over_windows(stage: SelfForcingStage, step: int) -> float:
    """Mean FLOPs of this step over uniform exit steps and starts of the scored window. Once the cache's window is full, each further block
    costs the same: the later starts are on a line through two of them."""
    starts = window_starts(stage.config, stage.config.max_num_frames)
    num_curved = -(-(stage.config.window_frames or 0) // stage.config.num_frames_per_block)
    counted = [_mean_over_exits(stage, step, start) for start in starts[: num_curved + 2]]
    num_more = len(starts) - len(counted)
    slope = counted[-1] - counted[-2] if num_more else 0.0
    return (sum(counted) + num_more * counted[-1] + slope * num_more * (num_more + 1) / 2) / len(starts)


def _mean_over_exits(stage: SelfForcingStage, step: int, first_frame: int) -> float:
    """Mean FLOPs of this step over uniform exit steps: the line through two of them, at its middle."""
    num_exits = len(stage.config.denoising_steps)
    flops, exit_step = _count_step(stage, step, first_frame)
    if num_exits == 1 or stage.config.generator_inputs != "self_rollout" or stage.config.finish_blocks:  # as many passes at every exit
        return flops
    for _ in range(MAX_TRIES):
        other_flops, other = _count_step(stage, step, first_frame)
        if other != exit_step:
            slope = (other_flops - flops) / (other - exit_step)
            return flops + slope * ((num_exits - 1) / 2 - exit_step)
    raise ValueError(f"{MAX_TRIES} rollouts all stopped at exit step {exit_step}: their compute cannot be counted")
