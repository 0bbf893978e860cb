"""The panel: every judge and the real videos of reference, from which one call gives all figures of a set of videos.

Dimensions: B videos, F frames, C channels, H = W frame side, M reference videos, E features of a video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from judging.digit_count import count_digits, scale_to_judge
from judging.digit_judge import DigitJudge, VideoReadings, load_judge, load_network, read_videos, render_in_places, warn_of_foreign_digits
from judging.distribution import LEAST_VIDEOS, compare_distributions
from judging.glyphs import GlyphCode, glyph_diversity, glyph_frechet
from judging.metrics import NO_DIGIT, facts_of_prompts, read_classes, score_readings, summarise, videos_right
from judging.video_judge import VIDEO_JUDGE_PATH, VideoJudge, read_real_videos
from machine.seeds import Purpose, torch_generator
from moving_mnist import DatasetConfig, MovingMNISTGenerator


@dataclass(frozen=True)
class Features:
    """What distributions are compared in."""

    embedding: Tensor  # (B, E) of the video judge
    glyphs: Tensor  # (B, S, S), the shapes averaged over the frames
    digits: Tensor  # (B,) that the prompts ask for, `NO_DIGIT` where most frames do not show it


class Reference:
    """Real videos that distributions are compared with: held_out, and as a yardstick training, of the networks' own digits. As many as are
    judged, since the Frechet distance depends on their number."""

    def __init__(self, judge: DigitJudge, config: DatasetConfig, num_videos: int, num_frames: int, seed: int):
        self.judge, self.video_judge = judge, load_network(VideoJudge, VIDEO_JUDGE_PATH)
        self.video_judge.check_matches(judge)
        splits = (("test", Purpose.REFERENCE), ("train", Purpose.IMITATION))
        generators = (MovingMNISTGenerator(config, split, purpose=purpose) for split, purpose in splits)
        real = (read_real_videos(judge, generator, seed, num_videos, num_frames) for generator in generators)
        self.held_out, self.training = (self.features(readings, right["digit"]) for readings, right in real)
        judges_digits = MovingMNISTGenerator(replace(config, judge_fraction=DatasetConfig.judge_fraction), "judge")
        frames = render_in_places(judges_digits, torch_generator(0, Purpose.EXAMINATION))
        self.code = GlyphCode(read_videos(judge, frames).shapes.mean(dim=1))

    def features(self, readings: VideoReadings, digits: Tensor) -> Features:
        """The features of videos that the judge has read, with the digits (B,) asked for."""
        shown = videos_right(read_classes(readings.probabilities, readings.mass, self.judge.class_mass.cpu()), digits)
        return Features(self.video_judge.embed(readings).double(), readings.shapes.mean(dim=1), torch.where(shown, digits, NO_DIGIT))

    def compare(self, found: Features, seed: int = 0) -> dict[str, float | list]:
        """The figures of the distribution, with intervals, against the held-out videos."""
        real = self.held_out
        return {
            **compare_distributions(found.embedding, real.embedding, seed),
            **glyph_diversity(found.glyphs, found.digits, real.glyphs, real.digits, seed),
            **glyph_frechet(self.code, found.glyphs, real.glyphs, seed),
        }


class Panel:
    """The shipped judges for videos of config, and the reference: None for videos of two digits and for sets too small to be a
    distribution. Raises ValueError if the judges cannot read such videos, OSError if they are missing."""

    def __init__(self, config: DatasetConfig, num_videos: int, num_frames: int, seed: int = 0):
        self.config, self.judge = config, load_judge()
        if config.num_digits > 1:
            scale_to_judge(self.judge, config)
        else:
            self.judge.check_matches(config)
            warn_of_foreign_digits(self.judge, config)
        has_reference = config.num_digits == 1 and num_videos >= LEAST_VIDEOS
        self.reference = Reference(self.judge, config, num_videos, num_frames, seed) if has_reference else None

    def judge_videos(self, video: Tensor, prompts: list[str], seed: int = 0) -> dict[str, float | list]:
        """All figures of video (B, F, C, H, W) in [-1, 1] for its prompts: of one digit those of `metrics.summarise`, `distribution` and
        `glyphs`; of two those of `digit_count`. Raises ValueError for values that are not finite and for prompts of other videos."""
        if self.config.num_digits > 1:
            return count_digits(self.judge, video, prompts, self.config, seed)
        return self.judge_readings(read_videos(self.judge, video), *facts_of_prompts(prompts), seed)

    def judge_readings(self, readings: VideoReadings, digits: Tensor, directions: Tensor, seed: int = 0) -> dict[str, float | list]:
        """`judge_videos` for videos of one digit that the judge has read, with the digits (B,) and directions (B,) asked for."""
        figures = summarise(score_readings(self.judge, readings, digits, directions, self.config), seed)
        if self.reference is not None:
            figures |= self.reference.compare(self.reference.features(readings, digits), seed)
        return figures

    def yardsticks(self, video: Tensor, prompts: list[str], seed: int = 0) -> dict[str, dict[str, float | list]]:
        """What the distribution's figures mean: those of real videos whose frames are shuffled (the ceiling: right in every frame, wrong in
        all motion), and of real videos of training digits (perfect imitation). The floor is the figures of real held-out videos
        themselves. Empty without a reference."""
        if self.reference is None:
            return {}
        order = torch.randperm(video.shape[1], generator=torch_generator(seed, Purpose.FAULT))
        shuffled = self.reference.features(read_videos(self.judge, video).take(frames=order), facts_of_prompts(prompts)[0])
        return {
            "real, frames shuffled": self.reference.compare(shuffled, seed),
            "real, training digits": self.reference.compare(self.reference.training, seed),
        }
