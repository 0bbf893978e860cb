"""Speed, as ratios measured in one run: student against teacher, and the KV cache against recomputing the past.

    python benchmark.py [--student PATH] [--teacher PATH] [--num_frames 21] [--batch_sizes 1 16] [--repeats 5]

Machines are noisy: the compared samplers take turns, each figure is the median of its repeats, and the ratios are what
to quote.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import LoadedNetworks, load_networks
from flow_matching import add_noise, x_0_from_velocity
from rollout import RolloutPlan, draw_noise, few_step_plan, make_noise_streams
from runtime import Runtime, describe_machine, resolve_runtime
from sampling import sample_few_step, sample_many_step, teacher_plan
from training_config import SelfForcingConfig, check_num_frames

PRETRAINED = Path(__file__).parent / "pretrained"
PROMPT = "a handwritten 7 drifting up and to the left"
MATRIX_SIZE = 1024


@torch.no_grad()
def sample_without_cache(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan, runtime: Runtime
) -> Tensor:
    """The few-step rollout with the past recomputed at every pass: the same videos (B, F, C, H, W), only slower.

    What a rollout costs without a KV cache. Raises ValueError for a student trained with context noise.
    """
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
                v = model.forward_block_causal(whole, whole_t, prompt, plan.num_frames_per_block)[:, past.shape[1]:]
                x_0 = x_0_from_velocity(x_t, v, t)
                if step + 1 < len(plan.times):
                    x_t = add_noise(x_0, draw_noise(streams, shape, runtime.device), torch.full_like(t, plan.times[step + 1]))
            past = torch.cat([past, x_0], 1)
    return past.float()


def time_in_turns(samplers: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each sampler; one warm-up of each, then all of them in turn, `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False):
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_limit(runtime: Runtime) -> float:
    """Floating-point operations a second of a large square product in the runtime's format."""
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=runtime.device, dtype=runtime.dtype)
    seconds = time_in_turns({"product": lambda: [a @ a for _ in range(10)][-1].sum().item()}, 5)["product"]
    return 10 * 2 * MATRIX_SIZE**3 / seconds


def benchmark(student: LoadedNetworks, teacher: LoadedNetworks, runtime: Runtime, num_frames: int, batch_size: int, repeats: int) -> None:
    """Print one table for one batch size."""
    config = student.config.training
    assert isinstance(config, SelfForcingConfig)
    plan = few_step_plan(config)
    prompts, seeds = [PROMPT] * batch_size, list(range(batch_size))
    few = (prompts, seeds, num_frames, plan, runtime)
    many = (prompts, seeds, num_frames, teacher_plan(teacher.config.training), runtime)
    names = {
        "student": f"student, {len(plan.times)} steps a block, KV cache",
        "recompute": f"student, {len(plan.times)} steps a block, no cache",
        "teacher": f"teacher, {teacher.config.training.teacher_steps} guided steps",
    }
    seconds = time_in_turns({
        "student": lambda: sample_few_step(student.generator, student.text_encoder, *few),
        "recompute": lambda: sample_without_cache(student, *few),
        "teacher": lambda: sample_many_step(teacher.generator, teacher.text_encoder, *many),
    }, repeats)
    print(f"\nbatch {batch_size}, {num_frames} frames of {student.config.model.frame_size} px")
    for key, name in names.items():
        rate = batch_size * num_frames / seconds[key]
        print(f"  {name:<42} {rate:9.1f} frames/s {seconds[key]:8.3f} s   student is {seconds[key] / seconds['student']:5.1f} x")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of student, teacher and KV cache, as ratios measured in one run.")
    parser.add_argument("--student", type=Path, default=PRETRAINED / "student.pt")
    parser.add_argument("--teacher", type=Path, default=PRETRAINED / "teacher.pt")
    parser.add_argument("--num_frames", type=int, default=21)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    try:
        for precision in options.precisions:
            runtime = resolve_runtime(options.device, precision)
            student, teacher = load_networks(options.student, runtime.device), load_networks(options.teacher, runtime.device)
            if not isinstance(student.config.training, SelfForcingConfig):
                raise ValueError(f"--student {options.student} is a teacher: expected a checkpoint of Self-Forcing")
            check_num_frames("--num_frames", options.num_frames, student.config.training.num_frames_per_block)
            if options.repeats < 1 or min(options.batch_sizes) < 1:
                raise ValueError("--repeats and --batch_sizes: expected at least 1")
            machine, limit = describe_machine(torch.get_num_threads()), matrix_limit(runtime) / 1e9
            print(f"\n{machine}; {runtime}: {limit:.0f} GFLOP/s in a {MATRIX_SIZE}-squared product")
            for batch_size in options.batch_sizes:
                benchmark(student, teacher, runtime, options.num_frames, batch_size, options.repeats)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
