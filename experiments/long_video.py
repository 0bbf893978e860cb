"""Long video, measured: drift over thousands of frames, prompt switches, continued clips.

Dimensions: B batch, F frames.

    python -m experiments.long_video drift --num_frames 10000            frames right, stroke mass, motion, memory and time of one stream
    python -m experiments.long_video drift --checkpoint TF.pt --num_steps 50 --guidance 2 --num_frames 1260       the same in many steps
    python -m experiments.long_video switch --num_streams 256            how soon and how smoothly a new prompt is shown
    python -m experiments.long_video continue --num_videos 256           what the first block of a real held-out video becomes
    python -m experiments.long_video continue --given_frames 1            and what its first frame alone becomes

Each call adds a row, called --name, to a JSON file in results/, and for drift and switch plots all its rows. A row that exists is refused
at once, unless --replace is given. Frames are judged as they come and then dropped, so a stream of any length fits in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from statistics import median
from typing import Any

from machine.paths import REPOSITORY, user_path
from method.choices import DEVICES, MAX_SEED, PRECISIONS, SWITCHES, require


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Long video, measured: drift, prompt switches, continuation.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    drift = commands.add_parser("drift", help="one long stream")
    drift.add_argument("--num_frames", type=int, default=10_000)
    switch = commands.add_parser("switch", help="another prompt in mid-stream, for recache, keep and reset")
    switch.add_argument("--num_streams", type=int, default=256)
    switch.add_argument("--num_before", type=int, default=42, help="frames before the switch")
    switch.add_argument("--num_after", type=int, default=42)
    for command in (drift, switch):
        command.add_argument("--prompt_seed", type=int, default=0, help="of the held-out prompts: settings are chosen on others")
    go_on = commands.add_parser("continue", help="the first block of real held-out videos")
    go_on.add_argument("--num_videos", type=int, default=256)
    go_on.add_argument("--num_frames", type=int, default=21, help="frames that are made")
    go_on.add_argument("--given_frames", type=int, help="1, a picture alone, or whole blocks; default: a block")
    for command, batch_size in ((drift, 16), (switch, 32), (go_on, 32)):
        command.add_argument("--checkpoint", type=user_path, default=REPOSITORY / "pretrained" / "student.pt")
        command.add_argument("--name", help="of the row in the results; default: the checkpoint's name")
        command.add_argument("--window_frames", type=int)
        command.add_argument("--sink_frames", type=int)
        command.add_argument("--denoising_steps", type=int, nargs="+", help="few steps for a checkpoint that is no student")
        command.add_argument("--num_steps", type=int, help="many steps a block, for a teacher- or diffusion-forced checkpoint")
        command.add_argument("--causal", action="store_true", help="a bidirectional teacher block by block, in num_steps of Euler's method")
        command.add_argument("--guidance", type=float, help="weight of classifier-free guidance, 1 for none; default: the checkpoint's")
        command.add_argument("--batch_size", type=int, default=batch_size, help="videos at a time")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", choices=DEVICES, default="auto")
        command.add_argument("--precision", choices=PRECISIONS, default="auto")
        command.add_argument("--output_dir", type=user_path, default=REPOSITORY / "results" / "long_video")
        command.add_argument("--replace", action="store_true", help="put the row in the place of one of the same name")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments(None)  # --help, and what cannot be read, needs none of what is loaded next: torch takes seconds


import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments.timing import time_in_turns  # noqa: E402
from judging.digit_judge import DigitJudge, load_judge, read_videos  # noqa: E402
from judging.metrics import facts_of_prompts, read_classes, score_readings, share_interval  # noqa: E402
from judging.prompts import new_indices  # noqa: E402
from judging.tracking import fit_bouncing_track  # noqa: E402
from machine.files import replacing, require_writable  # noqa: E402
from machine.interruption import refusals_in_one_line  # noqa: E402
from machine.runtime import Runtime, code_digest, file_digest, resolve_runtime  # noqa: E402
from machine.seeds import Purpose  # noqa: E402
from method.plans import RolloutPlan  # noqa: E402
from method.settings import check_num_frames  # noqa: E402
from moving_mnist import MovingMNISTGenerator, bounce  # noqa: E402
from sampling.samplers import SamplerSettings, prepared, sample_few_step  # noqa: E402
from sampling.streaming import stream_video  # noqa: E402
from training.checkpoint import LoadedNetworks, load_networks  # noqa: E402

Setup = tuple[LoadedNetworks, RolloutPlan, Runtime, DigitJudge]
WINDOW = 21  # frames that are judged together
DRIFT_FIGURES = ("frames_right", "class_kept", "stroke_mass_ratio", "moving", "track_within_1px", "mean_speed")  # of a window
SEGMENT = 630  # frames of one point of the drift curves
COMPARED_FRAMES = 1000  # at both ends of a stream, between which memory is compared
TIMED_BLOCKS = 100  # at most, behind the end of a stream, in turns with a stream that is new
SHOWN_SHARE = 0.9  # of the streams: a new digit counts as shown
SMOOTH_PIXELS = 3.0  # from the extrapolated centre: a path counts as smooth
LINES_A_STRIP = 8
KEPT_MASS = 0.25  # relative change of the stroke mass, up to which it counts as kept
MIN_BEFORE = 4  # frames before a switch: the track one frame earlier is fitted to all but the last, at least three
ROW_KEYS = {  # that every row of a command has
    "drift": ("first_21", "segments", "segment_frames", "num_frames"), "switch": SWITCHES, "continue": ("continued", "real"),
}


def memory_in_use(device: torch.device) -> float:
    """MiB in use now, where the system tells; the peak so far elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def held_out_captions(networks: LoadedNetworks, count: int, seed: int) -> list[str]:
    """Captions of held-out videos that the network did not draw in training."""
    held_out = MovingMNISTGenerator(networks.config.dataset, "test", purpose=Purpose.LONG_VIDEO)
    return held_out.captions(seed, new_indices(held_out, [networks], seed, count))


def measure_drift(setup: Setup, asked: argparse.Namespace) -> dict[str, Any]:
    """One stream of batch_size videos, judged 21 frames at a time: figures of every segment; memory of its first and last windows; seconds
    a block of a new stream whose window has just filled and of this one at its end, timed in turns."""
    networks, plan, runtime, judge = setup
    config, num_frames, block_frames = networks.config.dataset, asked.num_frames, plan.num_frames_per_block
    prompts = held_out_captions(networks, asked.batch_size, asked.prompt_seed)
    digits, directions = facts_of_prompts(prompts)
    seeds = list(range(asked.seed, asked.seed + asked.batch_size))
    streams = [stream_video(networks.generator, networks.text_encoder, prompts, seeds, plan, runtime) for _ in range(2)]
    windows: list[dict[str, float]] = []
    memory: list[float] = []  # after each window
    held = next(streams[0]).cpu()
    for _ in tqdm(range(num_frames // WINDOW), unit="window", dynamic_ncols=True):
        while held.shape[1] < WINDOW:
            held = torch.cat([held, next(streams[0]).cpu()], dim=1)
        readings, held = read_videos(judge, held[:, :WINDOW]), held[:, WINDOW:]
        scores = score_readings(judge, readings, digits, directions, config)
        measures = {**scores.by_frame, **scores.of_videos, "mean_speed": fit_bouncing_track(readings.centres, config).speed}
        windows.append({name: measures[name].float().mean().item() for name in DRIFT_FIGURES})
        memory.append(memory_in_use(runtime.device))
    parts = [windows[first : first + SEGMENT // WINDOW] for first in range(0, len(windows), SEGMENT // WINDOW)]
    segments = [{name: sum(window[name] for window in part) / len(part) for name in DRIFT_FIGURES} for part in parts]
    filled = (plan.context.window_frames or 0) // block_frames  # blocks until the window is full
    compared = max(min(COMPARED_FRAMES // WINDOW, len(memory) // 2), 1)
    first_window = min(-(-filled * block_frames // WINDOW), len(memory) - 1)
    for _ in range(filled):
        next(streams[1])
    timed = {"new": lambda: next(streams[1]).cpu(), "old": lambda: next(streams[0]).cpu()}  # in turns: a busier machine slows both
    seconds = time_in_turns(timed, max(min(num_frames // block_frames // 10, TIMED_BLOCKS), 1), runtime.device)
    ends = {
        "memory_mib": [median(memory[first_window : first_window + compared]), median(memory[-compared:])],
        "seconds_per_block": [seconds["new"], seconds["old"]],
    }
    return {
        "first_21": windows[0], "segments": segments, "segment_frames": SEGMENT, "num_frames": len(windows) * WINDOW,
        "batch_size": asked.batch_size, "first_and_last": ends,
        "change": {name: last / first - 1 for name, (first, last) in ends.items()},
    }


def measure_switch(setup: Setup, asked: argparse.Namespace, switch: str) -> dict[str, Any]:
    """num_streams streams change to the caption of another digit after num_before frames; see `summarise_switch`."""
    networks, plan, runtime, judge = setup
    num_streams, num_before = asked.num_streams, asked.num_before
    captions = held_out_captions(networks, 40 * num_streams, asked.prompt_seed)
    all_digits = facts_of_prompts(captions)[0].tolist()
    later = iter(range(num_streams, len(captions)))
    taken = [next(index for index in later if all_digits[index] != own) for own in all_digits[:num_streams]]
    old, new = captions[:num_streams], [captions[index] for index in taken]
    num_blocks_before, num_blocks_after = (count // plan.num_frames_per_block for count in (num_before, asked.num_after))
    parts = []
    for first in tqdm(range(0, num_streams, asked.batch_size), desc=switch, unit="batch", dynamic_ncols=True):
        part = slice(first, first + asked.batch_size)
        seeds = list(range(asked.seed, asked.seed + num_streams))[part]
        stream = stream_video(
            networks.generator, networks.text_encoder, old[part], seeds, plan, runtime, num_blocks_before + num_blocks_after, switch
        )
        blocks = [next(stream) for _ in range(num_blocks_before)]
        blocks += [stream.send(new[part] if block == 0 else None) for block in range(num_blocks_after)]
        parts.append(read_videos(judge, torch.cat(blocks, dim=1).cpu()))
    probabilities, mass, centres = (torch.cat([getattr(part, name) for part in parts]) for name in ("probabilities", "mass", "centres"))
    classes = read_classes(probabilities, mass, judge.class_mass.cpu())
    digits = torch.tensor(all_digits[:num_streams]), torch.tensor([all_digits[index] for index in taken])
    return summarise_switch(classes, centres, digits, num_before, networks.config.dataset)


def summarise_switch(classes: Tensor, centres: Tensor, digits: tuple[Tensor, Tensor], num_before: int, config: Any) -> dict[str, Any]:
    """Of classes (B, F) and centres (B, F, 2); digits = (old, new), (B,) each, change at frame num_before.

    frames_until_shown: to the first frame in which `SHOWN_SHARE` of the streams show the new digit, None for never. path_error: pixels from
    the first centre after the switch to the extrapolated track before it; path_error_without: the same one frame earlier.
    """
    old, new = ((classes == digit.unsqueeze(1)).float().mean(dim=0) for digit in digits)  # (F,) shares
    shown = (new[num_before:] >= SHOWN_SHARE).nonzero().flatten().tolist()
    errors = {"path_error": _path_error(centres, num_before, config), "path_error_without": _path_error(centres, num_before - 1, config)}
    return {
        "frames_until_shown": shown[0] if shown else None, "share_of_new_at_end": new[-1].item(), "old_before": old[num_before - 1].item(),
        "share_of_new": new[num_before:].tolist(),
        **{f"{name}_median": error.median().item() for name, error in errors.items()},
        **{f"{name}_smooth_share": (error <= SMOOTH_PIXELS).float().mean().item() for name, error in errors.items()},
        "num_streams": len(classes),
    }


def _path_error(centres: Tensor, frame: int, config: Any) -> Tensor:
    """Distance (B,) of the centre in a frame from the extrapolated track of at most 20 frames before it."""
    before = centres[:, max(frame - WINDOW + 1, 0) : frame]
    track = fit_bouncing_track(before, config).track
    wall, span = (config.digit_size - 1) / 2, config.frame_size - config.digit_size
    expected = wall + bounce(2 * track[:, -1] - track[:, -2] - wall, span)  # the glyph's own offset is below a pixel
    return (centres[:, frame] - expected).norm(dim=-1)


def measure_continuation(setup: Setup, asked: argparse.Namespace) -> dict[str, Any]:
    """The first given_frames of real held-out videos, continued for num_frames frames; the real videos themselves beside it.

    stroke_mass_by_fifth: of the frames made over that of the frames given, by fifths of the videos in order of their ink. track_within_1px,
    direction_obeyed: of whole videos, with the given frames. first_error_median: pixels from the first made centre to the real video's.
    """
    networks, plan, runtime, judge = setup
    num_given = plan.num_frames_per_block if asked.given_frames is None else asked.given_frames
    num_videos, num_frames = asked.num_videos, asked.num_frames
    generator = MovingMNISTGenerator(networks.config.dataset, "test", purpose=Purpose.LONG_VIDEO)
    real = generator.sample(0, new_indices(generator, [networks], 0, num_videos), num_given + num_frames)
    seeds, continued = list(range(asked.seed, asked.seed + num_videos)), []
    for first in tqdm(range(0, num_videos, asked.batch_size), unit="batch", dynamic_ncols=True):
        part = slice(first, first + asked.batch_size)
        continued.append(sample_few_step(
            networks.generator, networks.text_encoder, real.captions[part], seeds[part], num_given + num_frames, plan, runtime,
            first_frames=real.video[part, :num_given].to(runtime.device),
        ).cpu())
    wanted, directions = facts_of_prompts(real.captions)
    results: dict[str, Any] = {"num_videos": num_videos, "num_frames": num_frames, "given_frames": num_given}
    readings = {"continued": read_videos(judge, torch.cat(continued)), "real": read_videos(judge, real.video)}
    for name, read in readings.items():
        scores = score_readings(judge, read, wanted, directions, networks.config.dataset)
        right = scores.by_frame["frames_right"][:, num_given:]
        given = read.mass[:, :num_given].mean(dim=1)
        ratio = read.mass[:, num_given:].mean(dim=1) / given
        change = (ratio - 1).abs()
        of_videos = {
            "right_in_every_frame": right.all(dim=1), "right_in_most_frames": right.float().mean(dim=1) > 0.5,
            "stroke_mass_kept": change <= KEPT_MASS,
            **{key: scores.of_videos[key] for key in ("track_within_1px", "direction_obeyed")},
        }
        of_videos["kept"] = of_videos["right_in_most_frames"] & of_videos["stroke_mass_kept"]
        results[name] = {"frames_right": right.float().mean().item(), "stroke_mass_change_median": change.median().item(),
                         "stroke_mass_by_fifth": [ratio[fifth].mean().item() for fifth in given.argsort().tensor_split(5) if len(fifth)],
                         "first_error_median": (read.centres - readings["real"].centres)[:, num_given].norm(dim=-1).median().item()}
        for key, values in of_videos.items():
            if len(values):
                results[name] |= {key: values.float().mean().item(), f"{key}_ci": share_interval(values)}
    return results


def read_rows(path: Path, command: str) -> dict[str, dict[str, Any]]:
    """The rows of earlier calls by name. Raises ValueError naming a file that holds anything else."""
    if not path.exists():
        return {}
    remedy = "move it away or choose another --output_dir"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the earlier rows in {path} ({error}): {remedy}") from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and set(ROW_KEYS[command]) <= set(row) for row in rows.values()):
        raise ValueError(f"{path} does not hold rows of {command}: {remedy}")
    return rows


def add_row(path: Path, command: str, name: str, row: dict[str, Any], replace: bool) -> dict[str, dict[str, Any]]:
    """Write the file with one more row, whole or not at all, then its plot; returns all rows. If another call has taken `name` meanwhile,
    and not replace, the new row is called "name (2)" and so on. Raises ValueError and OSError, with the file untouched."""
    rows = read_rows(path, command)
    names = (name, *(f"{name} ({number})" for number in range(2, len(rows) + 3)))
    rows[name if replace else next(each for each in names if each not in rows)] = row
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if command != "continue":
        with replacing(path.with_suffix(".png")) as temporary:
            {"drift": draw_drift, "switch": draw_switch}[command](temporary, rows)
    return rows


def draw_drift(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The segments' figures over the frame, on a logarithmic axis as rows differ in length: `LINES_A_STRIP` rows in a strip of panels, with
    their legend; all strips on the same axes."""
    names = {"frames_right": "frames right", "stroke_mass_ratio": "stroke mass over real", "mean_speed": "speed, pixels a frame",
             "track_within_1px": "windows within 1 px of a track"}
    strips = [list(rows.items())[first:first + LINES_A_STRIP] for first in range(0, len(rows), LINES_A_STRIP)]
    figure = Figure(figsize=(4.4 * len(names) + 3, 3.6 * len(strips)), layout="constrained")
    panels = figure.subplots(len(strips), len(names), sharex=True, sharey="col", squeeze=False)
    for strip, axes in zip(strips, panels, strict=True):
        for axis, (name, title) in zip(axes, names.items(), strict=True):
            for row, found in strip:
                starts = range(0, found["num_frames"], found["segment_frames"])
                frames = [WINDOW / 2, *((start + min(start + found["segment_frames"], found["num_frames"])) / 2 for start in starts)]
                axis.plot(frames, [found["first_21"][name], *(segment[name] for segment in found["segments"])], marker=".", label=row)
            axis.set(title=title, xlabel="frame", xscale="log")
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.3)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    figure.savefig(path, dpi=90)


def draw_switch(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Share of the streams that show the new digit over the frames since the switch, a line for each way to switch."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for row, found in rows.items():
        for how in SWITCHES:
            axis.plot(found[how]["share_of_new"], marker=".", label=f"{row}, {how}")
    axis.axhline(SHOWN_SHARE, color="grey", linewidth=0.8)
    axis.set(title="streams that show the new digit", xlabel="frames since the switch", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def check_arguments(arguments: argparse.Namespace, path: Path, name: str) -> None:
    """Raise ValueError or OSError for what can be refused before the checkpoint is read. path, name: of the new row."""
    asked = vars(arguments)
    for option in {"seed", "prompt_seed"} & asked.keys():
        require(0 <= asked[option] <= MAX_SEED, f"--{option}", asked[option], f"0 to {MAX_SEED}")
    if arguments.command == "drift":
        require(arguments.num_frames >= 2 * WINDOW, "--num_frames", arguments.num_frames, f"at least {2 * WINDOW}")
    if arguments.command == "switch":
        wanted = f"at least {MIN_BEFORE}, to fit a track, in blocks"
        require(arguments.num_before >= MIN_BEFORE, "--num_before", arguments.num_before, wanted)
    for option in {"batch_size", "num_streams", "num_videos", "given_frames"} & asked.keys():
        require(asked[option] is None or asked[option] >= 1, f"--{option}", asked[option], "at least 1")
    require_writable(path.parent)
    if name in read_rows(path, arguments.command) and not arguments.replace:
        raise ValueError(f"{path} has a row {name!r} already: choose another --name, or give --replace to measure that row again")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, add to the JSON file, draw. Raises ValueError and OSError, each with one line."""
    command = arguments.command
    path, name = arguments.output_dir / f"{command}.json", arguments.name or arguments.checkpoint.stem
    check_arguments(arguments, path, name)
    settings = SamplerSettings(
        None if arguments.denoising_steps is None else tuple(arguments.denoising_steps), arguments.num_steps, arguments.guidance,
        window_frames=arguments.window_frames, sink_frames=arguments.sink_frames, causal=arguments.causal,
    )
    runtime = resolve_runtime(arguments.device, arguments.precision)
    networks = prepared(load_networks(arguments.checkpoint, runtime.device), runtime)
    plan = settings.make_plan(networks.config.training)
    if not isinstance(plan, RolloutPlan):
        raise ValueError(f"{arguments.checkpoint} makes all frames at once: give --causal to roll it out")
    judge = load_judge()
    judge.check_matches(networks.config.dataset)
    for option in {"switch": ("num_before", "num_after"), "continue": ("num_frames",)}.get(command, ()):
        check_num_frames(f"--{option}", getattr(arguments, option), plan.num_frames_per_block)
    setup = networks, plan, runtime, judge
    if command == "switch":
        found = {how: measure_switch(setup, arguments, how) for how in SWITCHES}
    else:
        found = measure_drift(setup, arguments) if command == "drift" else measure_continuation(setup, arguments)
    found |= {
        "window_frames": plan.context.window_frames, "sink_frames": plan.context.sink_frames, "device": runtime.device.type,
        "precision": runtime.precision, "seed": arguments.seed,
        "prompt_seed": getattr(arguments, "prompt_seed", None), "num_steps": len(plan.times), "guidance": plan.guidance,
        "judge_held_out_accuracy": judge.config.accuracy, "evaluations_a_block": plan.evaluations,
        "cache_evaluations_a_block": plan.cache_evaluations, "checkpoint_sha256": file_digest(arguments.checkpoint),
        "code_sha256": code_digest("experiments.long_video"),
    }
    print(json.dumps({key: value for key, value in found.items() if key != "segments"}, indent=2), flush=True)  # whatever the disk says
    rows = add_row(path, command, name, found, arguments.replace)
    print(f"written to {path}, row {next(row for row in rows if rows[row] is found)!r}")
    return found


def main(argv: list[str] | None = None) -> None:
    with refusals_in_one_line("a row is written once all of it is measured; the earlier ones still stand"):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
