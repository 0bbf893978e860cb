"""Speed, as ratios and shares measured in one run: what generation and training take, and how much of it is arithmetic.

    python -m experiments.benchmark [--parts generation teacher training] [--batch_sizes 1 4 16] [--precisions float32 bfloat16]
                        [--num_frames 21] [--repeats 5] [--compile] [--int8] [--output PATH.json]

Parts: "generation", the student with its KV cache, split into phases, and the same rollout with the past recomputed; "teacher", its
teacher; "training", a step of Self-Forcing; "public", an untrained network of ours beside a clone of the public Self-Forcing code at the
same size (docs/speed.md).

The contestants take turns; every figure is a median, also the limit: the FLOPs a second of a large matrix product (of floats, for the
student in 8-bit integers too). Quote ratios and shares of one run, never figures of two machines.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from machine.paths import PRETRAINED, user_path
from method.choices import require

PARTS = ("generation", "teacher", "training", "public")  # the last only where asked for: it needs a clone
PRECISIONS = ("float32", "bfloat16")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of generation and training, measured in one run.", allow_abbrev=False)
    parser.add_argument("--student", type=user_path, default=PRETRAINED / "student.pt")
    parser.add_argument("--teacher", type=user_path, default=PRETRAINED / "teacher.pt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]))
    parser.add_argument("--public_code", type=user_path, metavar="DIR", help="clone of the public code, for --parts public")
    parser.add_argument("--patch_sizes", type=int, nargs="+", default=[4, 8], help="of --parts public: pixels a side")
    parser.add_argument("--num_frames", type=int, default=21, help="of every video, in training too")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], help="of generation")
    parser.add_argument("--training_batch_size", type=int, help="default: that of `python train.py`")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true", help="the student compiled, too, as by generate.py --compile")
    parser.add_argument("--int8", action="store_true", help="and compiled with products in 8-bit integers, as by --compile --int8")
    parser.add_argument("--output", type=user_path, metavar="PATH.json", help="write every figure there too; an older file is replaced")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments(None)  # --help, and what cannot be read, needs none of what is loaded next: torch takes seconds

import torch  # noqa: E402

from experiments.public_code import check_clone  # noqa: E402
from experiments.speed import PUBLIC, make_samplers, measure_generation, measure_side_by_side, measure_training  # noqa: E402
from machine.files import require_writable  # noqa: E402
from machine.interruption import refusals_in_one_line  # noqa: E402
from machine.runtime import Runtime, describe_machine, resolve_runtime  # noqa: E402
from training.checkpoint import load_networks  # noqa: E402
from training.config import check_parts_fit, compose_run  # noqa: E402


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError for what can be refused before a checkpoint is read."""
    for name, value in (("repeats", arguments.repeats), ("batch_sizes", min(arguments.batch_sizes))):
        require(value >= 1, f"--{name}", value, "at least 1")
    if "public" in arguments.parts:
        check_clone(arguments.public_code)
    if arguments.public_code is not None and "public" not in arguments.parts:
        raise ValueError(f"--public_code is {arguments.public_code}, but nothing is measured beside it: give --parts public too")
    if arguments.int8 and not arguments.compile:
        raise ValueError("--int8 is the compiled student once more, in 8-bit integers: give --compile too")
    output = arguments.output
    if output is not None and (output.suffix != ".json" or output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output is {output}: expected a file name ending in .json, in a folder that exists")
    if output is not None:
        require_writable(output.parent, "--output")


def print_split(split: dict[str, dict[str, float]]) -> None:
    whole = sum(part["seconds"] for part in split.values())
    print(f"    {'':<34}{'ms':>9}{'of time':>9}{'GFLOP':>9}{'of limit':>10}")
    for phase, part in split.items():
        share = f"{part['share_of_limit']:10.1%}" if part["flops"] else f"{'-':>10}"
        print(f"    {phase:<34}{1e3 * part['seconds']:9.1f}{part['seconds'] / whole:9.1%}{part['flops'] / 1e9:9.2f}{share}")


def print_limit(rows: list[dict[str, Any]]) -> None:
    limits = {row["precision"]: row["limit"] for row in rows}
    print(f"  limit: {', '.join(f'{1e-9 * limit:.0f} GFLOP/s in {precision}' for precision, limit in limits.items())}", flush=True)


def print_generation(rows: list[dict[str, Any]]) -> None:
    """One table for one batch size: all samplers, then the split of the student's time."""
    print(f"\nbatch {rows[0]['batch_size']}, {rows[0]['num_frames']} frames")
    print(f"  {'':<24}{'frames/s':>10}{'seconds':>10}{'GFLOP':>9}{'of limit':>10}{'first block':>13}{'block':>10}{'student is':>12}")
    students = {row["precision"]: row for row in rows if row["sampler"] == "student"}
    for row in rows:
        whole, student = row["whole"], students[row["precision"]]
        end = f"{whole['seconds'] / student['whole']['seconds']:33.1f} x"
        if row is student:
            end = f"{1e3 * row['first_block_seconds']:10.1f} ms{1e3 * row['block_seconds']:7.1f} ms"
        name = f"{row['sampler']}, {row['precision']}"
        print(f"  {name:<24}{row['frames_per_second']:10.1f}{whole['seconds']:10.3f}{whole['flops'] / 1e9:9.1f}"
              f"{whole['share_of_limit']:10.1%}{end}")
    for precision, row in students.items():
        print(f"  student in {precision}:")
        print_split(row["split"])
        print(f"    writing them: GIF {1e3 * row['gif_seconds']:.1f} ms, npz {1e3 * row['npz_seconds']:.1f} ms")
    print_limit(rows)


def print_training(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"\ntraining step of Self-Forcing in {row['precision']}, batch {row['batch_size']}, {row['num_frames']} frames: "
              f"{row['whole']['seconds']:.2f} s on average, {row['generator_turn_seconds']:.2f} s where the generator learns too, "
              f"{row['critic_turn_seconds']:.2f} s where the critic alone does; {row['whole']['share_of_limit']:.1%} of the limit")
        print_split(row["split"])
    print_limit(rows)


def print_side_by_side(row: dict[str, Any]) -> None:
    sizes, rates = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in row["parameters"].items()), row["frames_per_second"]
    print(f"\nbeside the public code: patches of {row['patch_size']}, {row['num_frames']} frames, batch 1, float32; parameters: {sizes}")
    for sampler, rate in rates.items():
        ratio = "" if sampler == PUBLIC else f", {rate / rates[PUBLIC]:.2f} times the public code"
        print(f"  {sampler}: {rate:.1f} frames/s{ratio}", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write. Raises CheckpointError, ValueError and OSError, each with one line."""
    check_arguments(arguments)
    parts, num_frames, repeats = arguments.parts, arguments.num_frames, arguments.repeats
    runtimes: dict[str, Runtime] = {precision: resolve_runtime(arguments.device, precision) for precision in arguments.precisions}
    device = next(iter(runtimes.values())).device
    student, teacher = load_networks(arguments.student, device), load_networks(arguments.teacher, device)
    variants = ("student", *(["compiled"] if arguments.compile else []), *(["int8"] if arguments.int8 else []))
    compared = (student, teacher if "teacher" in parts else None, variants, "generation" in parts, num_frames)
    samplers = {precision: make_samplers(*compared, runtime) for precision, runtime in runtimes.items()}
    sizes = {} if arguments.training_batch_size is None else {"batch_size": arguments.training_batch_size}
    teacher_path = str(arguments.teacher)
    training = replace(
        compose_run([]).training, pretrained_checkpoint=teacher_path, min_num_frames=num_frames, max_num_frames=num_frames, **sizes
    )
    training_run = replace(teacher.config, training=training)
    check_parts_fit(training_run)

    machine = describe_machine(torch.get_num_threads())
    print(f"{machine}; {device}; medians of {repeats}")
    results: dict[str, Any] = {"machine": machine, "device": str(device), "repeats": repeats, "parts": parts}
    if "generation" in parts or "teacher" in parts:
        results["generation"] = []
        for batch_size in arguments.batch_sizes:
            rows = measure_generation(samplers, runtimes, batch_size, num_frames, repeats)
            print_generation(rows)
            results["generation"] += rows
    if "public" in parts:
        results["public"] = []
        for patch_size in arguments.patch_sizes:
            row = measure_side_by_side(arguments.public_code, student, patch_size, variants, num_frames, repeats)
            print_side_by_side(row)
            results["public"].append(row)
    if "training" in parts:
        results["training"] = measure_training(training_run, runtimes, repeats)
        print_training(results["training"])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {arguments.output}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with refusals_in_one_line():
        run(arguments)


if __name__ == "__main__":
    main()
