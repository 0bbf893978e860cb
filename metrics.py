"""What Moving MNIST lets us measure exactly, for videos of one digit: its class, its track and its direction.

Dimensions: B videos, F frames, C channels, H = W frame side; A = 2B axes and K candidates in the track fit. Videos are
(B, F, C, H, W) in [-1, 1] and are clamped first. Positions are (x, y) in pixel indices, x to the right and y down.

Every measure has a value on real videos of held-out digits: read a generated video's score against that one, not
against 1. A faint, blank, saturated or frozen video earns nothing: classes and tracks are gated on stroke mass, tracks
on speed too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from torch.nn import functional

from digit_judge import (
    JUDGE_PATH,
    DigitJudge,
    display_intensity,
    intensity_centres,
    load_judge,
    read_digits,
    save_judge,
    train_judge,
)
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig, MovingMNISTGenerator, bounce
from text_encoder import parse_caption

MASS_GATE = (0.4, 2.5)  # a frame counts as a digit if its stroke mass over the class's mean real mass lies in here
NO_DIGIT = -1  # what `read_classes` says of a frame outside the gate
NO_DIRECTION = -1  # direction of a prompt that names none
TRACK_TOLERANCE = 1.0  # pixels
MOVING_SHARE = 0.5  # a video moves if its fitted speed is at least this share of the data's slowest speed
MAX_OFFSET = 1.0  # pixels from the digit's box centre to its centre of mass, on either axis
SPEED_MARGIN = 1.15  # the track search goes this far above the data's fastest speed
START_STEP = 0.5  # pixels between the starting points of the coarse search
PHASE_STEP = 0.5  # pixels by which neighbouring speeds of the coarse search differ in the last frame
NUM_CANDIDATES = 4  # coarse solutions that are refined, an axis
REFINE_STEPS = 12
FRAMES_PER_BLOCK = 3  # for the report by block only
MIN_REAL, MIN_FALL = 0.9, 0.2  # self-test: least score of real videos, least loss of videos made worse


# -------------------------------------------------------------------------------------------------- strokes and centres


def stroke_mass(video: Tensor) -> Tensor:
    """Sum of the display intensities of every frame, (B, F), of video (B, F, C, H, W)."""
    return display_intensity(video).sum(dim=(-2, -1))


def centres_of_mass(video: Tensor) -> Tensor:
    """Centre of mass (x, y) of every frame, (B, F, 2), of video (B, F, C, H, W); a blank frame gives its middle."""
    return intensity_centres(display_intensity(video))


# --------------------------------------------------------------------------------------------------- what is shown


def read_classes(probabilities: Tensor, mass: Tensor, class_mass: Tensor) -> Tensor:
    """The class (B, F) of every frame: the most probable one of (B, F, 10), or `NO_DIGIT`.

    It is `NO_DIGIT` where the stroke mass (B, F) over that class's mean real mass, class_mass (10,), is outside
    `MASS_GATE`. The mean is the class's own: a thin "one" has a third of the ink of a "zero".
    """
    classes = probabilities.argmax(dim=-1)
    ratio = mass / class_mass[classes]
    return torch.where((ratio >= MASS_GATE[0]) & (ratio <= MASS_GATE[1]), classes, NO_DIGIT)


def frames_right(classes: Tensor, digits: Tensor) -> Tensor:
    """Frames (B, F) that show the prompt's digit: classes (B, F) of `read_classes` against digits (B,)."""
    return classes == digits.unsqueeze(1)


def videos_right(classes: Tensor, digits: Tensor) -> Tensor:
    """Videos (B,) in which the prompt's digit is read in more frames than any other class, `NO_DIGIT` included."""
    votes = functional.one_hot(classes + 1, NUM_CLASSES + 1).sum(dim=1)  # (B, 11), NO_DIGIT first
    is_prompt = functional.one_hot(digits + 1, NUM_CLASSES + 1).bool()
    return votes[is_prompt] > votes.masked_fill(is_prompt, 0).amax(dim=1)


def one_class_throughout(classes: Tensor) -> Tensor:
    """Videos (B,) whose frames are all read as one class, right or wrong, and none as `NO_DIGIT`."""
    return (classes == classes[:, :1]).all(dim=1) & (classes[:, 0] != NO_DIGIT)


# --------------------------------------------------------------------------------------------------------- how it moves


@dataclass(frozen=True)
class FittedTrack:
    """The best bouncing track of B videos.

    track: (B, F, 2) fitted centres of mass. velocity: (B, 2) fitted velocity in the first frame, pixels a frame.
    error: (B, F) distance in pixels of every frame's centre of mass from the track.
    """

    track: Tensor
    velocity: Tensor
    error: Tensor

    @property
    def speed(self) -> Tensor:
        """Fitted speed (B,), pixels a frame."""
        return self.velocity.norm(dim=-1)


def fit_bouncing_track(centres: Tensor, config: DatasetConfig) -> FittedTrack:
    """The constant-velocity track between walls that is nearest, in least squares, to centres of mass (B, F, 2).

    On each axis on its own, c(f) = wall + offset + bounce(start + velocity * f, span), with the first wall at the box
    centre's lowest position, (digit_size - 1) / 2, a constant offset of at most `MAX_OFFSET` between the box's centre
    and the glyph's centre of mass, and |velocity| at most `SPEED_MARGIN` times `config.max_speed`. A grid over start
    and velocity, with the best offset in closed form, then damped Gauss-Newton steps from the best grid points. In
    float64 on the CPU. Raises ValueError for fewer than 3 frames, through which every track fits.
    """
    if centres.shape[1] < 3:
        raise ValueError(f"found {centres.shape[1]} frames: expected at least 3 to fit a track")
    wall, span = (config.digit_size - 1) / 2, config.frame_size - config.digit_size
    top_speed = SPEED_MARGIN * config.max_speed
    target = centres.detach().cpu().double().transpose(1, 2).flatten(0, 1) - wall  # (2B, F)
    start, velocity, offset = _refine(target, *_coarse_search(target, span, top_speed), span, top_speed)
    frame = torch.arange(centres.shape[1], dtype=target.dtype)
    position = start.unsqueeze(-1) + velocity.unsqueeze(-1) * frame  # (2B, F)
    fitted = wall + offset.unsqueeze(-1) + bounce(position, span)
    fitted = fitted.unflatten(0, (-1, 2)).transpose(1, 2).float()  # (B, F, 2)
    initial = (velocity * _bounce_slope(start, span)).unflatten(0, (-1, 2)).float()  # (B, 2)
    return FittedTrack(fitted, initial, (centres.cpu().float() - fitted).norm(dim=-1))


def _bounce_slope(position: Tensor, span: float) -> Tensor:
    """Derivative of `bounce`, +1 or -1."""
    return torch.where(torch.remainder(position, 2 * span) < span, 1.0, -1.0).to(position.dtype)


def _coarse_search(target: Tensor, span: float, top_speed: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best starts, velocities and offsets of a grid, each (A, K), for targets (A, F); one velocity a start.

    The squared error is expanded, |r|^2 = |c|^2 - 2 c.m + |m|^2, so that the grid is one matrix product for each start.
    """
    num_frames = target.shape[1]
    frame = torch.arange(num_frames, dtype=target.dtype)
    num_speeds = 2 * int(top_speed * (num_frames - 1) / PHASE_STEP + 1) + 1
    velocities = torch.linspace(-top_speed, top_speed, num_speeds, dtype=target.dtype)
    starts = torch.linspace(0, span, int(span / START_STEP) + 1, dtype=target.dtype)
    errors, speed_index, offsets = [], [], []
    for start in starts:
        model = bounce(start + velocities.unsqueeze(1) * frame, span)  # (V, F)
        mean = target.mean(dim=1, keepdim=True) - model.mean(dim=1)  # (A, V) mean residual
        square = target.square().sum(dim=1, keepdim=True) - 2 * target @ model.T + model.square().sum(dim=1)
        offset = mean.clamp(-MAX_OFFSET, MAX_OFFSET)
        error, index = (square - 2 * num_frames * offset * mean + num_frames * offset.square()).min(dim=1)
        errors.append(error)
        speed_index.append(index)
        offsets.append(offset.gather(1, index.unsqueeze(1)).squeeze(1))
    num_kept = min(NUM_CANDIDATES, len(starts))
    best = torch.stack(errors, dim=1).topk(num_kept, dim=1, largest=False).indices  # (A, K)
    velocity = velocities[torch.stack(speed_index, dim=1).gather(1, best)]
    return starts[best], velocity, torch.stack(offsets, dim=1).gather(1, best)


def _refine(
    target: Tensor, start: Tensor, velocity: Tensor, offset: Tensor, span: float, top_speed: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best start, velocity and offset, each (A,), reached from K candidates (A, K) by Levenberg-Marquardt steps.

    Between two bounces the track is linear in all three, so a step is exact unless it moves a bounce past a frame. A
    step that does not lower the error is not taken, and the next one is damped more.
    """
    frame = torch.arange(target.shape[1], dtype=target.dtype)
    target = target.unsqueeze(1)  # (A, 1, F)
    low = torch.tensor([-torch.inf, -top_speed, -MAX_OFFSET], dtype=target.dtype)
    x = torch.stack((start, velocity, offset), dim=-1)  # (A, K, 3)
    damping = torch.full(x.shape[:2], 1e-3, dtype=x.dtype)

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        position = x[..., :1] + x[..., 1:2] * frame  # (A, K, F)
        return target - x[..., 2:] - bounce(position, span), _bounce_slope(position, span)

    r, slope = residual(x)
    for _ in range(REFINE_STEPS):
        jacobian = torch.stack((slope, slope * frame, torch.ones_like(slope)), dim=-1)  # (A, K, F, 3)
        normal = jacobian.transpose(-1, -2) @ jacobian  # (A, K, 3, 3)
        ridge = damping[..., None, None] * torch.diag_embed(normal.diagonal(dim1=-2, dim2=-1) + 1e-9)
        step = torch.linalg.solve(normal + ridge, jacobian.transpose(-1, -2) @ r.unsqueeze(-1)).squeeze(-1)
        new_x = torch.maximum(torch.minimum(x + step, -low), low)
        new_r, new_slope = residual(new_x)
        is_better = new_r.square().sum(dim=-1) < r.square().sum(dim=-1)  # (A, K)
        keep = is_better.unsqueeze(-1)
        x, r, slope = torch.where(keep, new_x, x), torch.where(keep, new_r, r), torch.where(keep, new_slope, slope)
        damping = torch.where(is_better, damping / 4, damping * 8)
    best = r.square().sum(dim=-1).argmin(dim=1)
    start, velocity, offset = x[torch.arange(len(x)), best].unbind(dim=-1)
    return start, velocity, offset


def is_moving(speed: Tensor, classes: Tensor, config: DatasetConfig) -> Tensor:
    """Videos (B,) that show something that moves.

    The fitted speed (B,) is at least `MOVING_SHARE` of the data's slowest one, so the video is not frozen, and more
    than half of the frames show some digit, classes (B, F) of `read_classes`: the haze of a blank video moves too.
    """
    return (speed >= MOVING_SHARE * config.min_speed) & ((classes != NO_DIGIT).float().mean(dim=1) > 0.5)


def track_within(error: Tensor, moving: Tensor, tolerance: float = TRACK_TOLERANCE) -> Tensor:
    """Videos (B,) that move and keep to the fitted track: root-mean-square distance, error (B, F), within tolerance."""
    return moving & (error.square().mean(dim=1).sqrt() <= tolerance)


def direction_obeyed(velocity: Tensor, moving: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a video sets off in the prompt's octant, (B,), and whether the prompt names one, (B,): the mask.

    velocity: (B, 2) of `fit_bouncing_track`. directions: (B,) octants, `NO_DIRECTION` for none. A video that does not
    move obeys none; one that moves anyhow obeys one time in eight.
    """
    angle = torch.atan2(-velocity[:, 1], velocity[:, 0])  # y points down, octants turn upwards
    octant = (angle * (NUM_OCTANTS / (2 * pi))).round().long() % NUM_OCTANTS
    named = directions != NO_DIRECTION
    return moving & named & (octant == directions), named


# ----------------------------------------------------------------------------------------------------------- the report


def bootstrap_interval(values: Tensor, num: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (N,), one value a video (Efron 1979).

    Raises ValueError for no value.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values have shape {tuple(values.shape)}: expected at least one value in one dimension")
    rng = torch.Generator().manual_seed(seed)
    values = values.detach().cpu().double()
    rows = torch.randint(len(values), (num, len(values)), generator=rng)
    low, high = values[rows].mean(dim=1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high


@dataclass(frozen=True)
class VideoScores:
    """Scores of B videos of F frames, on the CPU; each is defined at the function of its name.

    frames_right: (B, F) bool. videos_right, one_class, track_within, moving, direction_obeyed, direction_named: (B,)
    bool. track_error: (B,) mean distance from the fitted track, pixels, whether the video moves or not.
    stroke_mass_ratio: (B,) mean stroke mass over the mean real mass of the prompt's digit.
    """

    frames_right: Tensor
    videos_right: Tensor
    one_class: Tensor
    track_within: Tensor
    track_error: Tensor
    moving: Tensor
    direction_obeyed: Tensor
    direction_named: Tensor
    stroke_mass_ratio: Tensor


def facts_of_prompts(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Digits (B,) and directions (B,) that prompts ask for, `NO_DIRECTION` where they name none.

    Raises ValueError for a prompt that does not name exactly one digit.
    """
    facts = [parse_caption(prompt) for prompt in prompts]
    for prompt, fact in zip(prompts, facts, strict=True):
        if len(fact.digits) != 1:
            raise ValueError(f"the prompt {prompt!r} names {len(fact.digits)} digits: expected 1")
    directions = [NO_DIRECTION if fact.directions[0] is None else fact.directions[0] for fact in facts]
    return torch.tensor([fact.digits[0] for fact in facts]), torch.tensor(directions)


def score_videos(
    judge: DigitJudge, video: Tensor, digits: Tensor, directions: Tensor, config: DatasetConfig
) -> VideoScores:
    """Score video (B, F, C, H, W) in [-1, 1] against the prompts' digits (B,) and directions (B,).

    directions: octants, `NO_DIRECTION` where the prompt names none. Raises ValueError where the judge, the data's
    settings and the video do not belong together, and for values that are not finite.
    """
    judge.check_matches(config)
    if video.ndim != 5 or video.shape[-2:] != (config.frame_size, config.frame_size):
        raise ValueError(
            f"the video has shape {tuple(video.shape)}: expected (B, F, C, {config.frame_size}, {config.frame_size})"
        )
    for name, values in (("digits", digits), ("directions", directions)):
        if values.shape != video.shape[:1]:
            raise ValueError(f"{name} have shape {tuple(values.shape)}: expected one a video, ({len(video)},)")
    digits, directions, class_mass = digits.cpu(), directions.cpu(), judge.class_mass.cpu()
    mass = stroke_mass(video).cpu()
    classes = read_classes(read_digits(judge, video).cpu(), mass, class_mass)
    fit = fit_bouncing_track(centres_of_mass(video), config)
    moving = is_moving(fit.speed, classes, config)
    obeyed, named = direction_obeyed(fit.velocity, moving, directions)
    return VideoScores(
        frames_right=frames_right(classes, digits),
        videos_right=videos_right(classes, digits),
        one_class=one_class_throughout(classes),
        track_within=track_within(fit.error, moving),
        track_error=fit.error.mean(dim=1),
        moving=moving,
        direction_obeyed=obeyed,
        direction_named=named,
        stroke_mass_ratio=mass.mean(dim=1) / class_mass[digits],
    )


def summarise(scores: VideoScores, seed: int = 0) -> dict[str, float | list[float]]:
    """Means over videos, each with its 95 % bootstrap interval [low, high] over videos under the key `<name>_ci`.

    Keys: frames_right, videos_right, one_class, track_within_1px, mean_track_error (pixels), direction_obeyed (over the
    videos whose prompt names a direction; absent where none does), stroke_mass_ratio (1 is real), moving, and
    frames_right_by_block, a list: the share in every `FRAMES_PER_BLOCK` frames, in order.
    """
    per_video = {
        "frames_right": scores.frames_right.float().mean(dim=1),
        "videos_right": scores.videos_right,
        "one_class": scores.one_class,
        "track_within_1px": scores.track_within,
        "mean_track_error": scores.track_error,
        "direction_obeyed": scores.direction_obeyed[scores.direction_named],
        "stroke_mass_ratio": scores.stroke_mass_ratio,
        "moving": scores.moving,
    }
    summary: dict[str, float | list[float]] = {}
    for name, values in per_video.items():
        if len(values) > 0:
            summary[name] = values.double().mean().item()
            summary[f"{name}_ci"] = list(bootstrap_interval(values, seed=seed))
    blocks = scores.frames_right.float().split(FRAMES_PER_BLOCK, dim=1)
    summary["frames_right_by_block"] = [block.mean().item() for block in blocks]
    return summary


# --------------------------------------------------------------------------------------------------------- command line


def corrupt(video: Tensor, how: str, seed: int = 0) -> Tensor:
    """Real video (B, F, C, H, W) made worse in one known way, for checking that the measure of it falls.

    how: "faint" (a fifth of the ink), "frozen" (the first frame throughout), "shuffled" (the frames in another order)
    or "blurred" (six 3 x 3 averages).
    """
    if how == "faint":
        return (video + 1) / 5 - 1
    if how == "frozen":
        return video[:, :1].expand_as(video)
    if how == "shuffled":
        return video[:, torch.randperm(video.shape[1], generator=torch.Generator().manual_seed(seed))]
    if how == "blurred":
        frames = video.flatten(0, 1) + 1
        for _ in range(6):
            frames = functional.avg_pool2d(frames, 3, stride=1, padding=1)
        return frames.view_as(video) - 1
    raise ValueError(f"corruption is {how!r}: expected faint, frozen, shuffled or blurred")


def self_test(path: str) -> None:
    """Print the scores of real held-out videos and of the same made worse; raise RuntimeError if one is amiss."""
    config, judge = DatasetConfig(), load_judge(path)
    batch = MovingMNISTGenerator(config, "test").sample(seed=0, indices=range(256), num_frames=21)
    digits, directions = facts_of_prompts(batch.captions)
    opposite = torch.where(directions == NO_DIRECTION, directions, (directions + NUM_OCTANTS // 2) % NUM_OCTANTS)
    cases = {"real": (batch.video, digits, directions, None)}
    cases["wrong prompts"] = (batch.video, (digits + 1) % NUM_CLASSES, opposite, "direction_obeyed")
    for how, falls in (("faint", "frames_right"), ("frozen", "moving"), ("shuffled", "track_within_1px"),
                       ("blurred", "frames_right")):
        cases[how] = (corrupt(batch.video, how), digits, directions, falls)
    names = ("frames_right", "videos_right", "one_class", "track_within_1px", "direction_obeyed", "moving",
             "stroke_mass_ratio", "mean_track_error")
    print(f"the judge read {judge.config.accuracy:.2%} of held-out frames right when it was trained")
    print(f"{len(digits)} videos of held-out digits, 21 frames:")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names))
    real: dict[str, float | list[float]] = {}
    for case, (video, asked, headings, falls) in cases.items():
        summary = summarise(score_videos(judge, video, asked, headings, config))
        real = real or summary
        print(f"{case:14}" + "".join(f"{summary[name]:18.3f}" for name in names))
        if falls is not None and summary[falls] > real[falls] - MIN_FALL:
            raise RuntimeError(
                f"{falls} is {summary[falls]:.3f} on {case} videos: expected far less than {real[falls]:.3f}"
            )
    for name in ("frames_right", "one_class", "track_within_1px", "direction_obeyed"):
        if real[name] < MIN_REAL:
            raise RuntimeError(
                f"{name} is {real[name]:.3f} on real videos: expected {MIN_REAL} or more, train another judge"
            )


def main() -> None:
    """Without arguments check the judge and the measures; with --train_judge make a judge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--train_judge", action="store_true", help="train a judge and write it to --output")
    parser.add_argument("--output", default=str(JUDGE_PATH), help="the judge's file, written or checked")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of 128 frames")
    parser.add_argument("--seed", type=int, default=0, help="seed of the judge's weights and of its training frames")
    arguments = parser.parse_args()
    if arguments.train_judge:
        judge = train_judge(DatasetConfig(), arguments.steps, arguments.seed)
        save_judge(judge, arguments.output)
        print(f"{judge.config.accuracy:.2%} of held-out frames read right, judge written to {arguments.output}")
    self_test(arguments.output)


if __name__ == "__main__":
    main()
