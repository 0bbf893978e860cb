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


def _faint(video: Tensor, rng: torch.Generator) -> Tensor:
    """A fifth of the ink."""
    return (video + 1) / 5 - 1


def _brightened(video: Tensor, rng: torch.Generator) -> Tensor:
    """`GAIN` times the ink, up to white."""
    return ((video + 1) * GAIN - 1).clamp(-1, 1)


def _frozen(video: Tensor, rng: torch.Generator) -> Tensor:
    """The first frame throughout."""
    return video[:, :1].expand_as(video)


def _shuffled(video: Tensor, rng: torch.Generator) -> Tensor:
    """The frames in another order, the same for all videos."""
    return video[:, torch.randperm(video.shape[1], generator=rng)]


def _blur(video: Tensor, times: int) -> Tensor:
    frames = video.flatten(0, 1) + 1
    for _ in range(times):
        frames = functional.avg_pool2d(frames, 3, stride=1, padding=1)
    return frames.view_as(video) - 1


def _blurred(video: Tensor, rng: torch.Generator) -> Tensor:
    """Six 3 x 3 averages: hardly a digit."""
    return _blur(video, 6)


def _softened(video: Tensor, rng: torch.Generator) -> Tensor:
    """One 3 x 3 average: a digit still."""
    return _blur(video, 1)


def _switched(video: Tensor, rng: torch.Generator) -> Tensor:
    """The second half is another video's."""
    half = video.shape[1] // 2
    return torch.cat((video[:, :half], video.roll(1, dims=0)[:, half:]), dim=1)


def _collapsed(video: Tensor, rng: torch.Generator) -> Tensor:
    """`COPIES` of the videos, over and over."""
    num_kept = max(int(COPIES * len(video)), 1)
    return video[torch.arange(len(video)) % num_kept]


def _fading(video: Tensor, rng: torch.Generator) -> Tensor:
    """Ink that goes, evenly, to half of itself in the last frame."""
    left = torch.linspace(1, 0.5, video.shape[1]).view(1, -1, 1, 1, 1)
    return (video + 1) * left - 1


def _flickering(video: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the ink in every second frame."""
    return torch.where(torch.arange(video.shape[1]).view(1, -1, 1, 1, 1) % 2 == 1, (video - 1) / 2, video)


def _striped(video: Tensor, rng: torch.Generator) -> Tensor:
    """A faint line along the upper and left edge of every patch of 8 x 8 pixels."""
    on_edge = torch.arange(video.shape[-1]) % 8 == 0
    return torch.where(on_edge[:, None] | on_edge, video.clamp_min(STRIPE), video)


CORRUPTIONS = {
    "faint": _faint, "brightened": _brightened, "frozen": _frozen, "shuffled": _shuffled, "softened": _softened,
    "blurred": _blurred, "switched": _switched, "collapsed": _collapsed, "fading": _fading, "flickering": _flickering, "striped": _striped,
}


def corrupt(video: Tensor, how: str, seed: int = 0) -> Tensor:
    """Video (B, F, C, H, W) made worse in the way `how`, a key of `CORRUPTIONS`. Raises ValueError for another one."""
    if how not in CORRUPTIONS:
        raise ValueError(f"corruption is {how!r}: expected one of {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[how](video, torch_generator(seed, Purpose.FAULT))
