"""Which videos of a batch are at hand, where several processes or several micro-batches share one.

Whatever is random for each video is drawn for the whole batch, from one stream that everyone who shares it holds in the same
state, and cut to the own rows: so N processes and k micro-batches see what one process sees in one pass. What is drawn once a
batch (exit step, number of frames) is then the same for all by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Items = TypeVar("Items", bound=Sequence)


@dataclass(frozen=True)
class BatchShare:
    """The `count` videos from number `first` on, of a batch of `total`."""

    first: int
    count: int
    total: int

    def of(self, batch: Items) -> Items:
        """The own items of a sequence with one item a video of the whole batch."""
        return batch[self.first: self.first + self.count]

    def draw(self, draw_batch: Callable[[int], Tensor], dim: int = 0) -> Tensor:
        """Own part, along dim, of what draw_batch makes for a batch of so many videos."""
        return draw_batch(self.total).narrow(dim, self.first, self.count)

    def draw_normal(self, shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise (count, *shape), on the CPU."""
        return self.draw(lambda total: torch.randn((total, *shape), generator=random, dtype=dtype))

    @property
    def fraction(self) -> float:
        """Of the batch that is at hand."""
        return self.count / self.total


def share_or_whole(share: BatchShare | None, num_videos: int) -> BatchShare:
    """The share that num_videos are, or the whole batch where none is named. Raises ValueError where their numbers differ."""
    if share is None:
        return BatchShare(0, num_videos, num_videos)
    if share.count != num_videos:
        raise ValueError(f"{num_videos} videos: expected {share.count}, as many as this share of a batch of {share.total} has")
    return share
