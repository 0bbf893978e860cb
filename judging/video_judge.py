"""The video judge: a small recurrent network over the digit judge's readings, whose features distances between videos are taken in.

Dimensions: B videos, F frames, W features of a frame, E features of a video. Positions are (x, y) in pixel indices.

It reads the digit judge's frozen features, as a 3-D network trained for minutes does not learn to read digits, and adds where the ink is
and how it moves. It is trained on real videos of the judges' digits to tell the digit, the direction, the speed and how the video looks.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from judging.digit_judge import DigitJudge, VideoReadings, fit, load_judge, load_network, read_videos, save_network
from machine.interruption import refusals_in_one_line
from machine.paths import PRETRAINED, at_home
from machine.seeds import Purpose, seed_global_generators, torch_generator
from method.choices import require
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig, MovingMNISTGenerator
from network.text_encoder import SPEEDS

VIDEO_JUDGE_PATH = PRETRAINED / "video_judge.pt"
NUM_INK_FACTS = 6  # centre (2), displacement (2), stroke mass, sharpness: of every frame
NUM_LOOKS = 6  # first and last centre (2 + 2), mean stroke mass, mean sharpness: of a video
LEAST_MASS = 0.05  # of the mean real mass: a blank frame has a logarithm too
MIN_TRAINED_FRAMES = 9  # training shows the first 9 to `num_frames` frames
TRAINING_BATCH, HELD_OUT_VIDEOS = 64, 500
ANSWERS = ("digit", "direction", "speed")


@dataclass
class VideoJudgeConfig:
    """The videos that a video judge was made for and its sizes."""

    frame_size: int = 32  # as in `DatasetConfig`, pixels
    digit_size: int = 14
    frame_features: int = 128  # W
    hidden: int = 64  # width of the recurrent state
    embedding: int = 48  # E
    accuracy: dict[str, float] | None = None  # share of held-out real videos told right when trained, for each of `ANSWERS`


class VideoJudge(nn.Module):
    """From the digit judge's readings of a video, of any length, to its features (B, E), and from those to what it shows. The recurrent
    network runs from the last frame to the first, so its last state knows how the video begins; its mean state weighs frames equally."""

    title, command = "video judge", "python -m judging.video_judge --train"
    settings, weights = VideoJudgeConfig, "video_judge_state_dict"  # of its file

    def __init__(self, config: VideoJudgeConfig):
        super().__init__()
        self.config = config
        self.standardise = nn.BatchNorm1d(config.frame_features, affine=False)
        self.appearance = nn.Linear(config.frame_features, config.hidden // 2)
        self.recurrent = nn.GRU(config.hidden // 2 + NUM_INK_FACTS, config.hidden, batch_first=True)
        self.embedding = nn.Linear(2 * config.hidden, config.embedding)
        self.heads = nn.ModuleDict({
            "digit": nn.Linear(config.embedding, NUM_CLASSES), "direction": nn.Linear(config.embedding, NUM_OCTANTS),
            "speed": nn.Linear(config.embedding, len(SPEEDS)), "looks": nn.Linear(config.embedding, NUM_LOOKS),
        })
        self.register_buffer("mean_mass", torch.ones(()))
        self.register_buffer("mean_sharpness", torch.ones(()))

    def ink_facts(self, readings: VideoReadings) -> Tensor:
        """Where the ink is, how it moves and how it looks in every frame, each of order one: (B, F, `NUM_INK_FACTS`)."""
        side = self.config.frame_size
        displacement = functional.pad(readings.centres.diff(dim=1), (0, 0, 1, 0)) / (side / 16)  # the first frame has none
        mass = (readings.mass / self.mean_mass).clamp_min(LEAST_MASS).log()
        sharpness = readings.sharpness / self.mean_sharpness - 1
        return torch.cat((2 * readings.centres / (side - 1) - 1, displacement, torch.stack((mass, sharpness), dim=-1)), dim=-1)

    def embed(self, readings: VideoReadings) -> Tensor:
        """The features (B, E) of B videos, on the CPU as the readings are."""
        features = self.standardise(readings.features.float().flatten(0, 1)).unflatten(0, readings.mass.shape)
        frames = torch.cat((self.appearance(features).relu(), self.ink_facts(readings)), dim=-1)
        states, _ = self.recurrent(frames.flip(1))  # (B, F, hidden)
        return self.embedding(torch.cat((states[:, -1], states.mean(dim=1)), dim=-1))

    def looks(self, readings: VideoReadings) -> Tensor:
        """What the head "looks" is trained to tell, (B, `NUM_LOOKS`)."""
        facts = self.ink_facts(readings)
        return torch.cat((facts[:, 0, :2], facts[:, -1, :2], facts[:, :, 4:].mean(dim=1)), dim=-1)

    def check_matches(self, judge: DigitJudge) -> None:
        """Raise ValueError unless this network was trained on the features of such a digit judge."""
        found = (judge.config.frame_size, judge.config.digit_size, judge.config.widths[-1])
        expected = (self.config.frame_size, self.config.digit_size, self.config.frame_features)
        if found != expected:
            raise ValueError(
                f"the digit judge's frame side, digit side and features are {found}, the video judge's {expected}: "
                f"train another one with `{self.command}`"
            )


def train_video_judge(
    judge: DigitJudge, config: DatasetConfig, num_steps: int, num_videos: int, seed: int, num_frames: int = 21
) -> VideoJudge:
    """A video judge trained on `num_videos` real videos of the judges' digits, read once. Raises ValueError where the digit judge was not
    made for these videos, and for no step or too few videos."""
    judge.check_matches(config)
    require(num_steps >= 1, "--steps", num_steps, "at least 1")
    require(num_videos >= TRAINING_BATCH, "--videos", num_videos, f"at least {TRAINING_BATCH}")
    seed_global_generators(seed, Purpose.JUDGE_TRAINING)
    rng = torch_generator(seed, Purpose.JUDGE_TRAINING, index=2)
    readings, right = read_real_videos(judge, MovingMNISTGenerator(config, "judge"), seed, num_videos, num_frames)
    video_judge = VideoJudge(VideoJudgeConfig(config.frame_size, config.digit_size, judge.config.widths[-1]))
    video_judge.mean_mass.copy_(readings.mass.mean())
    video_judge.mean_sharpness.copy_(readings.sharpness.mean())

    def draw_loss() -> Tensor:
        rows = torch.randint(num_videos, (TRAINING_BATCH,), generator=rng)
        length = int(torch.randint(MIN_TRAINED_FRAMES, num_frames + 1, (), generator=rng))
        part = readings.take(rows, slice(length))
        embedding = video_judge.embed(part)
        loss = functional.mse_loss(video_judge.heads["looks"](embedding), video_judge.looks(part))
        for name in ANSWERS:
            loss = loss + functional.cross_entropy(video_judge.heads[name](embedding), right[name][rows], label_smoothing=0.05)
        return loss

    fit(video_judge, draw_loss, num_steps, report_every=250, max_norm=1.0)
    video_judge.config.accuracy = examine(video_judge, judge, config, seed, num_frames)
    return video_judge


def examine(video_judge: VideoJudge, judge: DigitJudge, config: DatasetConfig, seed: int, num_frames: int = 21) -> dict[str, float]:
    """Share of real videos of held-out digits whose digit, direction and speed the network tells."""
    examination = MovingMNISTGenerator(config, "test", purpose=Purpose.EXAMINATION)
    return answered_right(video_judge, *read_real_videos(judge, examination, seed, HELD_OUT_VIDEOS, num_frames))


def read_real_videos(
    judge: DigitJudge, generator: MovingMNISTGenerator, seed: int, num_videos: int, num_frames: int
) -> tuple[VideoReadings, dict[str, Tensor]]:
    """Readings and the right `ANSWERS`, (B,) each, of the real videos (seed, 0..num_videos - 1), made and read a few at a time."""
    parts, right = [], []
    for first in range(0, num_videos, 256):
        batch = generator.sample(seed, range(first, min(first + 256, num_videos)), num_frames)
        parts.append(read_videos(judge, batch.video))
        speeds = torch.tensor([SPEEDS.index(words[0]) for words in batch.speeds])
        right.append((batch.digits[:, 0], batch.directions[:, 0], speeds))
    readings = VideoReadings(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
    return readings, dict(zip(ANSWERS, map(torch.cat, zip(*right, strict=True)), strict=True))


def answered_right(video_judge: VideoJudge, readings: VideoReadings, right: dict[str, Tensor]) -> dict[str, float]:
    """Share of videos whose digit, direction and speed the network tells."""
    embedding = video_judge.embed(readings)
    return {name: (video_judge.heads[name](embedding).argmax(dim=-1) == right[name]).float().mean().item() for name in ANSWERS}


def main() -> None:
    """Without arguments examine the video judge on fresh held-out videos; with --train make one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--train", action="store_true", help="train a video judge and write it to --output")
    parser.add_argument("--output", type=at_home, default=str(VIDEO_JUDGE_PATH), help="the network's file, written or examined")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 64 videos")
    parser.add_argument("--videos", type=int, default=3000, help="different real videos to train on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training videos")
    arguments = parser.parse_args()
    if arguments.train and Path(arguments.output).exists():
        sys.exit(f"error: {arguments.output} exists already: give --output the name of a new file, or delete it first")
    with refusals_in_one_line():
        judge, config = load_judge(), DatasetConfig()
        if arguments.train:
            video_judge = train_video_judge(judge, config, arguments.steps, arguments.videos, arguments.seed)
            save_network(video_judge, arguments.output)
            right = video_judge.config.accuracy
        else:
            video_judge = load_network(VideoJudge, arguments.output)
            video_judge.check_matches(judge)
            right = examine(video_judge, judge, config, arguments.seed + 1)
    print(f"{HELD_OUT_VIDEOS} videos of held-out digits, told right: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()))


if __name__ == "__main__":
    main()
