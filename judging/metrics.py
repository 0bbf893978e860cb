"""What Moving MNIST lets us measure exactly, for videos of one digit: its class, its track, its direction, its look.

Dimensions: B videos, F frames, C channels, H = W frame side. Videos are (B, F, C, H, W) in [-1, 1] and are clamped first. Positions are (x,
y) in pixel indices, x to the right and y down.

Read a generated video's score against that of real videos of held-out digits, not against 1. A faint, blank, saturated or frozen video
earns nothing: classes and tracks are gated on stroke mass, tracks on speed too. `sanity` shows which fault moves which measure.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from math import pi
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional

from judging.corruptions import CORRUPTIONS, corrupt
from judging.digit_judge import JUDGE_PATH, DigitJudge, VideoReadings, load_judge, read_videos, save_network, train_judge
from judging.distribution import resampled_counts
from judging.tracking import fit_bouncing_track
from machine.interruption import refusals_in_one_line
from machine.paths import at_home
from machine.seeds import Purpose, torch_generator
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig, MovingMNISTGenerator
from network.text_encoder import parse_caption

MASS_GATE = (0.4, 2.5)  # a frame counts as a digit if its stroke mass over the class's mean real mass lies in here
NO_DIGIT = -1  # what `read_classes` says of a frame outside the gate
NO_DIRECTION = -1  # direction of a prompt that names none
TRACK_TOLERANCE = 1.0  # pixels
RESAMPLES = 1000  # of a bootstrap
MOVING_SHARE = 0.5  # a video moves if its fitted speed is at least this share of the data's slowest speed
FRAMES_PER_BLOCK = 3  # for the report by block only
LEVEL = 0.95  # of the intervals
MIN_REAL, MIN_FALL = 0.9, 0.2  # self-test: least score of real videos, least loss of videos made worse
SELF_TEST = {  # what must fall
    "real": None, "wrong prompts": "direction_obeyed", "faint": "frames_right", "frozen": "moving", "shuffled": "track_within_1px",
    "blurred": "frames_right",
}


def read_classes(probabilities: Tensor, mass: Tensor, class_mass: Tensor) -> Tensor:
    """The class (B, F) of every frame: the most probable one of (B, F, 10), or `NO_DIGIT` if the stroke mass (B, F) over that class's mean
    real mass, class_mass (10,), is outside `MASS_GATE`: a thin "one" has a third of the ink of a "zero"."""
    classes = probabilities.argmax(dim=-1)
    ratio = mass / class_mass[classes]
    return torch.where((ratio >= MASS_GATE[0]) & (ratio <= MASS_GATE[1]), classes, NO_DIGIT)


def videos_right(classes: Tensor, digits: Tensor) -> Tensor:
    """Videos (B,) in which the prompt's digit is read in more frames than any other class, `NO_DIGIT` included."""
    votes = functional.one_hot(classes + 1, NUM_CLASSES + 1).sum(dim=1)  # (B, 11), NO_DIGIT first
    is_prompt = functional.one_hot(digits + 1, NUM_CLASSES + 1).bool()
    return votes[is_prompt] > votes.masked_fill(is_prompt, 0).amax(dim=1)


def class_kept(classes: Tensor) -> Tensor:
    """Frames (B, F) that are read as the digit read most often in their video, right or wrong, of classes (B, F)."""
    votes = functional.one_hot(classes + 1, NUM_CLASSES + 1).sum(dim=1)[:, 1:]  # (B, 10)
    return classes == votes.argmax(dim=1, keepdim=True)


def is_moving(speed: Tensor, classes: Tensor, config: DatasetConfig) -> Tensor:
    """Videos (B,) that move: the fitted speed (B,) is at least `MOVING_SHARE` of the data's slowest one, and more than half of the frames
    show some digit, classes (B, F) of `read_classes`: the haze of a blank video moves too."""
    return (speed >= MOVING_SHARE * config.min_speed) & ((classes != NO_DIGIT).float().mean(dim=1) > 0.5)


def track_within(error: Tensor, moving: Tensor) -> Tensor:
    """Videos (B,) that move and keep to the fitted track: root-mean-square distance, error (B, F), within `TRACK_TOLERANCE`."""
    return moving & (error.square().mean(dim=1).sqrt() <= TRACK_TOLERANCE)


def direction_obeyed(velocity: Tensor, moving: Tensor, directions: Tensor) -> Tensor:
    """Videos (B,) that move and start in the prompt's octant, directions (B,). velocity: (B, 2) of `fit_bouncing_track`."""
    angle = torch.atan2(-velocity[:, 1], velocity[:, 0])  # y points down, octants turn upwards
    octant = (angle * (NUM_OCTANTS / (2 * pi))).round().long() % NUM_OCTANTS
    return moving & (octant == directions)


def opposite(directions: Tensor) -> Tensor:
    """The opposite octants; `NO_DIRECTION` stays."""
    return torch.where(directions == NO_DIRECTION, directions, (directions + NUM_OCTANTS // 2) % NUM_OCTANTS)


def share_interval(values: Tensor) -> list:
    """Wilson's score interval [low, high] for the mean of values (N,) in [0, 1], one value a video: whether it has a property, or in
    how many of its frames; one for every column of values (N, K).

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n) (Wilson 1927), where a bootstrap would have no width at 0 and 1.
    n is N for yes or no. A share of frames varies less over the videos, s^2 < p (1 - p), and counts as N p (1 - p) / s^2 videos: the
    effective sample size, N over the design effect (Korn and Graubard 1998); N where s^2 is 0.
    """
    columns = values.double().view(len(values), -1)
    p, z = columns.mean(dim=0), NormalDist().inv_cdf((1 + LEVEL) / 2)
    single, spread = p * (1 - p), columns.var(dim=0, correction=0)  # without correction: equal for yes or no
    n = len(values) * torch.where(spread > 1e-12, single / spread, 1.0)  # below it all values are equal, but for rounding
    middle, scale = p + z**2 / (2 * n), 1 + z**2 / n
    reach = z * (single / n + z**2 / (4 * n**2)).sqrt()
    low, high = (middle - reach) / scale, (middle + reach) / scale
    intervals = torch.stack([low.minimum(p), high.maximum(p)], dim=1).clamp(0, 1).tolist()  # against rounding at 0 and 1
    return intervals if values.ndim > 1 else intervals[0]


def bootstrap_interval(values: Tensor, seed: int = 0) -> list:
    """Percentile bootstrap interval [low, high] of the mean of values (N,), one value a video (Efron 1979); one for every column of
    values (N, K)."""
    counts = resampled_counts(len(values), RESAMPLES, torch_generator(seed, Purpose.BOOTSTRAP))
    means = counts @ values.double().view(len(values), -1) / len(values)  # (R, K)
    intervals = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64), dim=0).T.tolist()
    return intervals if values.ndim > 1 else intervals[0]


@dataclass(frozen=True)
class VideoScores:
    """Measures of B videos of F frames, on the CPU, by name.

    by_frame, (B, F) each: frames_right, class_kept and frames_within_1px (the video moves and the centre is within `TRACK_TOLERANCE`
    of the fitted track), all bool; mean_track_error, distance from the fitted track in pixels, whether the video moves or not;
    stroke_mass_ratio and sharpness_ratio, over the mean of the prompt's digit in real frames. of_videos, (B,) bool each: videos_right,
    one_class (all frames are read as one digit, right or wrong), track_within_1px, moving; direction_obeyed, of prompts that name one."""

    by_frame: dict[str, Tensor]
    of_videos: dict[str, Tensor]


def facts_of_prompts(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Digits (B,) and directions (B,) that prompts ask for, `NO_DIRECTION` where they name none. Raises ValueError for a prompt that does
    not name exactly one digit."""
    facts = [parse_caption(prompt) for prompt in prompts]
    for prompt, fact in zip(prompts, facts, strict=True):
        if len(fact.digits) != 1:
            raise ValueError(f"the prompt {prompt!r} names {len(fact.digits)} digits: expected 1")
    directions = [NO_DIRECTION if fact.directions[0] is None else fact.directions[0] for fact in facts]
    return torch.tensor([fact.digits[0] for fact in facts]), torch.tensor(directions)


def score_videos(judge: DigitJudge, video: Tensor, digits: Tensor, directions: Tensor, config: DatasetConfig) -> VideoScores:
    """Score video (B, F, C, H, W) in [-1, 1] against the prompts' digits (B,) and directions (B,), octants or `NO_DIRECTION`. Raises
    ValueError if the judge cannot read such videos, and for values that are not finite."""
    judge.check_matches(config)
    return score_readings(judge, read_videos(judge, video), digits, directions, config)


def score_readings(
    judge: DigitJudge, readings: VideoReadings, digits: Tensor, directions: Tensor, config: DatasetConfig
) -> VideoScores:
    """`score_videos` for videos that the judge has read."""
    class_mass, class_sharpness = judge.class_mass.cpu(), judge.class_sharpness.cpu()
    classes = read_classes(readings.probabilities, readings.mass, class_mass)
    kept = class_kept(classes)
    fit = fit_bouncing_track(readings.centres, config)
    moving = is_moving(fit.speed, classes, config)
    return VideoScores({
        "frames_right": classes == digits.unsqueeze(1),
        "class_kept": kept,
        "frames_within_1px": moving.unsqueeze(1) & (fit.error <= TRACK_TOLERANCE),
        "mean_track_error": fit.error,
        "stroke_mass_ratio": readings.mass / class_mass[digits].unsqueeze(1),
        "sharpness_ratio": readings.sharpness / class_sharpness[digits].unsqueeze(1),
    }, {
        "videos_right": videos_right(classes, digits),
        "one_class": kept.all(dim=1),
        "track_within_1px": track_within(fit.error, moving),
        "direction_obeyed": direction_obeyed(fit.velocity, moving, directions)[directions != NO_DIRECTION],
        "moving": moving,
    })


def summarise(scores: VideoScores, seed: int = 0) -> dict[str, float | list]:
    """Means over videos of measures (B, F) and (B,), each with its 95 % interval [low, high] over videos: `share_interval` for a bool
    measure, `bootstrap_interval` for others and for slopes.

    Keys, for a measure NAME: NAME, NAME_ci; and for one by frame NAME_by_frame, NAME_by_frame_ci (a pair a frame), NAME_by_block (means of
    `FRAMES_PER_BLOCK` frames) and, from two blocks on, NAME_slope, NAME_slope_ci: the drift, as change a block of the straight line
    through a video's blocks. A measure of no videos is left out."""
    summary: dict[str, float | list] = {}

    def add(name: str, values: Tensor, is_share: bool) -> None:
        if len(values) > 0:
            summary[name] = values.double().mean().item()
            summary[f"{name}_ci"] = share_interval(values) if is_share else bootstrap_interval(values, seed=seed)

    for name, measure in scores.by_frame.items():
        values, is_share = measure.double(), measure.dtype == torch.bool
        add(name, values.mean(dim=1), is_share)
        summary[f"{name}_by_frame"] = values.mean(dim=0).tolist()
        summary[f"{name}_by_frame_ci"] = share_interval(values) if is_share else bootstrap_interval(values, seed=seed)
        blocks = torch.stack([block.mean(dim=1) for block in values.split(FRAMES_PER_BLOCK, dim=1)], dim=1)  # (B, K)
        summary[f"{name}_by_block"] = blocks.mean(dim=0).tolist()
        if blocks.shape[1] > 1:
            index = torch.arange(blocks.shape[1], dtype=blocks.dtype)
            centred = index - index.mean()
            add(f"{name}_slope", blocks @ centred / centred.square().sum(), is_share=False)
    for name, measure in scores.of_videos.items():
        add(name, measure, measure.dtype == torch.bool)
    return summary


def self_test(path: str) -> None:
    """Print the scores of real held-out videos and of the same made worse. Raises ValueError for a score that is not as it must be."""
    config, judge = DatasetConfig(), load_judge(path)
    batch = MovingMNISTGenerator(config, "test", purpose=Purpose.EXAMINATION).sample(seed=0, indices=range(256), num_frames=21)
    digits, directions = facts_of_prompts(batch.captions)
    wrong = (digits + 1) % NUM_CLASSES, opposite(directions)
    names = ("frames_right", "videos_right", "one_class", "track_within_1px", "direction_obeyed", "moving",
             "stroke_mass_ratio", "mean_track_error")
    print(f"the judge read {judge.config.accuracy:.2%} of held-out frames right when it was trained")
    print(f"{len(digits)} videos of held-out digits, 21 frames:")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names))
    real: dict[str, float | list] = {}
    for case, falls in SELF_TEST.items():
        video = corrupt(batch.video, case) if case in CORRUPTIONS else batch.video
        summary = summarise(score_videos(judge, video, *(wrong if case == "wrong prompts" else (digits, directions)), config))
        real = real or summary
        print(f"{case:14}" + "".join(f"{summary[name]:18.3f}" for name in names))
        if falls is not None and summary[falls] > real[falls] - MIN_FALL:
            raise ValueError(f"{falls} is {summary[falls]:.3f} on {case} videos: expected far less than {real[falls]:.3f}")
    for name in ("frames_right", "one_class", "track_within_1px", "direction_obeyed"):
        if real[name] < MIN_REAL:
            raise ValueError(f"{name} is {real[name]:.3f} on real videos: expected {MIN_REAL} or more, train another judge")


def main() -> None:
    """Without arguments check the judge and the measures; with --train_judge make a judge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--train_judge", action="store_true", help="train a judge and write it to --output")
    parser.add_argument("--output", type=at_home, default=str(JUDGE_PATH), help="the judge's file, written or checked")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of 128 frames")
    parser.add_argument("--seed", type=int, default=0, help="seed of the judge's weights and of its training frames")
    arguments = parser.parse_args()
    if arguments.train_judge and Path(arguments.output).exists():
        sys.exit(f"error: {arguments.output} exists already: give --output the name of a new file, or delete it first")
    with refusals_in_one_line():
        if arguments.train_judge:
            judge = train_judge(DatasetConfig(), arguments.steps, arguments.seed)
            save_network(judge, arguments.output)
            print(f"{judge.config.accuracy:.2%} of held-out frames read right, judge written to {arguments.output}")
        self_test(arguments.output)


if __name__ == "__main__":
    main()
