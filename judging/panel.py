"""The panel: every judge and the real videos of reference, from which one call gives all figures of a set of videos.

Dimensions: B videos, F frames, C channels, H = W frame side, M reference videos, E features of a video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from judging.digit_count import count_digits, scale_to_judge
from judging.digit_judge import DigitJudge, VideoReadings, load_judge, read_videos, render_in_places, warn_of_foreign_digits
from judging.distribution import LEAST_VIDEOS, compare_distributions
from judging.glyphs import GlyphCode, glyph_diversity, glyph_frechet
from judging.metrics import facts_of_prompts, read_classes, score_readings, summarise, videos_right
from judging.video_judge import VideoJudge, embed_videos, load_video_judge, read_real_videos
from machine.seeds import Purpose, torch_generator
from moving_mnist import DatasetConfig, MovingMNISTGenerator


@dataclass(frozen=True)
class Features:
    """What distributions are compared in. embedding: (B, E) of the video judge. glyphs: (B, S, S), the shapes averaged over the frames.
    digits: (B,), asked for. shown: (B,) bool, whether most frames show it."""

    embedding: Tensor
    glyphs: Tensor
    digits: Tensor
    shown: Tensor


@dataclass(frozen=True)
class Reference:
    """Real videos that distributions are compared with: of held-out digits, and as a yardstick of the networks' own digits."""

    video_judge: VideoJudge
    code: GlyphCode
    held_out: Features
    training: Features


@dataclass(frozen=True)
class Panel:
    """Who judges videos of `config`. reference: None for videos of two digits, and for sets too small to be a distribution."""

    config: DatasetConfig
    judge: DigitJudge
    reference: Reference | None


def make_panel(config: DatasetConfig, num_videos: int, num_frames: int, seed: int = 0) -> Panel:
    """The shipped judges, and as many real videos of reference as videos are to be judged, for the Frechet distance depends on it. Raises
    ValueError where the judges cannot read such videos, OSError where they are not there."""
    judge = load_judge()
    if config.num_digits == 1:
        judge.check_matches(config)
        warn_of_foreign_digits(judge, config)
    else:
        scale_to_judge(judge, config)
    if config.num_digits > 1 or num_videos < LEAST_VIDEOS:
        return Panel(config, judge, None)
    video_judge = load_video_judge()
    video_judge.check_matches(judge)
    real = []
    for split, purpose in (("test", Purpose.REFERENCE), ("train", Purpose.IMITATION)):
        readings, right = read_real_videos(judge, MovingMNISTGenerator(config, split, purpose=purpose), seed, num_videos, num_frames)
        real.append(features_of(judge, video_judge, readings, right["digit"]))
    own = MovingMNISTGenerator(replace(config, judge_fraction=DatasetConfig.judge_fraction), "judge")
    code = GlyphCode.of(read_videos(judge, render_in_places(own, torch_generator(0, Purpose.EXAMINATION))).shapes.mean(dim=1))
    return Panel(config, judge, Reference(video_judge, code, *real))


def features_of(judge: DigitJudge, video_judge: VideoJudge, readings: VideoReadings, digits: Tensor) -> Features:
    """Of videos that are read already, with the digits (B,) asked for."""
    shown = videos_right(read_classes(readings.probabilities, readings.mass, judge.class_mass.cpu()), digits.cpu())
    return Features(embed_videos(video_judge, readings), readings.shapes.mean(dim=1), digits.cpu(), shown)


def judge_videos(panel: Panel, video: Tensor, prompts: list[str], seed: int = 0) -> dict[str, float | list]:
    """All figures of video (B, F, C, H, W) in [-1, 1] for its prompts: of one digit those of `metrics.summarise`, `distribution` and
    `glyphs`; of two those of `digit_count`. Raises ValueError for values that are not finite and for prompts that are not of such
    videos."""
    if panel.config.num_digits > 1:
        return count_digits(panel.judge, video, prompts, panel.config, seed)
    return judge_readings(panel, read_videos(panel.judge, video), *facts_of_prompts(prompts), seed)


def judge_readings(panel: Panel, readings: VideoReadings, digits: Tensor, directions: Tensor, seed: int = 0) -> dict[str, float | list]:
    """`judge_videos` for videos of one digit that are read already, with the digits (B,) and directions (B,) asked for."""
    figures = summarise(score_readings(panel.judge, readings, digits, directions, panel.config), seed)
    return figures | compare_readings(panel, readings, digits, seed)


def compare_readings(panel: Panel, readings: VideoReadings, digits: Tensor, seed: int = 0) -> dict[str, float | list]:
    """The figures of the distribution, with intervals, of videos that are read already; empty without a reference."""
    if panel.reference is None:
        return {}
    return _as_figures(panel.reference, features_of(panel.judge, panel.reference.video_judge, readings, digits), seed)


def yardsticks(panel: Panel, video: Tensor, prompts: list[str], seed: int = 0) -> dict[str, dict[str, float | list]]:
    """What the distribution's figures mean: those of real videos whose frames are shuffled (the ceiling: right in every frame, wrong in all
    motion), and of real videos of training digits (perfect imitation). The floor is the figures of real held-out videos themselves. Empty
    without a reference."""
    if panel.reference is None:
        return {}
    order = torch.randperm(video.shape[1], generator=torch_generator(seed, Purpose.FAULT))
    shuffled = read_videos(panel.judge, video).take(frames=order)
    return {
        "real, frames shuffled": compare_readings(panel, shuffled, facts_of_prompts(prompts)[0], seed),
        "real, training digits": _as_figures(panel.reference, panel.reference.training, seed),
    }


def _as_figures(reference: Reference, found: Features, seed: int) -> dict[str, float | list]:
    real = reference.held_out
    shown = found.glyphs[found.shown], found.digits[found.shown], real.glyphs[real.shown], real.digits[real.shown]
    return {
        **compare_distributions(found.embedding, real.embedding, seed), **glyph_diversity(*shown, seed),
        **glyph_frechet(reference.code, found.glyphs, real.glyphs, seed),
    }
