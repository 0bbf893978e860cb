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
CORRUPTIONS = {  # what each one does, for the report
    "faint": "A fifth of the ink.",
    "brightened": "`GAIN` times the ink, up to white.",
    "frozen": "The first frame throughout.",
    "shuffled": "The frames in another order, the same for all videos.",
    "softened": "One 3 x 3 average: a digit still.",
    "blurred": "Six 3 x 3 averages: hardly a digit.",
    "switched": "The second half is another video's.",
    "collapsed": "`COPIES` of the videos, over and over.",
    "fading": "Ink that goes, evenly, to half of itself in the last frame.",
    "flickering": "Half of the ink in every second frame.",
    "striped": "A faint line along the upper and left edge of every patch of 8 x 8 pixels.",
}


def corrupt(video: Tensor, how: str, seed: int = 0) -> Tensor:
    """Video (B, F, C, H, W) made worse in the way `how`, a key of `CORRUPTIONS`. Raises ValueError for another one."""
    num_videos, num_frames = video.shape[:2]
    match how:
        case "faint":
            return (video + 1) / 5 - 1
        case "brightened":
            return ((video + 1) * GAIN - 1).clamp(-1, 1)
        case "frozen":
            return video[:, :1].expand_as(video)
        case "shuffled":
            return video[:, torch.randperm(num_frames, generator=torch_generator(seed, Purpose.FAULT))]
        case "softened" | "blurred":
            frames = video.flatten(0, 1) + 1
            for _ in range(1 if how == "softened" else 6):
                frames = functional.avg_pool2d(frames, 3, stride=1, padding=1)
            return frames.view_as(video) - 1
        case "switched":
            half = num_frames // 2
            return torch.cat((video[:, :half], video.roll(1, dims=0)[:, half:]), dim=1)
        case "collapsed":
            return video[torch.arange(num_videos) % max(int(COPIES * num_videos), 1)]
        case "fading":
            return (video + 1) * torch.linspace(1, 0.5, num_frames).view(-1, 1, 1, 1) - 1
        case "flickering":
            return torch.where(torch.arange(num_frames).view(-1, 1, 1, 1) % 2 == 1, (video - 1) / 2, video)
        case "striped":
            on_edge = torch.arange(video.shape[-1]) % 8 == 0
            return torch.where(on_edge[:, None] | on_edge, video.clamp_min(STRIPE), video)
    raise ValueError(f"corruption is {how!r}: expected one of {', '.join(CORRUPTIONS)}")
