"""Seconds and FLOPs of generation and training, split into phases of the real code path.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.compute import turns
from experiments.public_code import build_public_network, sample_public
from experiments.timing import (
    Call,
    Gauge,
    clock,
    flop_counter,
    median_totals,
    phase_totals,
    time_beside_products,
    time_in_turns,
    watch,
)
from machine.runtime import Runtime
from machine.seeds import Purpose, torch_generator
from method.plans import BidirectionalPlan, RolloutPlan
from method.settings import SelfForcingConfig
from sampling.samplers import SamplerSettings, check_length, prepared, sample
from sampling.video_io import save_array, save_video, to_display
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training.checkpoint import LoadedNetworks
from training.config import Config
from training.stages import Sampler, SelfForcingStage

PROMPT = "a handwritten 7 drifting up and to the left"
TEXT, DENOISING, CACHE = "text", "denoising", "cache pass and first step"  # of generation; the latter two are one pass
ROLLOUT, SCORES, CRITIC_LOSS, AVERAGES = "rollout", "scores", "critic: loss", "averages"  # of a training step, with TEXT and
BACKWARD, OPTIMIZER = "{}: backward", "{}: clipping, optimizer"  # these two of generator and critic
VARIANTS = {"student": (), "compiled": ("--compile",), "int8": ("--compile", "--int8")}  # of the student: options of `sampling.prepared`
OF_STUDENT = ("first_block_seconds", "block_seconds", "gif_seconds", "npz_seconds", "split")  # figures that the other samplers lack


def cost(seconds: float, flops: float, limit: float) -> dict[str, float]:
    """share_of_limit: FLOPs a second over those of a large matrix product."""
    return {"seconds": seconds, "flops": flops, "share_of_limit": flops / seconds / limit if seconds > 0 else 0.0}


# --- generation -------------------------------------------------------------------------------------------------------


class WithoutCache:
    """A student that recomputes the past in every pass: same videos, slower. Its "cache" lists the finished blocks and their times."""

    def __init__(self, model: TinyCausalWanModel, plan: RolloutPlan):
        self.model, self.plan = model, plan
        self.config, self.parameters, self.encode_prompt = model.config, model.parameters, model.encode_prompt

    def new_cache(self, window_frames: int | None, sink_frames: int) -> list[tuple[Tensor, Tensor]]:
        return []

    def write_cache(self, x: Tensor, t: Tensor, prompt: PromptContext, cache: list[tuple[Tensor, Tensor]]) -> None:
        cache.append((x, t))

    def forward_cached(self, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        whole, times = (torch.cat(parts, dim=1) for parts in zip(*cache, (x_t, t), strict=True))
        v = self.model.forward_block_causal(whole, times, prompt, self.plan.num_frames_per_block, self.plan.context)
        return v[:, -x_t.shape[1]:]

    def write_and_forward(
        self, x: Tensor, t_x: Tensor, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        self.write_cache(x, t_x, prompt, cache)
        return self.forward_cached(x_t, t, prompt, cache)


def make_sampler(networks: LoadedNetworks, num_frames: int, runtime: Runtime, *options: str) -> Sampler:
    """As generate.py samples the networks with these options. Raises ValueError for a length that they cannot make."""
    plan = SamplerSettings().make_plan(networks.config.training)
    check_length(num_frames, plan, networks.config.training)
    networks = prepared(networks, runtime, *options)
    return Sampler(networks.generator, networks.text_encoder, plan)


def make_samplers(
    student: LoadedNetworks, teacher: LoadedNetworks | None, variants: tuple[str, ...], without_cache: bool, num_frames: int,
    runtime: Runtime,
) -> dict[str, Sampler]:
    """The student in these `VARIANTS`, "student" among them, and where asked for as "no cache"; the teacher if given. Raises ValueError for
    networks of another kind."""
    if not isinstance(student.config.training, SelfForcingConfig):
        raise ValueError("--student is a teacher: expected a checkpoint of Self-Forcing")
    samplers = {name: make_sampler(student, num_frames, runtime, *VARIANTS[name]) for name in variants}
    if without_cache:
        model, plan = samplers["student"].network, samplers["student"].plan
        samplers["no cache"] = replace(samplers["student"], network=WithoutCache(model, plan))
    if teacher is not None:
        samplers["teacher"] = make_sampler(teacher, num_frames, runtime)
        if not isinstance(samplers["teacher"].plan, BidirectionalPlan):
            raise ValueError("--teacher is no bidirectional teacher: expected a checkpoint of training=pretrain")
    return samplers


def generate_in_phases(
    sampler: Sampler, prompts: list[str], seeds: list[int], num_frames: int, runtime: Runtime, gauge: Gauge
) -> tuple[Tensor, list[Call]]:
    """`sample`, watched: the same videos (B, F, C, H, W), and the calls."""
    model = sampler.network
    with watch(gauge, [
        (sampler.text_encoder, "encode", TEXT), (model, "encode_prompt", TEXT), (model, "forward_cached", DENOISING),
        (model, "write_cache", CACHE), (model, "write_and_forward", CACHE),
    ]) as calls:
        videos = sample(sampler, prompts, seeds, num_frames, runtime)
    return videos, calls


def block_ends(calls: list[Call]) -> list[float]:
    """Seconds from the start to the end of each block: the next block's cache pass begins, or the video ends."""
    _, start, end = calls[-1]
    return [begin - start for phase, begin, _ in calls if phase == CACHE] + [end - start]


def steady_block(ends: list[float], plan: RolloutPlan) -> float:
    """Median seconds from block to block once a block sees a full window, or of the last one in a video that never fills it."""
    intervals = [later - earlier for earlier, later in zip([0.0, *ends], ends, strict=False)]
    filled = len(ends) if plan.context.window_frames is None else max(plan.context.window_frames // plan.num_frames_per_block - 1, 1)
    return statistics.median(intervals[filled:] or intervals[-1:])


def count_generation(samplers: dict[str, Sampler], num_frames: int, runtime: Runtime) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs of one video: by sampler, and by phase of the student. A compiled pass hides its own: the plain student's count for it."""
    asked = ([PROMPT], [0], num_frames, runtime)
    with flop_counter() as counter:
        _, calls = generate_in_phases(samplers["student"], *asked, counter.get_total_flops)
    of_student = phase_totals(calls)
    flops = dict.fromkeys(samplers, sum(of_student.values()))
    for name in samplers.keys() - VARIANTS.keys():
        with flop_counter() as counter:
            sample(samplers[name], *asked)
        flops[name] = counter.get_total_flops()
    return flops, of_student


def measure_generation(
    samplers: dict[str, dict[str, Sampler]], runtimes: dict[str, Runtime], batch_size: int, num_frames: int, repeats: int
) -> list[dict[str, Any]]:
    """Medians of all samplers, by precision and name, in turns with the limit: a row each. `OF_STUDENT` is None for all but "student".

    frames_per_second: of all videos of the batch, sampling only. gif_seconds, npz_seconds: to write them all."""
    asked = ([PROMPT] * batch_size, list(range(batch_size)), num_frames)
    watched: dict[str, list[list[Call]]] = {precision: [] for precision in runtimes}

    def watch_student(precision: str, runtime: Runtime) -> None:
        watched[precision].append(generate_in_phases(samplers[precision]["student"], *asked, runtime, clock(runtime.device))[1])

    contestants: dict[tuple[str, Any], Callable[[], object]] = {}
    for precision, runtime in runtimes.items():
        contestants |= {(precision, name): partial(sample, sampler, *asked, runtime) for name, sampler in samplers[precision].items()}
        contestants[precision, "phases"] = partial(watch_student, precision, runtime)
    seconds, limits = time_beside_products(contestants, runtimes, repeats)
    rows = []
    for precision, runtime in runtimes.items():
        limit = limits[precision]
        flops, phase_flops = count_generation(samplers[precision], num_frames, runtime)
        for name, sampler in samplers[precision].items():
            taken = seconds[precision, name]
            row = {"sampler": name, "precision": precision, "batch_size": batch_size, "num_frames": num_frames,
                   "frames_per_second": batch_size * num_frames / taken, "limit": limit,
                   "whole": cost(taken, batch_size * flops[name], limit), **dict.fromkeys(OF_STUDENT)}
            if name == "student":
                runs = watched[precision][1:]  # without the warm-up
                ends = [block_ends(calls) for calls in runs]
                gif_seconds, npz_seconds = time_output(sample(sampler, *asked, runtime), repeats)
                row |= {
                    "first_block_seconds": statistics.median(end[0] for end in ends),
                    "block_seconds": statistics.median(steady_block(end, sampler.plan) for end in ends),
                    "gif_seconds": gif_seconds, "npz_seconds": npz_seconds,
                    "split": {phase: cost(value, batch_size * phase_flops[phase], limit) for phase, value in median_totals(runs).items()},
                }
            rows.append(row)
    return rows


def time_output(videos: Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds to write videos (B, F, C, H, W), in model range, as GIFs, and as compressed arrays."""
    shown = videos.cpu()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        seconds = time_in_turns({
            "gif": lambda: [save_video(path / f"{index}.gif", to_display(video)) for index, video in enumerate(shown)],
            "npz": lambda: [save_array(path / f"{index}.npz", video, PROMPT) for index, video in enumerate(shown)],
        }, repeats, torch.device("cpu"))
    return seconds["gif"], seconds["npz"]


PUBLIC, PUBLIC_COMPILED = "public code", "public code, compiled"


def measure_side_by_side(
    folder: Path, student: LoadedNetworks, patch_size: int, variants: tuple[str, ...], num_frames: int, repeats: int
) -> dict[str, Any]:
    """The public code of a clone in `folder` against ours, in turns: untrained networks of one size on the CPU in float32 at batch 1, with
    the student's blocks and steps. Raises ValueError as `build_public_network`."""
    config = replace(student.config.model, patch_size=[1, patch_size, patch_size])
    runtime, text = Runtime(torch.device("cpu"), torch.float32), student.text_encoder.cpu().encode([PROMPT])[0]
    public = build_public_network(folder, config, text.shape[1])
    own = replace(student, generator=TinyCausalWanModel(config).eval().requires_grad_(False))
    samplers = make_samplers(own, None, variants, False, num_frames, runtime)
    plan = samplers["student"].plan
    walk = (config, text, num_frames, plan.num_frames_per_block, plan.times, torch_generator(0, Purpose.SELF_TEST))
    contestants: dict[str, Callable[[], object]] = {PUBLIC: partial(sample_public, public, *walk)}
    if "compiled" in variants:
        contestants[PUBLIC_COMPILED] = partial(sample_public, torch.compile(copy.deepcopy(public)), *walk)
    contestants |= {name: partial(sample, sampler, [PROMPT], [0], num_frames, runtime) for name, sampler in samplers.items()}
    seconds = time_in_turns(contestants, repeats, runtime.device)
    sizes = {PUBLIC: public, "student": own.generator}
    return {
        "patch_size": patch_size, "num_frames": num_frames,
        "parameters": {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in sizes.items()},
        "frames_per_second": {name: num_frames / taken for name, taken in seconds.items()},
    }


# --- training ---------------------------------------------------------------------------------------------------------


def train_in_phases(stage: SelfForcingStage, step: int, gauge: Gauge) -> tuple[dict[str, float], list[Call]]:
    """`stage.train_step`, watched: the same update, its figures, and the calls."""
    engine = stage.engine

    def of_learner(phase: str) -> Callable[[], str]:  # the one whose loss was computed last
        losses = {SCORES: "generator", CRITIC_LOSS: "critic"}
        return lambda: phase.format(next(losses[name] for name, *_ in reversed(calls) if name in losses))

    networks = (engine.generator, engine.real_score, engine.fake_score, engine.fake_average)
    with watch(gauge, [
        (stage.text_encoder, "encode", TEXT), *((network, "encode_prompt", TEXT) for network in networks),
        (engine, "make_videos", ROLLOUT), (engine, "generator_loss", SCORES), (engine, "critic_loss", CRITIC_LOSS),
        (torch.Tensor, "backward", of_learner(BACKWARD)), (torch.nn.utils, "clip_grad_norm_", of_learner(OPTIMIZER)),
        *((optimizer, "step", OPTIMIZER.format(name)) for name, optimizer in stage.optimizers.items()),
        (engine, "update_averages", AVERAGES),
    ]) as calls:
        figures = stage.train_step(step)
    return figures, calls


def measure_training(config: Config, runtimes: dict[str, Runtime], repeats: int) -> list[dict[str, Any]]:
    """Mean step of Self-Forcing over whole cycles of generator and critic turns, a row a precision: medians of each kind of turn, in turns
    with the limit. Blocks are finished (`finish_blocks`), so every exit step costs the same. critic_turn_seconds: of a turn that updates
    the critic alone."""
    training, kinds = config.training, turns(config.training)
    counted: dict[str, dict[str, float]] = {}
    watched: dict[tuple[str, str], list[list[Call]]] = {(precision, kind): [] for precision in runtimes for kind in kinds}

    def watch_turn(stage: SelfForcingStage, precision: str, kind: str) -> None:
        watched[precision, kind].append(train_in_phases(stage, kinds[kind][0], clock(stage.runtime.device))[1])

    contestants: dict[tuple[str, Any], Callable[[], object]] = {}
    for precision, runtime in runtimes.items():
        stage = SelfForcingStage(config, runtime, torch_generator(0, Purpose.TRAINING))
        contestants |= {(precision, kind): partial(watch_turn, stage, precision, kind) for kind in kinds}
    for kind, (step, _) in kinds.items():
        with flop_counter() as counter:
            counted[kind] = phase_totals(train_in_phases(stage, step, counter.get_total_flops)[1])
    seconds, limits = time_beside_products(contestants, runtimes, repeats)
    rows = []
    for precision, limit in limits.items():
        split, flops = {}, {}
        for kind, (_, share) in kinds.items():
            for phase, value in median_totals(watched[precision, kind][1:]).items():  # without the warm-up
                split[phase] = split.get(phase, 0.0) + share * value
                flops[phase] = flops.get(phase, 0.0) + share * counted[kind][phase]
        mean = sum(share * seconds[precision, kind] for kind, (_, share) in kinds.items())
        rows.append({
            "precision": precision, "batch_size": training.batch_size, "num_frames": training.max_num_frames, "limit": limit,
            "whole": cost(mean, sum(flops.values()), limit),
            "generator_turn_seconds": seconds[precision, "generator"], "critic_turn_seconds": seconds[precision, "critic"],
            "split": {phase: cost(value, flops[phase], limit) for phase, value in split.items()},
        })
    return rows
