"""Random draws for a batch that is split over processes or micro-batches: drawn for the whole batch, from a generator in the same state
everywhere, then cut to the own part, so that N processes and k micro-batches see what one process sees in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class BatchRandom:
    """Draws one value a video from `generator`, for the whole batch or, inside `parts`, for the current part. Values that all videos share
    (exit step, number of frames) are drawn from `generator` itself."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self._part: slice | None = None  # of a batch of _batch_size videos; None: the whole batch
        self._batch_size = 0

    def parts(self, parts: Iterable[slice], batch_size: int) -> Iterator[slice]:
        """Yield the parts of a batch, each with the generator in the state in which the first one found it."""
        state = self.generator.get_state()
        try:
            for part in parts:
                self.generator.set_state(state)
                self._part, self._batch_size = part, batch_size
                yield part
        finally:
            self._part = None

    def batch_size(self, num_videos: int) -> int:
        """Size of the whole batch. Raises ValueError if num_videos is not the size of the current part."""
        if self._part is None:
            return num_videos
        expected = self._part.stop - self._part.start
        if num_videos != expected:
            raise ValueError(f"{num_videos} videos: expected {expected}, the size of this part of a batch of {self._batch_size}")
        return self._batch_size

    def cut(self, batch: Tensor, dim: int = 0) -> Tensor:
        """The current part of a tensor that has one entry per video of the whole batch along dim."""
        return batch if self._part is None else batch.narrow(dim, self._part.start, self._part.stop - self._part.start)

    def draw(self, num_videos: int, draw_batch: Callable[[int], Tensor], dim: int = 0) -> Tensor:
        """The current part, num_videos along dim, of what draw_batch draws for the size of the whole batch."""
        return self.cut(draw_batch(self.batch_size(num_videos)), dim)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise in the shape, format and device of x (B, ...), drawn on the CPU."""
        eps = self.draw(len(x), lambda total: torch.randn((total, *x.shape[1:]), generator=self.generator, dtype=x.dtype))
        return eps.to(x.device)

    def seeds(self, num_videos: int) -> list[int]:
        """A seed, 0 to 2**62 - 1, for each video."""
        return self.draw(num_videos, lambda total: torch.randint(2**62, (total,), generator=self.generator)).tolist()
