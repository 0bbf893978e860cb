"""What becomes an ONNX graph: the network's passes as functions of tensors, over a cache of fixed size.

Dimensions: R patch rows that the cache holds, K patch rows of a block, N tokens a row, h heads, d head size, L prompt tokens, D model
width. The batch is 1.

The cache is two tensors, keys and values (layers, 1, h, R N, d). Its row r has position r, the block after it R to R + K - 1. The last
`visible` rows are the visible past, the rows before are masked. The cache pass adds a finished block: it takes R of the R + K rows in a new
order and rotates each key by as many positions as its row has moved (`network.attention.shifted`). The caller chooses the rows that stay,
which makes window and sink: `src/past.ts` on the page, `tests/helpers/onnx_stream.py` in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from network.attention import Attend, Rope, apply_rope, rope_angles
from network.text_encoder import TextEncoder
from tiny_causal_wan import PromptContext, TinyCausalWanModel

HIDDEN = -1e9  # added to the score of a masked key


class Pass(nn.Module):
    """Base of the denoising and the cache pass. cache_rows: R; block_frames: frames of a block."""

    def __init__(self, model: TinyCausalWanModel, cache_rows: int, block_frames: int):
        super().__init__()
        self.model, self.cache_rows, self.block_frames = model, cache_rows, block_frames
        config = model.config
        self.block_rows = block_frames // config.patch_size[0]
        grid = (config.frame_size // config.patch_size[1], config.frame_size // config.patch_size[2])
        rope = rope_angles(grid, config.head_size, config.rope_theta, cache_rows, self.block_rows, torch.device("cpu"))
        self.register_buffer("cos", rope[0].clone(), persistent=False)
        self.register_buffer("sin", rope[1].clone(), persistent=False)

    def run(self, x_t: Tensor, t: Tensor, prompt: tuple[Tensor, ...], attends: list[Attend]) -> Tensor:
        """v (1, F, C, H, W) of x_t at t (1,). The only place that calls the network's own pass."""
        keys, values, mask, pooled = prompt
        context = PromptContext(list(keys.unbind(0)), list(values.unbind(0)), mask > 0.5, pooled)
        rope: Rope = (self.cos, self.sin)
        return self.model._pass(x_t, t.reshape(1, 1).expand(1, self.block_frames), context, rope, attends)

    def hidden_bias(self, visible: Tensor) -> Tensor:
        """(R N + K N,): 0 for the last `visible` (1,) cached rows and the block, else `HIDDEN`."""
        tokens = self.model.config.tokens_per_patch_row
        row = torch.arange(self.cache_rows + self.block_rows).repeat_interleave(tokens)
        return (row < self.cache_rows - visible).float() * HIDDEN


def attend_behind(
    past: tuple[Tensor, Tensor], bias: Tensor, keep: Callable[[Tensor, Tensor], None], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of a block to the cached past and itself; `keep` is called with the block's rotated keys and its values."""
    keep(k, v)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))  # (1, h, (R + K) N, d)
    return torch.softmax((q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2) + bias, dim=-1) @ values


class DenoisePass(Pass):
    """x_0 of a noisy block behind the cache."""

    def forward(
        self, x_t: Tensor, t: Tensor, keys: Tensor, values: Tensor, visible: Tensor, prompt_keys: Tensor, prompt_values: Tensor,
        prompt_mask: Tensor, pooled: Tensor,
    ) -> Tensor:
        """x_t (1, F, C, H, W), t (1,) in (0, 1], visible (1,) int64, prompt_*: see `TextPass`. Returns x_0 like x_t, not clamped."""
        bias = self.hidden_bias(visible)
        attends = [partial(attend_behind, past, bias, lambda k, v: None) for past in zip(keys.unbind(0), values.unbind(0), strict=True)]
        v = self.run(x_t, t, (prompt_keys, prompt_values, prompt_mask, pooled), attends)
        return x_t - t * v


class CachePass(Pass):
    """The cache with a finished block in it."""

    def forward(
        self, x: Tensor, t: Tensor, keys: Tensor, values: Tensor, visible: Tensor, order: Tensor, prompt_keys: Tensor,
        prompt_values: Tensor, prompt_mask: Tensor, pooled: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x (1, F, C, H, W) at t (1,). order (R,) int64: for each row of the new cache, its row among the R + K old and new ones.
        Returns the new keys and values."""
        written: list[tuple[Tensor, Tensor]] = []
        bias = self.hidden_bias(visible)
        keep = lambda k, v: written.append((k, v))  # noqa: E731  the last layer's attention is unused, and not in the graph
        attends = [partial(attend_behind, past, bias, keep) for past in zip(keys.unbind(0), values.unbind(0), strict=True)]
        self.run(x, t, (prompt_keys, prompt_values, prompt_mask, pooled), attends)
        new_keys, new_values = (torch.stack(tensors) for tensors in zip(*written, strict=True))  # (layers, 1, h, K N, d)
        return self._turned(self._ordered(keys, new_keys, order), order), self._ordered(values, new_values, order)

    def _ordered(self, cached: Tensor, new: Tensor, order: Tensor) -> Tensor:
        tokens = self.model.config.tokens_per_patch_row
        rows = torch.cat([cached, new], dim=3).unflatten(3, (-1, tokens))  # (layers, 1, h, R + K, N, d)
        return rows.index_select(3, order).flatten(3, 4)

    def _turned(self, keys: Tensor, order: Tensor) -> Tensor:
        """Keys rotated to their new rows: as `network.attention.shifted`, each row by its own distance."""
        config = self.model.config
        half = config.head_size // 2
        num_times = half - 2 * (half // 3)  # angles of time, before those of height and width: see `rope_angles`
        frequency = torch.zeros(half)
        frequency[:num_times] = (config.rope_theta ** (-torch.arange(num_times, dtype=torch.float64) / num_times)).float()
        moved = torch.arange(self.cache_rows) - order
        angle = (moved.float()[:, None] * frequency).repeat_interleave(config.tokens_per_patch_row, 0)  # (R N, d / 2)
        cos, sin = angle.cos(), angle.sin()
        return apply_rope(keys, torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1))


class TextPass(nn.Module):
    """A prompt as the other passes take it."""

    def __init__(self, model: TinyCausalWanModel, text_encoder: TextEncoder):
        super().__init__()
        self.model, self.text_encoder = model, text_encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens (1, L) int64 to keys and values (layers, 1, h, L, d), mask (1, 1, 1, L) of 1 and 0, pooled (1, D)."""
        prompt = self.model.encode_prompt(*self.text_encoder(tokens))
        return torch.stack(prompt.keys), torch.stack(prompt.values), prompt.mask.float(), prompt.pooled
