"""The data of a run: Moving MNIST or one's own clips, behind the same few calls."""

from __future__ import annotations

from dataclasses import replace

from clips.own_videos import OwnVideos, VideosConfig
from machine.seeds import Purpose
from method.settings import DataConfig, require
from moving_mnist import DatasetConfig, MovingMNISTGenerator
from network.text_encoder import split_words
from training.config import Config


def open_data(
    config: DataConfig, split: str = "train", digit_variation: float = 0.0, purpose: Purpose | None = None
) -> MovingMNISTGenerator | OwnVideos:
    """The videos of a split: `captions(seed, indices)`, and `sample(seed, indices, num_frames)` with their `video`. Raises as these."""
    if isinstance(config, VideosConfig):
        require(digit_variation == 0, "training.digit_variation", digit_variation, "0 with dataset=videos, which show no digits to deform")
        return OwnVideos(config, split, purpose)
    assert isinstance(config, DatasetConfig)
    return MovingMNISTGenerator(config, split, digit_variation, purpose)


def with_clips(config: Config) -> Config:
    """The configuration of a run with the words of its clips' captions as its vocabulary; that of Moving MNIST as it is.

    Raises ValueError where a clip is too short for the training, or a caption too long for the text encoder.
    """
    if not isinstance(config.dataset, VideosConfig):
        return config
    training, known = config.training, OwnVideos(config.dataset)
    for clip in (*known.clips, *OwnVideos(config.dataset, "test").clips):
        num_frames, num_words = len(clip.frames), len(split_words(clip.caption))
        if num_frames < training.num_frames_per_block:
            raise ValueError(f"{clip.path} has {num_frames} frames, less than a block of {training.num_frames_per_block}: remove it")
        if num_frames < training.max_num_frames:
            raise ValueError(
                f"{clip.path} has {num_frames} frames, less than training.max_num_frames={training.max_num_frames}: lower that and "
                "training.min_num_frames, or remove the clip"
            )
        expected = f"{num_words + 1} for the caption of {clip.path}"
        require(num_words < config.text.max_tokens, "text.max_tokens", config.text.max_tokens, expected)
    return replace(config, text=replace(config.text, vocabulary=known.vocabulary()))
