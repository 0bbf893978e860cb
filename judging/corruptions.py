"""Real video made worse, each time in one known way: what the measures are tried on.

Dimensions: B videos, F frames, C channels, H = W frame side. Videos are (B, F, C, H, W) in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from machine.seeds import Purpose, torch_generator

GAIN = 1.5  # of "brightened"
STRIPE = -0.6  # of "striped": a fifth of full ink
COPIES = 0.05  # share of the videos that "collapsed" leaves different


def _blur(video: Tensor, times: int) -> Tensor:
    frames = video.flatten(0, 1) + 1
    for _ in range(times):
        frames = functional.avg_pool2d(frames, 3, stride=1, padding=1)
    return frames.view_as(video) - 1


def _switch(video: Tensor) -> Tensor:
    half = video.shape[1] // 2
    return torch.cat((video[:, :half], video.roll(1, dims=0)[:, half:]), dim=1)


def _fade(video: Tensor) -> Tensor:
    left = torch.linspace(1, 0.5, video.shape[1]).view(1, -1, 1, 1, 1)
    return (video + 1) * left - 1


def _flicker(video: Tensor) -> Tensor:
    return torch.where(torch.arange(video.shape[1]).view(1, -1, 1, 1, 1) % 2 == 1, (video - 1) / 2, video)


def _stripe(video: Tensor) -> Tensor:
    on_edge = torch.arange(video.shape[-1]) % 8 == 0
    return torch.where(on_edge[:, None] | on_edge, video.clamp_min(STRIPE), video)


CORRUPTIONS = {  # by name: what it does, for the report, and how, to a video and with a random generator
    "faint": ("A fifth of the ink.", lambda video, rng: (video + 1) / 5 - 1),
    "brightened": ("`GAIN` times the ink, up to white.", lambda video, rng: ((video + 1) * GAIN - 1).clamp(-1, 1)),
    "frozen": ("The first frame throughout.", lambda video, rng: video[:, :1].expand_as(video)),
    "shuffled": (
        "The frames in another order, the same for all videos.",
        lambda video, rng: video[:, torch.randperm(video.shape[1], generator=rng)],
    ),
    "softened": ("One 3 x 3 average: a digit still.", lambda video, rng: _blur(video, 1)),
    "blurred": ("Six 3 x 3 averages: hardly a digit.", lambda video, rng: _blur(video, 6)),
    "switched": ("The second half is another video's.", lambda video, rng: _switch(video)),
    "collapsed": (
        "`COPIES` of the videos, over and over.",
        lambda video, rng: video[torch.arange(len(video)) % max(int(COPIES * len(video)), 1)],
    ),
    "fading": ("Ink that goes, evenly, to half of itself in the last frame.", lambda video, rng: _fade(video)),
    "flickering": ("Half of the ink in every second frame.", lambda video, rng: _flicker(video)),
    "striped": ("A faint line along the upper and left edge of every patch of 8 x 8 pixels.", lambda video, rng: _stripe(video)),
}


def corrupt(video: Tensor, how: str, seed: int = 0) -> Tensor:
    """Video (B, F, C, H, W) made worse in the way `how`, a key of `CORRUPTIONS`. Raises ValueError for another one."""
    if how not in CORRUPTIONS:
        raise ValueError(f"corruption is {how!r}: expected one of {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[how][1](video, torch_generator(seed, Purpose.FAULT))
