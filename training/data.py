"""The data of a run, Moving MNIST or one's own clips behind one interface, and what a training step draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clips.own_videos import OwnVideos, VideosConfig
from machine.seeds import Purpose
from method.choices import require
from method.settings import DataConfig, PretrainConfig, SelfForcingConfig, TrainingConfig
from moving_mnist import MovingMNISTGenerator
from network.text_encoder import split_words, vocabulary_with
from training.config import Config


def open_data(
    config: DataConfig, split: str = "train", digit_variation: float = 0.0, purpose: Purpose | None = None
) -> MovingMNISTGenerator | OwnVideos:
    """The videos of a split, with `captions(seed, indices)` and `sample(seed, indices, num_frames)`. Raises as these."""
    if isinstance(config, VideosConfig):
        require(digit_variation == 0, "training.digit_variation", digit_variation, "0 with dataset=videos, which show no digits to deform")
        return OwnVideos(config, split, purpose)
    return MovingMNISTGenerator(config, split, digit_variation, purpose)


def with_vocabulary(config: Config) -> Config:
    """The configuration with the vocabulary of its data, unless text.vocabulary is given: that of class names, or of the clips' captions.
    Raises ValueError as `check_clips_fit` does."""
    words, dataset = None, config.dataset
    if isinstance(dataset, VideosConfig):
        check_clips_fit(config)
        words = OwnVideos(dataset).vocabulary()
    elif dataset.class_names is not None:
        words = vocabulary_with(dataset.class_names)
    return config if config.text.vocabulary is not None else replace(config, text=replace(config.text, vocabulary=words))


def check_clips_fit(config: Config) -> None:
    """Raise ValueError naming a clip that is too short for the training, a caption that is too long for the text encoder, or a setting
    that clips cannot serve."""
    training = config.training
    if isinstance(training, PretrainConfig):
        training.check("switch_probability", training.switch_probability == 0, "0 with dataset=videos, whose clips do not meet")
    has_clips = isinstance(training, PretrainConfig) and training.clip_steps > 0
    longest = max(training.max_num_frames, training.clip_frames if has_clips else 0)
    for clip in (*OwnVideos(config.dataset).clips, *OwnVideos(config.dataset, "test").clips):
        num_frames, num_words = len(clip.frames), len(split_words(clip.caption))
        if num_frames < training.num_frames_per_block:
            raise ValueError(f"{clip.path} has {num_frames} frames, less than a block of {training.num_frames_per_block}: remove it")
        if num_frames < longest:
            key = "max_num_frames" if longest == training.max_num_frames else "clip_frames"
            raise ValueError(f"{clip.path} has {num_frames} frames, less than training.{key}={longest}: lower that, or remove the clip")
        expected = f"{num_words + 1} for the caption of {clip.path}"
        require(num_words < config.text.max_tokens, "text.max_tokens", config.text.max_tokens, expected)


def draw_num_frames(config: TrainingConfig, random: torch.Generator) -> int:
    """A uniform number of whole blocks between min_num_frames and max_num_frames, one for the whole batch."""
    block, first = config.num_frames_per_block, 1 if config.independent_first_frame else 0
    low, high = config.min_num_frames // block, config.max_num_frames // block
    return first + block * int(torch.randint(low, high + 1, (1,), generator=random))


def window_starts(config: SelfForcingConfig, num_frames: int) -> range:
    """The frames of a rollout at which a scored window of num_frames may start: only 0 without `training.rollout_frames`."""
    longest = num_frames if config.rollout_frames is None else config.rollout_frames
    return range(0, longest - num_frames + 1, config.num_frames_per_block)


def draw_window_start(config: SelfForcingConfig, num_frames: int, random: torch.Generator) -> int:
    """One of `window_starts`, uniform, for the whole batch; draws nothing if there is no choice."""
    starts = window_starts(config, num_frames)
    return starts[int(torch.randint(len(starts), (1,), generator=random))] if len(starts) > 1 else 0


def draw_switch(config: SelfForcingConfig, random: torch.Generator) -> bool:
    """Does the prompt switch where the scored window starts? Draws nothing if it never does."""
    return config.switch_probability > 0 and float(torch.rand((), generator=random)) < config.switch_probability


def next_in_batch(indices: Sequence[int]) -> list[int]:
    """For every video of a batch the next one, whose prompt a switch comes from."""
    return [*indices[1:], indices[0]]
