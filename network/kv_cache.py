"""The rolling KV cache: self-attention keys and values of the frames made so far, in constant memory.

Dimensions: B batch, h heads, d head size, N tokens a patch row in time; rows are patch rows, `frames_per_row` frames each.

One buffer holds the keys of all layers and one the values. The visible past is one range of rows, the sink first, and the current block
comes right after it: a pass without gradient writes its keys and values in place and attends to a view. A row is a position: with every
block the range moves right, the rows left of it are forgotten, and the sink is copied right before the remaining ones. When the buffer is
full, the range moves back to row 0 and its keys are rotated, as attention depends on differences of positions only.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from network.attention import Attend, attention, shifted


class KVCache:
    """Keys (rotated to their positions) and values of the past that a block may see; only `advance` makes a block part of it.

    window_frames, sink_frames: see `ContextWindow`. is_compiled: the passes are compiled by `torch.compile`."""

    def __init__(
        self, num_layers: int, num_heads: int, tokens_per_row: int, frames_per_row: int, head_size: int, rope_theta: float,
        window_frames: int | None = None, sink_frames: int = 0, is_compiled: bool = False,
    ):
        self.num_frames = 0  # frames written so far
        self.window_frames = window_frames
        self._num_layers, self._num_heads, self._is_compiled = num_layers, num_heads, is_compiled
        self._frames_per_row, self._tokens_per_row = frames_per_row, tokens_per_row
        self._head_size, self._rope_theta = head_size, rope_theta
        self._window_rows = None if window_frames is None else window_frames // frames_per_row
        self._sink_rows = sink_frames // frames_per_row
        self._first, self._end, self._capacity = 0, 0, 0  # rows: of the visible past, behind it, and in the buffers
        self._keys = self._values = torch.empty(num_layers, 0, 0, 0, 0)  # (layers, B, h, rows N, d)
        self._sink: tuple[Tensor, Tensor] | None = None  # its keys, as at rows 0, 1, ..., and values, once frames have left

    @property
    def next_row(self) -> int:
        """The position of the next block: the row behind the visible past."""
        return self._end

    def make_room(self, num_frames: int, num_next: int = 0) -> bool:
        """Forget what a block of num_frames no longer sees, and make room for it and for one of num_next after it. Repeating it changes
        nothing. Returns False, and does nothing, if one pass cannot run both blocks, as the sink would have to be in two places."""
        if self._window_rows is None:
            return True
        num_rows, num_both = num_frames // self._frames_per_row, (num_frames + num_next) // self._frames_per_row
        num_visible = self._end - self._first
        if num_next and self._sink_rows and num_visible + num_both > self._window_rows:
            return False
        if num_visible + num_rows > self._window_rows:
            self.forget_behind_sink((num_visible + num_rows - self._window_rows) * self._frames_per_row)
        if self._end + num_both > 2 * self._window_rows:  # so a row is moved at most twice while it is visible
            self._move_back()
        return True

    def forget_first(self, num_frames: int) -> None:
        """Forget the first num_frames frames of the video if they are still visible; not for a cache with a sink."""
        num_forgotten = self.num_frames // self._frames_per_row - (self._end - self._first)
        self._first += max(num_frames // self._frames_per_row - num_forgotten, 0)

    def forget_behind_sink(self, num_frames: int) -> None:
        """Forget the first num_frames visible frames after the sink, and put the sink right before the remaining ones."""
        if self._sink_rows and self._sink is None:  # nothing has moved yet: it is at the rows 0, 1, ...
            sink = self._tokens(0, self._sink_rows)
            self._sink = self._keys[..., sink, :].clone(), self._values[..., sink, :].clone()
        self._first += num_frames // self._frames_per_row
        self._place_sink()

    def attends(
        self, batch_size: int, dtype: torch.dtype, device: torch.device, num_frames: int, num_next: int | None = None
    ) -> list[Attend]:
        """Self-attention of every layer for a block of num_frames, which sees the visible past and itself. dtype, device: of the keys.

        num_next (without gradient): the pass writes a finished block of num_frames and, in the same sequence, runs the next block of
        num_next frames (0: none), which sees the finished block and its own window. In the last layer only the next block attends, as
        nothing but keys and values is needed of a finished one.

        Without gradient a pass writes its keys and values after the past, in place; with gradient it leaves the buffers unchanged."""
        if torch.is_grad_enabled():
            return [partial(_attend_to_copies, past) for past in self._views(self._first, self._end)]
        end = self._end + (num_frames + (num_next or 0)) // self._frames_per_row
        if end > self._capacity:
            self._grow(end, batch_size, dtype, device)
        views = self._views(self._first - 1, end)
        for view in chain(*views) if self._is_compiled else ():
            torch._dynamo.maybe_mark_dynamic(view, 2)  # one graph serves a past of every length
        spare, block = self._tokens_per_row, num_frames // self._frames_per_row * self._tokens_per_row
        if not num_next:
            attends = [partial(_attend, *view, spare, block) for view in views]
            return attends if num_next is None else [*attends[:-1], partial(_attend, *views[-1], spare, 0)]
        num_left = 0 if self._window_rows is None else max(end - self._first - self._window_rows, 0)
        hidden, following = spare + num_left * self._tokens_per_row, num_next // self._frames_per_row * self._tokens_per_row
        both = [partial(_attend_both, *view, spare, block, hidden) for view in views[:-1]]
        return [*both, partial(_attend, *views[-1], hidden, following)]

    def _views(self, first_row: int, end_row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, h, S, d) of each layer in these rows; (0, 0, 0, 0) before the first write."""
        tokens = self._tokens(first_row, end_row)
        return [(keys[:, :, tokens], values[:, :, tokens]) for keys, values in zip(self._keys, self._values, strict=True)]

    def advance(self, num_frames: int) -> None:
        """Make the block of the last pass, which ran without gradient, part of the past."""
        self._end += num_frames // self._frames_per_row
        self.num_frames += num_frames

    def snapshot(self) -> KVCache:
        """A copy that later writes do not change."""
        twin = copy.copy(self)
        twin._keys, twin._values = self._keys.clone(), self._values.clone()
        return twin

    def _tokens(self, first_row: int, end_row: int) -> slice:
        """Place of rows in the buffers, which have a spare row at either end: no view is then as long as a buffer or as the current block,
        so one compiled graph serves every length (`attends`)."""
        return slice((1 + first_row) * self._tokens_per_row, (1 + end_row) * self._tokens_per_row)

    def _grow(self, end: int, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Move to buffers of at least `end` rows: twice as many as now, but at most twice the window."""
        capacity = max(2 * self._capacity, 4 * (end - self._end), end)
        self._capacity = capacity if self._window_rows is None else min(capacity, 2 * self._window_rows)
        shape = (self._num_layers, batch_size, self._num_heads, (self._capacity + 2) * self._tokens_per_row, self._head_size)
        stored = self._tokens(0, self._end)
        keys, values = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        if self._end:
            keys[..., stored, :], values[..., stored, :] = self._keys[..., stored, :], self._values[..., stored, :]
        self._keys, self._values = keys, values

    def _place_sink(self) -> None:
        if self._sink is not None:
            place = self._tokens(self._first, self._first + self._sink_rows)
            self._keys[..., place, :] = shifted(self._sink[0], self._first, self._rope_theta)
            self._values[..., place, :] = self._sink[1]

    def _move_back(self) -> None:
        """Move the visible past to row 0, in place."""
        old, num_rows = self._tokens(self._first, self._end), self._end - self._first
        new = self._tokens(0, num_rows)
        self._keys[..., new, :] = shifted(self._keys[..., old, :], -self._first, self._rope_theta)
        self._values[..., new, :] = self._values[..., old, :].clone()  # old and new may overlap if the next block is larger
        self._first, self._end = 0, num_rows
        self._place_sink()


def _attend(keys: Tensor, values: Tensor, num_hidden: int, num_last: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write a pass's k and v (B, h, S, d) to the end of keys and values (B, h, hidden + seen, d), and attend for its last tokens."""
    num_tokens = k.shape[2]
    keys[:, :, -num_tokens:], values[:, :, -num_tokens:] = k, v
    return attention(q[:, :, num_tokens - num_last:], keys[:, :, num_hidden:], values[:, :, num_hidden:])


def _attend_both(
    keys: Tensor, values: Tensor, num_spare: int, num_first: int, num_hidden: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The same for two blocks in a row: the first, of num_first tokens, from which num_spare are hidden, does not see the next."""
    num_tokens, num_next = k.shape[2], k.shape[2] - num_first
    keys[:, :, -num_tokens:], values[:, :, -num_tokens:] = k, v
    first = attention(q[:, :, :num_first], keys[:, :, num_spare:-num_next], values[:, :, num_spare:-num_next])
    following = attention(q[:, :, num_first:], keys[:, :, num_hidden:], values[:, :, num_hidden:])
    return torch.cat([first, following], dim=2)


def _attend_to_copies(past: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from a block (B, h, S, d) to the past and itself, and write nothing."""
    keys, values = (torch.cat([seen, own], dim=2) if seen.numel() else own.contiguous() for seen, own in zip(past, (k, v), strict=True))
    return attention(q, keys, values)
