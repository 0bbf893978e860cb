"""Generate videos from prompts: `python generate.py --prompts "a handwritten 7 drifting up" --num_frames 21`.

Dimensions: B batch, F frames, C channels, H height, W width.

A student (training type "dmd2", "causal_ode" or "causal_consistency") makes a video block by block in its few denoising steps; a
teacher ("pretrain") denoises all frames at once in many steps with guidance, or block by block if it was trained causally.

    --num_steps N             on a student: N Euler steps for each block
    --causal --num_steps 4    on a teacher: Euler steps with guidance, block by block: the baseline of a student
    --denoising_steps ...     on a teacher: block by block with fresh noise and without guidance, which it was not trained for

A JSON beside every video says how it was made; the same call writes the same files, byte for byte. Sample k of every prompt uses seed
`--seed` + k, so a video is a function of (prompt, seed, checkpoint, settings); the rest of its batch changes it by rounding only, of
floats or, with --int8, of 8-bit integers.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import argparse
import json
import re
import sys
import time
import unicodedata
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine.paths import PRETRAINED, user_path
from method.choices import DEVICES, MAX_SEED, PRECISIONS, SWITCHES, require

DEFAULT_CHECKPOINT = PRETRAINED / "student.pt"
DEFAULT_PROMPTS = {  # by the number of digits that the checkpoint's data show
    1: (
        "a handwritten 7 drifting up", "the digit 3 moving to the right quickly", "the number five sliding down and left slowly",
        "a 0 gliding to the upper right steadily", "handwritten digit 4 bouncing around", "the digit eight",
    ),
    2: (
        "a handwritten 7 drifting up and the digit 3 moving to the right quickly", "digits 1 and 8 bouncing around",
        "the number five sliding down slowly and a 0 gliding left", "two handwritten digits 4 and 6",
    ),
}
FORMATS = ("gif", "mp4", "png", "npz")
VERSIONED = ("torch", "numpy", "imageio", "imageio-ffmpeg", "pillow")  # packages that determine a file's bytes
DEFAULT_SWITCH = "recache"
MAX_SLUG_LENGTH = 60  # characters of the prompt in a file name
MAX_LABEL_LENGTH = 160  # characters of the prompt in the contact sheet
MAX_SHEET_ROWS = 64  # videos in the contact sheet


def _path(text: str) -> Path | None:
    """None for an empty text, refused later: `Path("")` would be the current folder."""
    return user_path(text) if text else None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate videos from prompts with a trained student or teacher.", allow_abbrev=False,
        epilog="Sample k of every prompt uses seed --seed + k. Existing files are never overwritten.",
    )
    parser.add_argument("--checkpoint", type=_path, default=DEFAULT_CHECKPOINT, help="default: pretrained/student.pt of this repository")
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="default: a few that show the grammar; \"\" is no prompt")
    parser.add_argument(
        "--schedule", nargs="+", metavar="FRAME:PROMPT", help="prompts that take turns in one video: \"0: a 3\" \"42: a 7 moving left\""
    )
    parser.add_argument("--switch", choices=SWITCHES, help=f"the cache, when --schedule changes the prompt; default: {DEFAULT_SWITCH}")
    parser.add_argument("--init", type=user_path, metavar="PATH", help="continue this picture or clip: PNG (a strip too), GIF, MP4 or npz")
    parser.add_argument("--window_frames", type=int, help="frames that a block sees, itself included; default: as trained")
    parser.add_argument("--sink_frames", type=int, help="initial frames kept in the cache; default: as trained")
    parser.add_argument("--samples_per_prompt", type=int, default=1)
    parser.add_argument("--num_frames", type=int, help="a multiple of the block; default: the longest video of the training")
    parser.add_argument("--output_dir", type=_path, default=Path("outputs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument(
        "--denoising_steps", type=int, nargs="+", metavar="TIMESTEP",
        help="block by block in these few steps, such as 1000 750 500 250; default of a student: as it was trained",
    )
    parser.add_argument("--num_steps", type=int, help="many steps instead; default of a teacher: as in its training samples")
    parser.add_argument("--causal", action="store_true", help="a teacher block by block, in num_steps of Euler's method with guidance")
    parser.add_argument("--eta", type=float, help="fresh noise in a teacher's steps: 0 is Euler's method, 1 ancestral sampling")
    parser.add_argument("--ink_kept", type=float, help="share kept of what a teacher's guidance adds along the ink; 1 is plain guidance")
    parser.add_argument("--guidance", type=float, help="1 is none; default: none for a student or denoising steps, else the checkpoint's")
    parser.add_argument("--batch_size", type=int, default=8, help="videos a forward pass")
    parser.add_argument("--compile", action="store_true", help="compile first: pays from some ten thousand frames on; needs a C++ compiler")
    parser.add_argument("--int8", action="store_true", help="matrix products in 8-bit integers, on a CPU: faster with --compile")
    parser.add_argument("--format", choices=FORMATS, default="gif", help="png is a strip of frames, npz the raw array in [-1, 1]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments(None)  # --help, and what cannot be read, needs none of what is loaded next: torch takes seconds

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from clips.own_videos import VideosConfig  # noqa: E402
from clips.video_files import load_frames  # noqa: E402
from machine.files import free_paths, require_writable  # noqa: E402
from machine.interruption import refusals_in_one_line  # noqa: E402
from machine.runtime import code_digest, file_digest, resolve_runtime  # noqa: E402
from method.plans import BidirectionalPlan  # noqa: E402
from method.settings import TrainingConfig  # noqa: E402
from sampling.samplers import SamplerSettings, check_length, generate, prepared  # noqa: E402
from sampling.streaming import PromptSchedule  # noqa: E402
from sampling.video_io import contact_sheet, save_array, save_video, to_display  # noqa: E402
from training.checkpoint import LoadedNetworks, load_networks  # noqa: E402


def slug(prompt: str) -> str:
    """The prompt as a part of a file name: a-z, 0-9 and single hyphens, at most `MAX_SLUG_LENGTH`, never empty."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:MAX_SLUG_LENGTH].strip("-") or "untitled"


def write_videos(folder: Path, videos: Tensor, prompts: list[str], seeds: list[int], suffix: str, facts: dict[str, Any]) -> Path:
    """Write every video with a JSON beside it, contact_sheet.png and generation.json, overwriting nothing; returns the path of the sheet.
    videos: (B, F, C, H, W), clamped to [-1, 1] here. suffix: one of `FORMATS`. facts: what holds for all videos."""
    stems = [f"{index:03d}_{slug(prompt)}_seed{seed}" for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    names = [f"{stem}.{kind}" for kind in (suffix, "json") for stem in stems]
    *paths, sheet_path, facts_path = free_paths(folder, [*names, "contact_sheet.png", "generation.json"])
    listed = []
    for path, video, prompt, seed in zip(paths[:len(stems)], videos, prompts, seeds, strict=True):
        if suffix == "npz":
            save_array(path, video, prompt)
        else:
            save_video(path, to_display(video))
        listed.append({"file": path.name, "prompt": prompt, "seed": seed})
        _write_json(path.with_suffix(".json"), {**listed[-1], **facts})
    labels = [
        f"{prompt[:MAX_LABEL_LENGTH]}{'...' if len(prompt) > MAX_LABEL_LENGTH else ''} (seed {seed})"
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    contact_sheet(sheet_path, to_display(videos[:MAX_SHEET_ROWS]), labels[:MAX_SHEET_ROWS])
    _write_json(facts_path, {**facts, "contact_sheet": sheet_path.name, "videos": listed})
    return sheet_path


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")  # ASCII: other characters are escaped


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong whatever the checkpoint."""
    require(arguments.samples_per_prompt >= 1, "--samples_per_prompt", arguments.samples_per_prompt, "at least 1")
    require(arguments.batch_size >= 1, "--batch_size", arguments.batch_size, "at least 1")
    for name, path in (("checkpoint", arguments.checkpoint), ("output_dir", arguments.output_dir)):
        if path is None:
            raise ValueError(f"--{name} is empty: expected a path")
    if arguments.switch and not arguments.schedule:
        raise ValueError(f"--switch is {arguments.switch}, but no prompt changes without --schedule: give that too, or leave --switch out")
    if arguments.prompts and arguments.schedule:
        raise ValueError("--prompts and --schedule exclude each other: the schedule names all prompts of its video")
    require(0 <= arguments.seed <= MAX_SEED, "--seed", arguments.seed, f"0 to {MAX_SEED}")
    for prompt in (*(arguments.prompts or ()), *(arguments.schedule or ())):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {prompt!r} is not valid text: give it in UTF-8") from error


def default_prompts(networks: LoadedNetworks) -> tuple[str, ...]:
    """Prompts that the network knows; the empty one if it learned videos without captions. Raises ValueError for captions of own videos."""
    dataset, words = networks.config.dataset, networks.text_encoder.vocabulary
    if isinstance(dataset, VideosConfig):
        if words:
            known = ", ".join(words[:40])
            raise ValueError(f"--prompts is not given: expected captions like those of your videos, of words such as {known}")
        return ("",)
    return DEFAULT_PROMPTS[dataset.num_digits] if dataset.class_names is None else tuple(f"the {name}" for name in dataset.class_names)


def default_length(training: TrainingConfig, first_frames: Tensor | None) -> int:
    """The longest video of the training; with a given clip, that clip and as many whole blocks as fit, at least one."""
    if first_frames is None:
        return training.max_num_frames
    given, block = len(first_frames), training.num_frames_per_block
    return given + max((training.max_num_frames - given) // block, 1) * block


def run(arguments: argparse.Namespace) -> None:
    """Load, sample, write, report. Raises CheckpointError, ValueError and OSError, each with one line."""
    # 1. Check the request, before anything is computed or written.
    check_arguments(arguments)
    steps = arguments.denoising_steps
    wishes = ("num_steps", "guidance", "eta", "ink_kept", "window_frames", "sink_frames", "causal")
    settings = SamplerSettings(None if steps is None else tuple(steps), **{name: getattr(arguments, name) for name in wishes})
    schedule = None if arguments.schedule is None else PromptSchedule.parse(arguments.schedule, arguments.switch or DEFAULT_SWITCH)
    runtime = resolve_runtime(arguments.device, arguments.precision)
    options = ("--compile" if arguments.compile else None, "--int8" if arguments.int8 else None)
    networks = prepared(load_networks(arguments.checkpoint, runtime.device), runtime, *options)
    training, model = networks.config.training, networks.config.model
    plan = settings.make_plan(training)
    first_frames = None if arguments.init is None else load_frames(arguments.init, model.frame_size, model.channels)
    num_frames = default_length(training, first_frames) if arguments.num_frames is None else arguments.num_frames
    check_length(num_frames, plan, training, schedule, first_frames)
    require_writable(arguments.output_dir)
    facts = {  # what makes the videos reproducible: no time, no path, and of the machine only what the numbers depend on
        "checkpoint": {
            "name": arguments.checkpoint.name, "sha256": file_digest(arguments.checkpoint), "training_type": training.training_type,
            "step": networks.step,
        },
        "sampler": {
            "kind": "bidirectional" if isinstance(plan, BidirectionalPlan) else "causal", "requested": asdict(settings),
            "plan": asdict(plan), "time_shift": training.time_shift,
            "evaluations_a_block": plan.evaluations, "cache_evaluations_a_block": plan.cache_evaluations,
        },
        "num_frames": num_frames, "batch_size": arguments.batch_size, "device": runtime.device.type, "precision": runtime.precision,
        "versions": {**{name: version(name) for name in VERSIONED}, "code_sha256": code_digest()},
        "compiled": arguments.compile, "int8": arguments.int8,
        "schedule": None if schedule is None else asdict(schedule),
        "init": None if arguments.init is None else {"name": arguments.init.name, "num_frames": len(first_frames)},
    }
    # 2. Sample.
    asked = arguments.prompts or (schedule and [schedule.entries[0][1]]) or default_prompts(networks)
    prompts = [prompt for prompt in asked for _ in range(arguments.samples_per_prompt)]
    seeds = [arguments.seed + sample for _ in asked for sample in range(arguments.samples_per_prompt)]
    cost = f"{plan.evaluations} + {plan.cache_evaluations} evaluations a block"
    kind = facts["sampler"]["kind"]
    print(f"{arguments.checkpoint.name}: {training.training_type}, step {networks.step}, {kind}, {cost}, on {runtime}")
    start = time.perf_counter()
    videos = generate(networks, prompts, seeds, num_frames, settings, runtime, arguments.batch_size, show_progress=True,
                      schedule=schedule, first_frames=first_frames)
    seconds = time.perf_counter() - start
    # 3. Write and report.
    titles = prompts if schedule is None else [str(schedule)] * len(prompts)
    sheet = write_videos(arguments.output_dir, videos, titles, seeds, arguments.format, facts)
    if sheet.name != "contact_sheet.png":
        number = sheet.stem.removeprefix("contact_sheet")
        print(f"files of an earlier call are in {arguments.output_dir}: this call's names end in {number}")
    frames_per_second = len(prompts) * num_frames / seconds
    print(
        f"{len(prompts)} video{'s' if len(prompts) > 1 else ''} of {num_frames} frames in {seconds:.2f} s "
        f"({frames_per_second:.1f} frames/s, sampling only), written to {arguments.output_dir}; contact sheet {sheet.name}"
    )


def main(argv: list[str] | None = None) -> None:
    """Exits with status 1 and one line for bad input, 2 for an unreadable command line, 130 on Ctrl-C."""
    arguments = parse_arguments(argv)
    unwritten = "videos are written once all are sampled, so some or all of this call's are missing"
    with warnings.catch_warnings(), refusals_in_one_line(unwritten):
        # One line without source code; put back by catch_warnings.
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        try:
            run(arguments)
        except (torch.OutOfMemoryError, MemoryError):
            sys.exit("error: out of memory: choose a smaller --batch_size")
        except ImportError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
