"""Figures of one's own clips: Frechet distance, density and coverage, diversity, motion. Nothing here knows what a clip shows.

The features are not a network's: frames averaged to at most 16 x 16 pixels, with their differences from frame to frame, in the principal
axes of the training clips, each divided by its spread there. They see places, colours and motion, not fine texture. Read the Frechet
distance in them beside those of real clips of the same run.

Dimensions: B videos, F frames, C channels, H = W frame side, D pixels and differences of a video, E axes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clips.own_videos import Clip, OwnVideos, VideosConfig
from judging.corruptions import corrupt
from judging.distribution import LEAST_VIDEOS, RESAMPLES, compare_distributions, figure, resampled_counts
from judging.ink import display_intensity
from judging.metrics import VideoScores, summarise
from machine.seeds import Purpose, torch_generator

SIDE = 16  # pixels of the frames that are compared
NUM_AXES = 32
VIDEOS_PER_AXIS = 4  # at least so many, for a covariance
NUM_FITTED = 1000  # training clips that the axes are fitted to
CLIP_FIGURES = {
    "frechet_distance": "Frechet (pixels)", "coverage": "coverage", "diversity": "diversity", "motion": "motion over real",
}


class Axes:
    """The principal axes of video (B, F, C, H, W), at most B - 1 of them, in which these clips have unit spread. The differences from frame
    to frame are weighted to vary as much as the frames do."""

    def __init__(self, video: Tensor, num_axes: int):
        frames, changes = _small_frames(video)
        self.weight = (frames.var(dim=0).sum() / changes.var(dim=0).sum().clamp_min(1e-12)).sqrt().item()
        pixels = torch.cat((frames, self.weight * changes), dim=1)
        self.mean = pixels.mean(dim=0)  # (D,)
        pixels = pixels - self.mean
        values, vectors = torch.linalg.eigh(pixels @ pixels.T)  # of (B, B), which is smaller than (D, D)
        kept = values.argsort(descending=True)[: min(num_axes, len(video) - 1)]
        kept = kept[values[kept] > 1e-9 * values.max()]
        self.axes = pixels.T @ vectors[:, kept] / values[kept] * (len(video) - 1) ** 0.5  # (D, E)

    def features(self, video: Tensor) -> Tensor:
        """(B, E), float64, of video (B, F, C, H, W)."""
        frames, changes = _small_frames(video)
        return (torch.cat((frames, self.weight * changes), dim=1) - self.mean) @ self.axes


def _small_frames(video: Tensor) -> tuple[Tensor, Tensor]:
    """Small frames and their differences from frame to frame, float64, each flattened: (B, D1) and (B, D2)."""
    small = functional.adaptive_avg_pool2d(video.clamp(-1, 1).flatten(0, 1), min(SIDE, video.shape[-1])).unflatten(0, video.shape[:2])
    return small.double().flatten(1), small.double().diff(dim=1).flatten(1)


def motion(video: Tensor) -> Tensor:
    """Mean absolute difference (B, F - 1) in display range of neighbouring frames of video (B, F, C, H, W)."""
    display_intensity(video)  # refuses values that are not finite
    return video.float().clamp(-1, 1).diff(dim=1).abs().mean(dim=(2, 3, 4)) / 2


class ClipPanel:
    """At most num_videos held-out clips (B, F, C, H, W) in [-1, 1], in an order that the seed draws, their captions as prompts, and as many
    training clips, of the same captions where there are such. Raises ValueError if there are too few."""

    def __init__(self, config: VideosConfig, num_videos: int, num_frames: int, seed: int = 0):
        held_out, training = OwnVideos(config, "test").clips, OwnVideos(config).clips
        num = min(num_videos, len(held_out), len(training))
        if num < LEAST_VIDEOS:
            raise ValueError(
                f"{num} of {len(held_out)} held-out and {len(training)} training clips in {config.root}: expected at least {LEAST_VIDEOS} "
                "of each, set num_videos to more, or train with a larger dataset.test_fraction"
            )
        rng = torch_generator(seed, Purpose.REFERENCE)

        def in_random_order(clips: list[Clip]) -> list[Clip]:
            return [clips[index] for index in torch.randperm(len(clips), generator=rng).tolist()]

        def video(clips: list[Clip]) -> Tensor:
            return torch.stack([clip.frames[:num_frames] for clip in clips]).float() / 127.5 - 1

        shown, others = in_random_order(held_out)[:num], in_random_order(training)
        partners = _partners(shown, others)
        judged = {clip.name for clip in partners}
        fitted = [clip for clip in others if clip.name not in judged]  # clips that the axes are fitted to look further apart than others
        self.axes = Axes(video((fitted if len(fitted) >= num else others)[:NUM_FITTED]), min(NUM_AXES, max(num // VIDEOS_PER_AXIS, 1)))
        self.held_out, self.prompts, self.training = video(shown), [clip.caption for clip in shown], video(partners)

    def describe(self) -> str:
        """What the figures are, in one line."""
        return (
            f"features: {self.axes.axes.shape[1]} principal axes of small frames and their differences, fitted to training clips; "
            f"reference: {len(self.held_out)} held-out clips of {self.held_out.shape[1]} frames. Digit figures are left out: "
            "frames right, one class, track, direction, stroke mass, glyphs"
        )

    def judge(self, video: Tensor, seed: int = 0) -> dict[str, Any]:
        """`CLIP_FIGURES`, with intervals, of video (B, F, C, H, W) made for `prompts`. Raises ValueError for values that are not finite."""
        by_frame = {"motion": motion(video) / motion(self.held_out).mean().clamp_min(1e-9)}
        found, real = self.axes.features(video), self.axes.features(self.held_out)
        return summarise(VideoScores(by_frame, {}), seed) | compare_distributions(found, real, seed) | self._diversity(found, real, seed)

    def real_rows(self, seed: int = 0) -> dict[str, Tensor]:
        """Yardsticks: training clips, as perfect imitation would be; the same with frames shuffled, and stopped at the first frame."""
        shuffled, stopped = (corrupt(self.training, how, seed) for how in ("shuffled", "frozen"))
        return {"training clips": self.training, "training clips, shuffled": shuffled, "training clips, stopped": stopped}

    def _diversity(self, found: Tensor, real: Tensor, seed: int) -> dict[str, Any]:
        """Mean distance of two videos of the same prompt over that of two real ones; of any two if less than half share their prompt."""
        prompt = torch.tensor([self.prompts.index(each) for each in self.prompts])
        others = ~torch.eye(len(prompt), dtype=torch.bool)
        pair = (prompt.unsqueeze(1) == prompt) & others
        weights = (others if pair.any(dim=1).double().mean() < 0.5 else pair).double()
        distance = torch.cdist(found, found)
        scale = (weights * torch.cdist(real, real)).sum() / weights.sum()
        counts = resampled_counts(len(found), RESAMPLES, torch_generator(seed, Purpose.BOOTSTRAP))
        resampled = [(each @ (weights * distance) @ each) / (each @ weights @ each).clamp_min(1e-9) for each in counts]
        return figure("diversity", (weights * distance).sum() / weights.sum() / scale, torch.stack(resampled) / scale)


def _partners(shown: list[Clip], others: list[Clip]) -> list[Clip]:
    """For every clip another one, each once: of the same caption as long as there are such."""
    of_caption: defaultdict[str, list[Clip]] = defaultdict(list)
    for clip in others:
        of_caption[clip.caption].append(clip)
    partners = [of_caption[clip.caption].pop() if of_caption[clip.caption] else None for clip in shown]
    rest = (clip for clips in of_caption.values() for clip in clips)
    return [next(rest) if partner is None else partner for partner in partners]
