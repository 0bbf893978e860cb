"""What `python moving_mnist.py` checks: the generator, on 32 videos."""

from __future__ import annotations

import timeit

import torch
from torch import Tensor

from moving_mnist import DatasetConfig, MovingMNISTGenerator


def ink_centre(video: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass (x, y) (B, F, 2) and mass (B, F) of the ink in a video (B, F, C, H, W) in [-1, 1]."""
    ink = (video.double().mean(dim=2) + 1) / 2  # (B, F, H, W)
    mass = ink.sum(dim=(-2, -1))
    x = (ink.sum(dim=-2) * torch.arange(ink.shape[-1])).sum(dim=-1) / mass
    y = (ink.sum(dim=-1) * torch.arange(ink.shape[-2])).sum(dim=-1) / mass
    return torch.stack([x, y], dim=-1), mass


def self_test(config: DatasetConfig, num_frames: int, seed: int) -> bool:
    """Check the generator on 32 videos, print every result, and return whether all checks pass."""
    train, test = MovingMNISTGenerator(config, "train"), MovingMNISTGenerator(config, "test")
    batch = train.sample(seed, range(32), num_frames)
    alone = train.sample(seed, [7], num_frames)
    is_same = torch.equal(alone.video[0], batch.video[7]) and alone.captions[0] == batch.captions[7]

    single = train.render(train.sprites[batch.digit_index[:, :1]], batch.track[:, :, :1])
    centre, mass = ink_centre(single)
    offset = centre - batch.track[:, :, 0]
    jitter = (offset - offset[:, :1]).abs().max().item()
    drift = (mass / mass[:, :1] - 1).abs().max().item()
    half = (config.digit_size - 1) / 2
    low, high = batch.track.min().item() - half, batch.track.max().item() + half
    train_set = {image.numpy().tobytes() for image in train.digit_set.images}
    shared = sum(image.numpy().tobytes() in train_set for image in test.digit_set.images)

    seconds = timeit.repeat(lambda: train.sample(seed, range(32), num_frames), number=1, repeat=10)
    milliseconds = 1000 * min(seconds)  # the best one depends least on the machine's load
    checks = (
        (is_same, "video (seed, 7) is the same alone and in a batch, bit for bit"),
        (jitter < 1e-3, f"the ink's centre follows the track: its offset varies by {jitter:.1e} pixels at most"),
        (drift < 1e-4, f"a digit keeps its ink: it varies by {drift:.1e} of itself at most"),
        (low > -1e-3 and high < config.frame_size - 1 + 1e-3,
         f"digit boxes stay in the frame: {low:.2f} to {high:.2f} of 0 to {config.frame_size - 1}"),
        (shared == 0, f"{len(train.sprites)} training and {len(test.sprites)} test digits share {shared} images"),
        (milliseconds < 32 * num_frames, f"32 videos of {num_frames} frames take {milliseconds:.1f} ms"),
    )
    for is_ok, finding in checks:
        print(f"{'ok  ' if is_ok else 'FAIL'} {finding}")
    return all(is_ok for is_ok, _ in checks)
