"""The judge: a small convolutional network that reads the digit of a Moving MNIST frame, and its training.

Dimensions: B videos, F frames, N frames of any video, C channels, H = W frame side, D digit side. Videos are (B, F, C, H, W) in [-1, 1];
intensities are grey values in [0, 1]. Positions are (x, y) in pixel indices, x to the right and y down. The judge learns from the split
"judge", which no network sees, and is examined on held-out digits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import cos, inf, pi
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from digits.mnist import unit_ink
from judging.glyphs import recentre
from judging.ink import display_intensity, intensity_centres, intensity_sharpness
from machine.files import replacing
from machine.paths import PRETRAINED
from machine.seeds import Purpose, seed_global_generators, torch_generator
from method.choices import require
from method.settings import DataConfig
from moving_mnist import NUM_CLASSES, DatasetConfig, MovingMNISTGenerator

JUDGE_PATH = PRETRAINED / "judge.pt"
POOLING = 2  # side of the judge's last average pooling
HELD_OUT_PLACES = 4  # frames of each digit that classes are measured and the judge is examined on
NUM_TRIED, LEAST_READ = 256, 0.9  # images of a user's own files that are tried, and the share below which the judge says so
READ_BATCH, TRAINING_BATCH = 2048, 128  # frames that the judge reads, and learns from, at a time

Judging = TypeVar("Judging", bound=nn.Module)  # this network, or the video judge


@dataclass
class JudgeConfig:
    """The frames that a judge reads, and its size."""

    frame_size: int = 32  # as in `DatasetConfig`, pixels
    digit_size: int = 14
    widths: tuple[int, ...] = (32, 64, 128)  # channels of its stages, each at half the side of the one before
    accuracy: float = 0.0  # share of held-out frames read right when it was trained
    num_digits: int = 0  # digits of the split "judge" that it learned from

    @property
    def crop_size(self) -> int:
        """Side of the window around the centre of mass: the digit and one pixel on every side."""
        return self.digit_size + 2


class DigitJudge(nn.Module):
    """Reads the digit of a frame from a window around its centre of mass, which moves by whole pixels, so nothing is resampled.

    `class_mass` and `class_sharpness`, (10,) each, are the mean stroke mass and edge sharpness of every class in real frames.
    """

    title, command = "judge", "python -m judging.metrics --train_judge"
    settings, weights = JudgeConfig, "judge_state_dict"  # of its file

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for width_before, width in pairwise((1, *config.widths)):
            for width_in in (width_before, width):
                layers += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # the last stage is not halved
        side = (config.crop_size >> (len(config.widths) - 1)) // POOLING
        self.head = nn.Sequential(
            nn.AvgPool2d(POOLING), nn.Flatten(), nn.Dropout(0.3), nn.Linear(config.widths[-1] * side**2, NUM_CLASSES),
        )
        self.register_buffer("class_mass", torch.ones(NUM_CLASSES))
        self.register_buffer("class_sharpness", torch.ones(NUM_CLASSES))

    def describe(self) -> str:
        """How well it reads and what it learned from, in one line."""
        config = self.config
        return f"the judge learned from {config.num_digits} digits of its own and reads {config.accuracy:.1%} of held-out frames right"

    def crop(self, intensity: Tensor) -> Tensor:
        """Windows (N, 1, crop, crop) around the centres of mass of intensities (N, H, W); zero outside the frame."""
        size = self.config.crop_size
        padded = functional.pad(intensity, (size, size, size, size))
        corner = (intensity_centres(intensity) - (size - 1) / 2).round().long() + size  # (N, 2)
        offset = torch.arange(size, device=intensity.device)
        columns = (corner[:, :1] + offset).unsqueeze(1)  # (N, 1, crop)
        rows = (corner[:, 1:] + offset).unsqueeze(2)  # (N, crop, 1)
        frame = torch.arange(len(intensity), device=intensity.device).view(-1, 1, 1)
        return padded[frame, rows, columns].unsqueeze(1)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits (N, 10) of frames (N, C, H, W) in [-1, 1]."""
        return self.read(frames)[0]

    def read(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) of frames (N, C, H, W) in [-1, 1], and the features behind them, averaged over the window, (N, width)."""
        features = self.features(self.crop(display_intensity(frames)))  # (N, width, side, side)
        return self.head(features), features.mean(dim=(-2, -1))

    def check_matches(self, config: DatasetConfig) -> None:
        """Raise ValueError unless the judge was trained for these videos: one digit, the same sizes."""
        require_digits(config)
        if config.num_digits != 1:
            raise ValueError(f"dataset.num_digits is {config.num_digits}: the measures are for videos of 1 digit")
        for name in ("frame_size", "digit_size"):
            found, expected = getattr(config, name), getattr(self.config, name)
            if found != expected:
                advice = f"train another one with `{self.command}`"
                raise ValueError(f"dataset.{name} is {found}, the judge was trained for {expected}: {advice}")


def require_digits(config: DataConfig) -> None:
    """Raise ValueError where the videos do not show digits."""
    if config.why_no_digits is not None:
        raise ValueError(f"{config.why_no_digits}: the measures are for videos of digits")


def load_judge(path: str | os.PathLike = JUDGE_PATH, device: str | torch.device = "cpu") -> DigitJudge:
    """The judge of a file, with the errors of `load_network`."""
    return load_network(DigitJudge, path).to(device, memory_format=torch.channels_last)  # twice as fast on a CPU


def load_network(kind: type[Judging], path: str | os.PathLike) -> Judging:
    """A `DigitJudge` or a `VideoJudge`, from a file of `save_network`: in float32 and eval mode, without gradients, on the CPU.
    Raises FileNotFoundError for a missing file, ValueError for one that is not such a network."""
    advice = f"make one with `{kind.command} --output {path}`"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind.title} at {path}: {advice}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        network = kind(kind.settings(**stored["config"]))
        network.load_state_dict(stored[kind.weights])
    except Exception as error:  # whatever other bytes raise, it means the same
        raise ValueError(f"{path} is not a sound {kind.title}: {advice}") from error
    return network.requires_grad_(False).eval()


def save_network(network: Judging, path: str | os.PathLike) -> None:
    """Write weights (float16) and config; the file appears whole or not at all."""
    state = {key: x.half() if x.is_floating_point() else x for key, x in network.state_dict().items()}
    with replacing(Path(path)) as temporary:
        torch.save({network.weights: state, "config": asdict(network.config)}, temporary)


def fit(network: Judging, draw_loss: Callable[[], Tensor], num_steps: int, report_every: int, max_norm: float = inf) -> Judging:
    """Train a judge on the losses drawn, with AdamW and cosine decay; returns it in eval mode, without gradients."""
    peak_lr = 3e-3
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=peak_lr, weight_decay=0.02)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((step + 1) / 50, (1 + cos(pi * step / num_steps)) / 2)
        loss = draw_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        if (step + 1) % report_every == 0:
            print(f"{network.title}: step {step + 1} of {num_steps}, loss {loss.item():.3f}", flush=True)
    return network.requires_grad_(False).eval()


def augmented_frames(generator: MovingMNISTGenerator, num_frames: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented frames (N, C, H, W) in [-1, 1] with a digit anywhere in them, and labels (N,). The 28 x 28 digits are rotated, scaled,
    sheared, bent and made thinner or thicker, the frames blurred, dimmed or brightened, and given noise."""
    size, digit_size = generator.config.frame_size, generator.config.digit_size

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num_frames, *shape, generator=rng)

    rows = torch.randint(len(generator.digit_set.labels), (num_frames,), generator=rng)
    images = unit_ink(generator.digit_set.images[rows]).unsqueeze(1)  # (N, 1, 28, 28)
    angle = uniform(-0.22, 0.22)
    stretch = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(-1, 2, 2)
    shear = torch.eye(2).repeat(num_frames, 1, 1)
    shear[:, 0, 0], shear[:, 1, 1], shear[:, 0, 1] = uniform(0.85, 1.18), uniform(0.85, 1.18), uniform(-0.25, 0.25)
    affine = torch.cat((stretch @ shear, torch.zeros(num_frames, 2, 1)), dim=2)  # (N, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)  # (N, 28, 28, 2)
    bend = 0.05 * torch.randn(num_frames, 2, 5, 5, generator=rng)
    bend = functional.interpolate(bend, size=images.shape[-2:], mode="bicubic", align_corners=True)
    images = functional.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    thickness = uniform(-0.35, 0.5, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5)
    thicker = functional.max_pool2d(images, 3, stride=1, padding=1) - images
    thinner = images + functional.max_pool2d(-images, 3, stride=1, padding=1)
    images = images + thickness.clamp_min(0) * thicker + thickness.clamp_max(0) * thinner
    sprites = functional.interpolate(images, size=(digit_size, digit_size), mode="area")  # (N, 1, D, D)
    centre = (digit_size - 1) / 2 + (size - digit_size) * uniform(0, 1, 1, 1, 2)  # (N, F = 1, N digits = 1, 2)
    frames = (generator.render(sprites, centre).squeeze(1) + 1) / 2  # (N, C, H, W)
    blurred = functional.avg_pool2d(frames, 3, stride=1, padding=1)
    frames = torch.lerp(frames, blurred, uniform(0, 0.8, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.3))
    frames = frames * uniform(0.6, 1.5, 1, 1, 1)
    noise = uniform(0, 0.06, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.3)
    frames = frames + noise * torch.randn(frames.shape, generator=rng)
    return 2 * frames.clamp(0, 1) - 1, generator.digit_set.labels[rows]


def train_judge(config: DatasetConfig, num_steps: int, seed: int) -> DigitJudge:
    """A judge trained on augmented frames of the judges' digits, in bfloat16. Raises ValueError for data of two digits or no step."""
    require(num_steps >= 1, "--steps", num_steps, "at least 1")
    seed_global_generators(seed, Purpose.JUDGE_TRAINING)
    rng = torch_generator(seed, Purpose.JUDGE_TRAINING, index=2)
    generator, held_out = MovingMNISTGenerator(config, "judge"), MovingMNISTGenerator(config, "test")
    judge = DigitJudge(JudgeConfig(config.frame_size, config.digit_size, num_digits=len(generator.sprites)))
    judge.check_matches(config)
    judge = judge.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    measure_classes(judge, generator)

    def draw_loss() -> Tensor:
        frames, digits = augmented_frames(generator, TRAINING_BATCH, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(judge(frames), digits, label_smoothing=0.05)

    fit(judge, draw_loss, num_steps, report_every=100)
    examined = render_in_places(held_out, torch_generator(seed, Purpose.EXAMINATION))
    judge.config.accuracy = share_read_right(judge, examined, held_out.digit_set.labels.unsqueeze(1))
    return judge


def measure_classes(judge: DigitJudge, generator: MovingMNISTGenerator) -> None:
    """Write the mean stroke mass and edge sharpness of every class, over all digits of the split, into the judge. Sharpness depends on
    the digit's sub-pixel position, so it is averaged over `HELD_OUT_PLACES` random ones."""
    labels = generator.digit_set.labels
    mass = generator.sprites.sum(dim=(1, 2))
    in_places = render_in_places(generator, torch_generator(0, Purpose.EXAMINATION))
    sharpness = intensity_sharpness(display_intensity(in_places)).mean(dim=1)
    for values, buffer in ((mass, judge.class_mass), (sharpness, judge.class_sharpness)):
        buffer.copy_(torch.stack([values[labels == digit].mean() for digit in range(NUM_CLASSES)]))


def render_in_places(generator: MovingMNISTGenerator, rng: torch.Generator) -> Tensor:
    """Every digit of the split in `HELD_OUT_PLACES` random places: (M, places, C, H, W) in [-1, 1]."""
    place = torch.rand(len(generator.sprites), HELD_OUT_PLACES, 1, 2, generator=rng)
    centre = (generator.config.digit_size - 1) / 2 + generator.span * place  # (M, places, 1, 2)
    return generator.render(generator.sprites.unsqueeze(1), centre)


@dataclass(frozen=True)
class VideoReadings:
    """What the judge sees in every frame of B videos, on the CPU: all that is scored is scored from here."""

    probabilities: Tensor  # (B, F, 10) of the digit; a judge always names one, even in a blank frame
    features: Tensor  # (B, F, width) of `DigitJudge.read`
    mass: Tensor  # (B, F), the sum of display intensities
    centres: Tensor  # (B, F, 2), of `ink`
    sharpness: Tensor  # (B, F), of `ink`
    shapes: Tensor  # (B, F, S, S), the ink of `glyphs.recentre`

    def take(self, videos: Tensor | slice = slice(None), frames: Tensor | slice = slice(None)) -> VideoReadings:
        """The readings of some of the videos, and of some frames of each, in the order given."""
        return VideoReadings(**{field.name: getattr(self, field.name)[videos][:, frames] for field in fields(self)})


@torch.no_grad()
def read_videos(judge: DigitJudge, video: Tensor) -> VideoReadings:
    """Read every frame of video (B, F, C, H, W) in [-1, 1], on the judge's device. Raises ValueError for values that are not finite."""
    device = judge.class_mass.device
    parts = []
    for part in video.flatten(0, 1).split(READ_BATCH):
        logits, features = judge.read(part.to(device))
        intensity = display_intensity(part.to(device))
        parts.append((
            logits.softmax(dim=-1), features, intensity.sum(dim=(-2, -1)), intensity_centres(intensity), intensity_sharpness(intensity),
            recentre(intensity, judge.config.crop_size),
        ))
    return VideoReadings(*(torch.cat(values).unflatten(0, video.shape[:2]).cpu() for values in zip(*parts, strict=True)))


def share_read_right(judge: DigitJudge, video: Tensor, digits: Tensor) -> float:
    """Share of the frames of video (B, F, C, H, W) in which the digit, digits (B, 1), is the most probable one."""
    return (read_videos(judge, video).probabilities.argmax(dim=-1) == digits).float().mean().item()


def warn_of_foreign_digits(judge: DigitJudge, config: DatasetConfig) -> None:
    """Warn if the judge hardly reads the digits of dataset.mnist_root: transposed ones, as EMNIST's files hold, or no digits at all."""
    if config.source != "idx":
        return
    real = MovingMNISTGenerator(config, "test", purpose=Purpose.EXAMINATION).sample(0, range(NUM_TRIED), 1)
    accuracy = share_read_right(judge, real.video, real.digits)
    if accuracy < LEAST_READ:
        warnings.warn(
            f"the judge reads {accuracy:.0%} of the images in dataset.mnist_root={config.mnist_root} as their labels say (it reads "
            f"{judge.config.accuracy:.0%} of MNIST's): are they transposed, as EMNIST's are? Then every figure of identity is wrong. "
            "Are they no digits, as Fashion-MNIST's? Then give dataset.class_names=[...], what captions call the ten classes", stacklevel=3,
        )
