"""What is measured of generation and training: seconds and FLOPs, split into phases of the real code path.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamic_video_sf import clamp_to_data, draw_noise, make_noise_streams
from experiments.compute import turns
from experiments.public_code import build_public_network, sample_public
from experiments.timing import Phases, clock, flop_counter, matrix_limit, matrix_products, median_totals, time_in_turns
from machine.runtime import Runtime
from machine.seeds import Purpose, torch_generator
from method.flow_matching import add_noise, x_0_from_velocity
from method.plans import BidirectionalPlan, RolloutPlan
from method.settings import SelfForcingConfig
from sampling.samplers import SamplerSettings, prepared, sample_few_step, sample_many_step
from sampling.video_io import save_array, save_video, to_display
from tiny_causal_wan import TinyCausalWanModel
from training.checkpoint import LoadedNetworks
from training.config import Config
from training.stages import SelfForcingStage

PROMPT = "a handwritten 7 drifting up and to the left"
# Phases of generation; then the rest: noise, re-noising. A block's cache pass is one with the next block's first step.
TEXT, DENOISING, CACHE = "text", "denoising", "cache pass and first step"
ROLLOUT, SCORES, CRITIC_LOSS, AVERAGES = "rollout", "scores", "critic: loss", "averages"  # of a training step, beside TEXT and
BACKWARD, OPTIMIZER = "{}: backward", "{}: clipping, optimizer"  # these two of generator and critic
# How the student is prepared (`sampling.prepared`). Where it is compiled the plain student's FLOPs count: a compiled pass hides its own.
VARIANTS = {"student": (), "compiled": ("--compile",), "int8": ("--compile", "--int8")}


@dataclass(frozen=True)
class Cost:
    """Seconds, FLOPs, and the share of the limit that they make: FLOPs a second over those of a large matrix product."""

    seconds: float
    flops: float
    share_of_limit: float


def cost(seconds: float, flops: float, limit: float) -> Cost:
    return Cost(seconds, flops, flops / seconds / limit if seconds > 0 else 0.0)


# --- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_without_cache(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan, runtime: Runtime
) -> Tensor:
    """The few-step rollout with the past recomputed at every pass: the same videos (B, F, C, H, W), only slower. Raises ValueError for a
    student trained with context noise."""
    if plan.context_time != 0:
        raise ValueError(f"context noise {plan.context_time}: the comparison without cache is for students that have none")
    model, config = networks.generator, networks.generator.config
    streams = make_noise_streams(seeds)
    shape = (plan.num_frames_per_block, config.channels, config.frame_size, config.frame_size)
    with runtime.autocast():
        prompt = model.encode_prompt(*networks.text_encoder.encode(prompts))
        past = torch.empty(len(prompts), 0, *shape[1:], device=runtime.device)
        for _ in range(num_frames // plan.num_frames_per_block):
            x_t = draw_noise(streams, shape, runtime.device)
            for step, time_now in enumerate(plan.times):
                t = torch.full(x_t.shape[:2], time_now, device=runtime.device)
                whole, whole_t = torch.cat([past, x_t], 1), torch.cat([t.new_zeros(past.shape[:2]), t], 1)
                v = model.forward_block_causal(whole, whole_t, prompt, plan.num_frames_per_block, plan.context)
                x_0 = x_0_from_velocity(x_t, v[:, past.shape[1]:], t)
                x_0 = clamp_to_data(x_0) if plan.clamp_x_0 else x_0
                if step + 1 < len(plan.times):
                    x_t = add_noise(x_0, draw_noise(streams, shape, runtime.device), torch.full_like(t, plan.times[step + 1]))
            past = torch.cat([past, x_0], 1)
    return past.float()


def generate_in_phases(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan, runtime: Runtime, phases: Phases
) -> Tensor:
    """`sample_few_step`, watched: the same videos (B, F, C, H, W)."""
    model, text_encoder = networks.generator, networks.text_encoder
    with phases.watch(
        (text_encoder, "encode", TEXT), (model, "encode_prompt", TEXT), (model, "forward_cached", DENOISING),
        (model, "write_cache", CACHE), (model, "write_and_forward", CACHE),
    ):
        return sample_few_step(model, text_encoder, prompts, seeds, num_frames, plan, runtime)


def block_ends(phases: Phases) -> list[float]:
    """When each block was there, in seconds from the call: its cache pass follows, once the next block's noise is drawn, and the last block
    ends the video."""
    return [begin - phases.begin for phase, begin, _ in phases.calls if phase == CACHE] + [phases.whole]


def steady_block(ends: list[float], plan: RolloutPlan) -> float:
    """Median seconds from block to block once a block sees a full window, or of the last one in a video that never fills it."""
    intervals = [later - earlier for earlier, later in zip([0.0, *ends], ends, strict=False)]
    filled = len(ends) if plan.context.window_frames is None else max(plan.context.window_frames // plan.num_frames_per_block - 1, 1)
    return statistics.median(intervals[filled:] or intervals[-1:])


@dataclass(frozen=True)
class GenerationSpeed:
    """One sampler at one batch size in one number format; what follows `whole` is the cached student's alone. frames_per_second counts the
    frames of all videos of the batch, sampling only. gif_seconds, npz_seconds: to write them all."""

    sampler: str  # one of `VARIANTS`, "no cache" or "teacher"
    precision: str
    batch_size: int
    num_frames: int
    frames_per_second: float
    limit: float  # FLOP/s of a large matrix product, measured in the same turns
    whole: Cost
    first_block_seconds: float | None = None
    block_seconds: float | None = None
    gif_seconds: float | None = None
    npz_seconds: float | None = None
    split: dict[str, Cost] | None = None


@dataclass(frozen=True)
class Samplers:
    """The networks that are compared: the student in some of its `VARIANTS`, "student" among them; teacher and the rollout without
    cache only where asked for."""

    student: LoadedNetworks
    teacher: LoadedNetworks | None
    without_cache: bool
    variants: tuple[str, ...] = ("student",)
    _prepared: dict[tuple[str, Runtime], LoadedNetworks] = field(default_factory=dict)

    @property
    def plan(self) -> RolloutPlan:
        """As generate.py samples the student. Raises ValueError for a checkpoint that is no few-step student."""
        plan = SamplerSettings().make_plan(self.student.config.training)
        if not isinstance(plan, RolloutPlan) or not isinstance(self.student.config.training, SelfForcingConfig):
            raise ValueError("--student is a teacher: expected a checkpoint of Self-Forcing")
        return plan

    @property
    def teacher_plan(self) -> BidirectionalPlan:
        """As generate.py samples the teacher. Raises ValueError for a network that is none."""
        plan = SamplerSettings().make_plan(self.teacher.config.training)
        if not isinstance(plan, BidirectionalPlan):
            raise ValueError("--teacher is no bidirectional teacher: expected a checkpoint of training=pretrain")
        return plan

    def prepared(self, name: str, runtime: Runtime) -> LoadedNetworks:
        """The networks of a sampler, as generate.py runs them; made once."""
        if (name, runtime) not in self._prepared:
            networks = self.teacher if name == "teacher" else self.student
            self._prepared[name, runtime] = prepared(networks, runtime, *VARIANTS.get(name, ()))
        return self._prepared[name, runtime]

    def calls(self, batch_size: int, num_frames: int, runtime: Runtime) -> dict[str, Callable[[], Tensor]]:
        """By sampler, what makes its videos."""
        common = ([PROMPT] * batch_size, list(range(batch_size)), num_frames)
        calls: dict[str, Callable[[], Tensor]] = {}
        for name in self.variants:
            student = self.prepared(name, runtime)
            calls[name] = partial(sample_few_step, student.generator, student.text_encoder, *common, self.plan, runtime)
        if self.without_cache:
            calls["no cache"] = partial(sample_without_cache, self.prepared("student", runtime), *common, self.plan, runtime)
        if self.teacher is not None:
            teacher = self.prepared("teacher", runtime)
            calls["teacher"] = partial(sample_many_step, teacher.generator, teacher.text_encoder, *common, self.teacher_plan, runtime)
        return calls

    def watched(self, batch_size: int, num_frames: int, runtime: Runtime, phases: Phases) -> Tensor:
        """The student's videos, in phases."""
        common = ([PROMPT] * batch_size, list(range(batch_size)), num_frames)
        return generate_in_phases(self.prepared("student", runtime), *common, self.plan, runtime, phases)

    def count(self, num_frames: int, runtime: Runtime) -> tuple[dict[str, float], dict[str, float]]:
        """FLOPs of one video: by sampler, and by phase of the student."""
        totals: dict[str, float] = {}
        for name, call in self.calls(1, num_frames, runtime).items():
            with flop_counter() as counter:
                if "--compile" not in VARIANTS.get(name, ()):
                    call()
            totals[name] = counter.get_total_flops() or totals["student"]
        with flop_counter() as counter:
            phases = Phases(counter.get_total_flops)
            self.watched(1, num_frames, runtime, phases)
        return totals, phases.totals()


def measure_generation(
    samplers: Samplers, runtimes: dict[str, Runtime], batch_size: int, num_frames: int, repeats: int
) -> list[GenerationSpeed]:
    """All samplers in all number formats, and the matrix products of the limit, in turns; medians."""
    device = next(iter(runtimes.values())).device
    watched: dict[str, list[Phases]] = {precision: [] for precision in runtimes}

    def watch(precision: str) -> None:
        watched[precision].append(Phases(clock(device)))
        samplers.watched(batch_size, num_frames, runtimes[precision], watched[precision][-1])

    contestants: dict[tuple[str, Any], Callable[[], object]] = {}
    for precision, runtime in runtimes.items():
        for key, call in {**matrix_products(runtime), **samplers.calls(batch_size, num_frames, runtime)}.items():
            contestants[precision, key] = call
        contestants[precision, "phases"] = partial(watch, precision)
    seconds = time_in_turns(contestants, repeats, device)
    speeds = []
    for precision, runtime in runtimes.items():
        flops, phase_flops = samplers.count(num_frames, runtime)
        limit = matrix_limit(seconds, precision)
        for name in samplers.calls(batch_size, num_frames, runtime):
            taken = seconds[precision, name]
            whole = cost(taken, batch_size * flops[name], limit)
            speed = GenerationSpeed(name, precision, batch_size, num_frames, batch_size * num_frames / taken, limit, whole)
            if name == "student":
                runs = watched[precision][1:]  # without the warm-up
                ends = [block_ends(phases) for phases in runs]
                split = {
                    phase: cost(value, batch_size * phase_flops[phase], limit) for phase, value in median_totals(runs).items()
                }
                gif_seconds, npz_seconds = time_output(samplers.calls(batch_size, num_frames, runtime)[name](), repeats)
                speed = replace(
                    speed, first_block_seconds=statistics.median(end[0] for end in ends),
                    block_seconds=statistics.median(steady_block(end, samplers.plan) for end in ends),
                    gif_seconds=gif_seconds, npz_seconds=npz_seconds, split=split,
                )
            speeds.append(speed)
    return speeds


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


@dataclass(frozen=True)
class SideBySide:
    """The public code and ours at one size, in turns: untrained networks on the CPU in float32 at batch 1, blocks and steps those of the
    student. parameters, frames_per_second: by sampler, `PUBLIC` and `VARIANTS` among them."""

    patch_size: int
    num_frames: int
    parameters: dict[str, int]
    frames_per_second: dict[str, float]


def measure_side_by_side(
    folder: Path | None, student: LoadedNetworks, patch_size: int, variants: tuple[str, ...], num_frames: int, repeats: int
) -> SideBySide:
    """The public code of a clone in `folder` against ours. Raises ValueError as `build_public_network`."""
    config = replace(student.config.model, patch_size=[1, patch_size, patch_size])
    runtime, text = Runtime(torch.device("cpu"), torch.float32), student.text_encoder.cpu().encode([PROMPT])[0]
    public = build_public_network(folder, config, text.shape[1])
    own = replace(student, generator=TinyCausalWanModel(config).eval().requires_grad_(False))
    samplers = Samplers(own, None, without_cache=False, variants=variants)
    plan, random = samplers.plan, torch_generator(0, Purpose.SELF_TEST)
    walk = (config, text, num_frames, plan.num_frames_per_block, plan.times, random)
    contestants: dict[str, Callable[[], object]] = {PUBLIC: partial(sample_public, public, *walk)}
    if "compiled" in variants:
        contestants[PUBLIC_COMPILED] = partial(sample_public, torch.compile(copy.deepcopy(public)), *walk)
    contestants |= samplers.calls(1, num_frames, runtime)
    seconds = time_in_turns(contestants, repeats, runtime.device)
    sizes = {PUBLIC: public, "student": own.generator}
    return SideBySide(
        patch_size, num_frames, {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in sizes.items()},
        {name: num_frames / taken for name, taken in seconds.items()},
    )


# --- training ---------------------------------------------------------------------------------------------------------


def train_in_phases(stage: SelfForcingStage, step: int, phases: Phases) -> dict[str, float]:
    """`stage.train_step`, watched: the same update, and its figures."""
    engine = stage.engine

    def learner() -> str:  # whose loss was the last to be computed: the phases of a learner follow its loss
        return next("generator" if phase == SCORES else "critic" for phase, *_ in reversed(phases.calls) if phase in (SCORES, CRITIC_LOSS))

    networks = (engine.generator, engine.real_score, engine.fake_score, engine.fake_average)
    with phases.watch(
        (stage.text_encoder, "encode", TEXT), *((network, "encode_prompt", TEXT) for network in networks),
        (engine, "make_videos", ROLLOUT), (engine, "generator_loss", SCORES), (engine, "critic_loss", CRITIC_LOSS),
        (torch.Tensor, "backward", lambda: BACKWARD.format(learner())),
        (torch.nn.utils, "clip_grad_norm_", lambda: OPTIMIZER.format(learner())),
        *((optimizer, "step", OPTIMIZER.format(name)) for name, optimizer in stage.optimizers.items()),
        (engine, "update_averages", AVERAGES),
    ):
        return stage.train_step(step)


@dataclass(frozen=True)
class TrainingSpeed:
    """Mean step of Self-Forcing over whole cycles of generator and critic turns and over uniform exit steps."""

    precision: str
    batch_size: int
    num_frames: int
    limit: float  # FLOP/s of a large matrix product, measured in the same turns
    whole: Cost
    generator_turn_seconds: float
    critic_turn_seconds: float  # of a turn that updates the critic alone
    split: dict[str, Cost]


def count_training(config: Config, runtime: Runtime) -> dict[tuple[str, int], tuple[int, dict[str, float]]]:
    """By kind of turn and exit step: a seed that draws this exit step, and the FLOPs of one video's step by phase."""
    num_exits, kinds = len(config.training.denoising_steps), turns(config.training)
    stage = SelfForcingStage(replace(config, training=replace(config.training, batch_size=1)), runtime, torch.Generator())
    found: dict[tuple[str, int], tuple[int, dict[str, float]]] = {}
    for seed in count():
        for kind, (step, _) in kinds.items():
            stage.random.generator.set_state(torch_generator(seed, Purpose.TRAINING).get_state())
            with flop_counter() as counter:
                phases = Phases(counter.get_total_flops)
                exit_step = int(train_in_phases(stage, step, phases)["exit_step"])
            found.setdefault((kind, exit_step), (seed, phases.totals()))
        if len(found) == num_exits * len(kinds):
            break
    return found


def measure_training(config: Config, runtimes: dict[str, Runtime], repeats: int) -> list[TrainingSpeed]:
    """Steps of both kinds with every exit step, in all number formats, and the products of the limit, in turns; medians."""
    training = config.training
    device = next(iter(runtimes.values())).device
    kinds = turns(training)
    found = count_training(config, next(iter(runtimes.values())))
    watched: dict[tuple[str, str, int], list[Phases]] = {}

    def watch(stage: SelfForcingStage, precision: str, kind: str, exit_step: int) -> None:
        stage.random.generator.set_state(torch_generator(found[kind, exit_step][0], Purpose.TRAINING).get_state())
        watched.setdefault((precision, kind, exit_step), []).append(Phases(clock(device)))
        train_in_phases(stage, kinds[kind][0], watched[precision, kind, exit_step][-1])

    contestants: dict[tuple[str, Any], Callable[[], object]] = {}
    for precision, runtime in runtimes.items():
        stage = SelfForcingStage(config, runtime, torch.Generator())
        contestants |= {(precision, size): call for size, call in matrix_products(runtime).items()}
        contestants |= {(precision, turn): partial(watch, stage, precision, *turn) for turn in found}
    seconds = time_in_turns(contestants, repeats, device)
    speeds = []
    for precision in runtimes:
        limit = matrix_limit(seconds, precision)
        split, flops = {}, {}
        whole = {kind: 0.0 for kind in ("generator", "critic")}
        for (kind, exit_step), (_, counted) in found.items():
            weight = kinds[kind][1] / len(training.denoising_steps)
            for phase, value in median_totals(watched[precision, kind, exit_step][1:]).items():
                split[phase] = split.get(phase, 0.0) + weight * value
                flops[phase] = flops.get(phase, 0.0) + weight * training.batch_size * counted[phase]
            whole[kind] += seconds[precision, (kind, exit_step)] / len(training.denoising_steps)
        mean = sum(share * whole[kind] for kind, (_, share) in kinds.items())
        speeds.append(TrainingSpeed(
            precision, training.batch_size, training.max_num_frames, limit, cost(mean, sum(flops.values()), limit),
            whole["generator"], whole["critic"], {phase: cost(value, flops[phase], limit) for phase, value in split.items()},
        ))
    return speeds
