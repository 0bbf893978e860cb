"""A tiny Wan-style video transformer: one set of weights, bidirectional or block-causal, with a KV cache.

Dimensions
    B batch, F frames, C channels, H height, W width of the video
    T, Y, X the patch grid (T = F / patch_size[0]), N = Y X tokens a patch row in time, S = T N tokens of the video
    D model width, h heads, d = D / h, L prompt tokens

The block is Wan's (arXiv 2503.20314, section 4): adaLN modulation with six parameters per frame, self-attention with 3-D RoPE and
RMS-normalised queries and keys, cross-attention to the prompt, feed-forward. Two departures, because patches are large and the network is
small: it predicts x_0 and returns the velocity, and the mean prompt embedding joins the time embedding (as pooled text does in arXiv
2403.03206).
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import math
import runpy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from machine.paths import REPOSITORY
from method.choices import require
from method.flow_matching import expand_time, velocity_from_x_0
from network.attention import (
    WHOLE_PAST,
    Attend,
    ContextWindow,
    Rope,
    apply_rope,
    attention,
    block_causal_mask,
    rope_angles,
    shifted,
    sinusoidal_embedding,
    teacher_forcing_mask,
)
from network.int8_products import quantize_linears
from network.kv_cache import KVCache
from network.weights import recomputed


@dataclass
class ModelConfig:
    """Sizes of the network. frame_size in pixels (square frames); patch_size is [temporal, height, width]."""

    frame_size: int = 32
    channels: int = 1
    width: int = 192
    num_layers: int = 6
    num_heads: int = 3
    ffn_ratio: int = 4
    patch_size: list[int] = field(default_factory=lambda: [1, 8, 8])
    text_width: int = 64
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(min(value if name == "patch_size" else [value], default=1) >= 1, f"model.{name}", value, "at least 1")
        require(len(self.patch_size) == 3, "model.patch_size", list(self.patch_size), "[temporal, height, width]")
        for axis, patch in zip(("height", "width"), self.patch_size[1:], strict=True):
            if self.frame_size % patch:
                divisors = [n for n in range(1, min(self.frame_size, 64) + 1) if self.frame_size % n == 0]  # larger patches: no use
                raise ValueError(f"model.patch_size {list(self.patch_size)}: the {axis} {patch} does not divide the frame size "
                                 f"{self.frame_size}; choose one of {divisors} or another model.frame_size")
        if self.width % self.num_heads or self.head_size % 2 or self.head_size < 6:
            raise ValueError(f"model.width {self.width} over model.num_heads {self.num_heads}: expected an even head size of at least 6")
        require(self.channels in (1, 3), "model.channels", self.channels, "1 or 3")

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.frame_size, self.frame_size

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """(Y, X): patches of a frame."""
        return self.frame_size // self.patch_size[1], self.frame_size // self.patch_size[2]

    @property
    def tokens_per_patch_row(self) -> int:
        """N: tokens of one temporal patch."""
        return math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        return self.channels * math.prod(self.patch_size)


@dataclass(frozen=True)
class PromptContext:
    """What the network needs of a batch of prompts, computed once."""

    keys: list[Tensor]  # of cross-attention: (B, h, L, d) for each layer
    values: list[Tensor]
    mask: Tensor  # (B, 1, 1, L): True for a token, False for padding
    pooled: Tensor  # (B, D)

    def concatenate(self, other: PromptContext) -> PromptContext:
        """Both batches as one, this one first."""
        return PromptContext(
            [torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)],
            [torch.cat(pair) for pair in zip(self.values, other.values, strict=True)],
            torch.cat([self.mask, other.mask]), torch.cat([self.pooled, other.pooled]),
        )

    def repeat(self, times: int) -> PromptContext:
        return PromptContext(
            [keys.repeat(times, 1, 1, 1) for keys in self.keys], [values.repeat(times, 1, 1, 1) for values in self.values],
            self.mask.repeat(times, 1, 1, 1), self.pooled.repeat(times, 1),
        )

    def serve_every_length(self) -> None:
        """Let a pass compiled with this prompt serve prompts of other lengths too."""
        for tensor in (*self.keys, *self.values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        torch._dynamo.maybe_mark_dynamic(self.mask, 3)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation (arXiv 1910.07467) in the format of its input, so that autocast keeps the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class WanBlock(nn.Module):
    """One transformer block. Input and output tokens (B, T, N, D); six modulation parameters per patch row."""

    def __init__(self, width: int, num_heads: int, ffn_ratio: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Parameter(torch.zeros(6, width))
        self.norm_self = nn.LayerNorm(width, elementwise_affine=False)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(width, width) for _ in range(4))
        self.norm_cross_q, self.norm_cross_k = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.norm_ffn = nn.LayerNorm(width, elementwise_affine=False)
        self.ffn_in, self.ffn_out = nn.Linear(width, ffn_ratio * width), nn.Linear(ffn_ratio * width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)  # (B, h, S, d)

    def prompt_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values (B, h, L, d) of prompt tokens (B, L, D)."""
        return self._heads(self.norm_cross_k(self.cross_k(text))), self._heads(self.cross_v(text))

    def forward(
        self, x: Tensor, modulation: Tensor, rope: Rope, prompt_key: Tensor, prompt_value: Tensor, prompt_mask: Tensor, attend: Attend
    ) -> Tensor:
        """modulation (B, T, 6, D), that of this layer included; rope: cos and sin (S, d); prompt key and value (B, h, L, d), mask
        (B, 1, 1, L). If attend returns only the last rows, so does the block."""
        shift, factor = modulation[:, :, :2].unsqueeze(3).unbind(2)  # (B, T, 1, D)
        y = torch.addcmul(shift, self.norm_self(x), factor)
        q, k = self._heads(self.norm_q(self.q(y))), self._heads(self.norm_k(self.k(y)))
        y = attend(apply_rope(q, *rope), apply_rope(k, *rope), self._heads(self.v(y)))  # (B, h, S, d)
        first_row = x.shape[1] - y.shape[2] // x.shape[2]
        x, modulation = x[:, first_row:], modulation[:, first_row:]
        gate_a, shift_f, factor_f, gate_f = modulation[:, :, 2:].unsqueeze(3).unbind(2)  # (B, T, 1, D)
        x = torch.addcmul(x, gate_a, self.o(y.transpose(1, 2).reshape(x.shape)))
        q = self._heads(self.norm_cross_q(self.cross_q(self.norm_cross(x))))
        y = attention(q, prompt_key, prompt_value, prompt_mask)
        x = x + self.cross_o(y.transpose(1, 2).reshape(x.shape))
        y = torch.addcmul(shift_f, self.norm_ffn(x), factor_f)
        return torch.addcmul(x, gate_f, self.ffn_out(F.gelu(self.ffn_in(y))))


class TinyCausalWanModel(nn.Module):
    """The network of generator, teacher and critic; each forward method names its attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, tuple(config.patch_size)
        self.patch_embedding = nn.Conv3d(config.channels, width, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_width, width), nn.GELU(), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(width, config.num_heads, config.ffn_ratio) for _ in range(config.num_layers))
        self.head_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head_modulation = nn.Parameter(torch.zeros(2, width))
        self.head = nn.Linear(width, config.patch_values)
        self._recomputes = self.is_compiled = False
        # Xavier for the matrices; adaLN-zero (arXiv 2212.09748): every block starts as the identity up to cross-attention.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(width, -1))
        nn.init.zeros_(self.time_projection[1].weight)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            nn.init.zeros_(block.cross_o.weight)

    def recompute_activations(self) -> None:
        """From now on recompute the blocks' activations in the backward pass instead of keeping them."""
        self._recomputes = True

    def compile_passes(self) -> None:
        """From now on run every pass as one compiled graph per size of batch and block. Outputs change by rounding errors."""
        self.is_compiled = True
        # fullgraph: an error, not silent Python, past Dynamo's limit. The threshold keeps results that are used twice, such as GELU's
        # before integer products, which take a row's maximum and then round: by default both would recompute it.
        self._pass = torch.compile(self._pass, dynamic=False, fullgraph=True, options={"realize_opcount_threshold": 8})

    def cast_products(self, dtype: torch.dtype) -> None:
        """Store the weights of matrix products in the format in which autocast multiplies them, so that no pass casts them again; outputs
        stay the same bit for bit. For generation only: training needs full precision."""
        for module in (*self.text_embedding.modules(), *self.blocks.modules(), self.head):
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def quantize_products(self, dtype: torch.dtype) -> None:
        """From now on run the blocks' matrix products in 8-bit integers, with results in dtype. For generation only."""
        quantize_linears(self.blocks, dtype)

    def new_cache(self, window_frames: int | None = None, sink_frames: int = 0) -> KVCache:
        """An empty cache for this network. Raises ValueError if a window or a sink splits a temporal patch."""
        config = self.config
        self._check_frames(window=window_frames, sink=sink_frames or None)
        sizes = (config.num_layers, config.num_heads, config.tokens_per_patch_row, config.patch_size[0], config.head_size)
        return KVCache(*sizes, config.rope_theta, window_frames, sink_frames, self.is_compiled)

    def encode_prompt(self, text: Tensor, text_mask: Tensor) -> PromptContext:
        """Work done once per prompt: text (B, L, text_width) and its mask (B, L) come from `TextEncoder`."""
        embedded = self.text_embedding(text)  # (B, L, D)
        weight = text_mask.unsqueeze(-1).to(embedded.dtype)
        pooled = (embedded * weight).sum(1) / weight.sum(1)
        keys, values = zip(*(block.prompt_keys_values(embedded) for block in self.blocks), strict=True)
        return PromptContext(list(keys), list(values), text_mask[:, None, None, :], pooled)

    def forward_bidirectional(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """v (B, F, C, H, W) where every frame sees every frame. t (B, F) in [0, 1]."""
        return self._checked_pass(x_t, t, prompt, [attention] * self.config.num_layers)

    def forward_block_causal(
        self, x_t: Tensor, t: Tensor, prompt: PromptContext, num_frames_per_block: int, context: ContextWindow = WHOLE_PAST
    ) -> Tensor:
        """v (B, F, C, H, W) where each frame sees its own block and the earlier ones (inside the window)."""
        attends = self._masked_attention(block_causal_mask, x_t, num_frames_per_block, context)
        return self._checked_pass(x_t, t, prompt, attends)

    def forward_teacher_forced(
        self, x_t: Tensor, t: Tensor, x_clean: Tensor, prompt: PromptContext, num_frames_per_block: int,
        context: ContextWindow = WHOLE_PAST,
    ) -> Tensor:
        """v of every block of x_t (B, F, C, H, W), each seeing itself and the blocks of x_clean before it, at time 0. One pass over the
        doubled sequence [clean | noisy]: what decoding block by block gives if the cache holds x_clean."""
        if x_clean.shape != x_t.shape:
            raise ValueError(f"clean video of shape {tuple(x_clean.shape)}: expected that of the noisy one, {tuple(x_t.shape)}")
        attends = self._masked_attention(teacher_forcing_mask, x_t, num_frames_per_block, context)
        doubled, times = torch.cat([x_clean, x_t], dim=1), torch.cat([torch.zeros_like(t), t], dim=1)  # (B, 2 F, C, H, W), (B, 2 F)
        return self._checked_pass(doubled, times, prompt, attends, num_copies=2)[:, x_t.shape[1]:]

    def forward_features(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """Tokens (B, T, N, D) after the last block, where every frame sees every frame: what a discriminator reads."""
        return self._checked_pass(x_t, t, prompt, [attention] * self.config.num_layers, has_head=False)

    def forward_cached(self, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache) -> Tensor:
        """v of one block x_t (B, F_block, C, H, W) that follows the cached frames, which stay as they are."""
        self._check_block(x_t, cache)
        cache.make_room(x_t.shape[1])
        if self._recomputes and torch.is_grad_enabled():
            cache = cache.snapshot()  # the backward pass must attend to the past as it is now
        return self._cached_pass(x_t, t, prompt, cache, x_t.shape[1])

    @torch.no_grad()  # the cache never carries gradient (Self-Forcing, Algorithm 1)
    def write_cache(self, x: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache) -> None:
        """Run one finished block (B, F_block, C, H, W) at time t (B, F_block) and keep its keys and values as part of the past."""
        self._check_block(x, cache)
        cache.make_room(x.shape[1])
        self._cached_pass(x, t, prompt, cache, x.shape[1], 0)
        cache.advance(x.shape[1])

    @torch.no_grad()
    def write_and_forward(self, x: Tensor, t_x: Tensor, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache) -> Tensor:
        """`write_cache` of a finished block x at t_x, then `forward_cached` of the next, x_t at t, without gradient. In one pass if the
        cache allows it, which is cheaper for a small network; the finished block does not see the next one."""
        self._check_block(x, cache)
        self._check_block(x_t, cache)
        num_frames = x.shape[1]
        if not cache.make_room(num_frames, x_t.shape[1]):
            self.write_cache(x, t_x, prompt, cache)
            return self.forward_cached(x_t, t, prompt, cache)
        both, times = torch.cat([x, x_t], dim=1), torch.cat([t_x, t], dim=1)
        v = self._cached_pass(both, times, prompt, cache, num_frames, x_t.shape[1])
        cache.advance(num_frames)
        return v

    def _cached_pass(
        self, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache, num_frames: int, num_next: int | None = None
    ) -> Tensor:
        """A pass after the cached frames. num_frames, num_next: see `KVCache.attends`."""
        device = x_t.device  # keys are cached in the format of the products
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.head_modulation.dtype
        attends = cache.attends(x_t.shape[0], dtype, device, num_frames, num_next)
        return self._checked_pass(x_t, t, prompt, attends, cache.next_row)

    def _masked_attention(
        self, make_mask: Callable[..., tuple[Tensor, tuple[int, ...]]], x_t: Tensor, num_frames_per_block: int, context: ContextWindow
    ) -> list[Attend]:
        """Attention of all layers under a mask, and to the copies of the sink that it asks for."""
        self._check_frames(block=num_frames_per_block, window=context.window_frames, sink=context.sink_frames or None)
        context.check(num_frames_per_block)
        patch, tokens = self.config.patch_size[0], self.config.tokens_per_patch_row
        mask, copy_rows = make_mask(x_t.shape[1], num_frames_per_block, context, patch, tokens, x_t.device)
        if not copy_rows:
            return [partial(attention, mask=mask)] * self.config.num_layers
        num_tokens = context.sink_frames // patch * tokens

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sink_k, sink_v = k[:, :, :num_tokens], v[:, :, :num_tokens]  # at the rows 0, 1, ...
            keys = torch.cat([k, *(shifted(sink_k, row, self.config.rope_theta) for row in copy_rows)], dim=2)
            return attention(q, keys, torch.cat([v, *[sink_v] * len(copy_rows)], dim=2), mask)

        return [attend] * self.config.num_layers

    def _check_frames(self, **counts: int | None) -> None:
        """Raise ValueError naming a count of frames that splits a temporal patch."""
        patch = self.config.patch_size[0]
        for name, count in counts.items():
            if count is not None and (count < 1 or count % patch):
                raise ValueError(f"a {name} of {count} frames: expected a positive multiple of the temporal patch {patch}")

    def _check_block(self, block: Tensor, cache: KVCache) -> None:
        self._check_frames(block=block.shape[1])
        if cache.window_frames is not None and block.shape[1] > cache.window_frames:
            raise ValueError(f"a block of {block.shape[1]} frames: expected at most the cache's window of {cache.window_frames}")

    def _checked_pass(
        self, x_t: Tensor, t: Tensor, prompt: PromptContext, attends: list[Attend], first_row: int = 0, num_copies: int = 1,
        has_head: bool = True,
    ) -> Tensor:
        """`_pass` with the rotations of patch rows from first_row on; x_t holds num_copies videos in a row, each at the same positions.
        Raises ValueError if its inputs do not fit each other or the network."""
        config, patch = self.config, self.config.patch_size[0]
        if x_t.ndim != 5 or tuple(x_t.shape[2:]) != config.frame_shape or x_t.shape[1] % patch:
            raise ValueError(f"video of shape {tuple(x_t.shape)}: expected (B, F, {', '.join(map(str, config.frame_shape))}) with F a "
                             f"multiple of the temporal patch {patch}")
        if prompt.pooled.shape[0] != x_t.shape[0]:
            raise ValueError(f"{prompt.pooled.shape[0]} prompts for {x_t.shape[0]} videos: expected one each")
        expand_time(t, x_t)  # refuses a t that is not (B, F); frames that share a temporal patch share its first frame's t
        if self.is_compiled:
            prompt.serve_every_length()
        num_rows = x_t.shape[1] // patch // num_copies
        cos, sin = rope_angles(config.grid, config.head_size, config.rope_theta, first_row, num_rows, x_t.device)
        rope = (cos, sin) if num_copies == 1 else (cos.repeat(num_copies, 1), sin.repeat(num_copies, 1))
        return self._pass(x_t, t, prompt, rope, attends, has_head)

    def _pass(
        self, x_t: Tensor, t: Tensor, prompt: PromptContext, rope: Rope, attends: list[Attend], has_head: bool = True
    ) -> Tensor:
        """One pass, which `compile_passes` compiles in one piece: v (B, F, C, H, W), or without the head tokens (B, T, N, D)."""
        config = self.config
        # 1. Patches to tokens (B, T, N, D), time and prompt to an embedding (B, T, D) and each layer's modulation (B, T, 6, D).
        x = self.patchify(x_t)
        with torch.autocast(x_t.device.type, enabled=False):  # times and modulation stay in float32
            embedded_time = self.time_embedding(sinusoidal_embedding(t[:, ::config.patch_size[0]], config.width))
            embedded_time = embedded_time + prompt.pooled.float()[:, None]
            modulation = self.time_projection(embedded_time).unflatten(-1, (1, 6, config.width))  # (B, T, 1, 6, D)
            own = torch.stack([block.modulation for block in self.blocks])  # (layers, 6, D)
            own[:, 1::3] += 1  # the 1 of both 1 + scale
            modulations = (modulation + own).unbind(2)  # all layers in one sum
        # 2. The blocks.
        for layer, block in enumerate(self.blocks):
            inputs = (x, modulations[layer], rope, prompt.keys[layer], prompt.values[layer], prompt.mask, attends[layer])
            x = recomputed(block, *inputs) if self._recomputes and torch.is_grad_enabled() else block(*inputs)
        if not has_head:
            return x
        # 3. The modulated head, which predicts x_0, on the rows that the last layer attended for.
        first_row = embedded_time.shape[1] - x.shape[1]
        first_frame = first_row * config.patch_size[0]
        shift, scale = (embedded_time[:, first_row:, None] + self.head_modulation).unsqueeze(3).unbind(2)  # (B, T, 1, D)
        x_0 = self.unpatchify(self.head(self.head_norm(x) * (1 + scale) + shift).float())
        return velocity_from_x_0(x_t[:, first_frame:].float(), x_0, t[:, first_frame:])

    def patchify(self, video: Tensor) -> Tensor:
        """Video (B, F, C, H, W) to embedded tokens (B, T, N, D): the Conv3d, whose patches do not overlap, as one product."""
        pt, ph, pw = self.config.patch_size
        patches = rearrange(video, "b (t pt) c (y ph) (x pw) -> b t (y x) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Patch values (B, T, N, C pt ph pw) to video (B, F, C, H, W)."""
        pt, ph, pw = self.config.patch_size
        sizes = {"y": self.config.grid[0], "c": self.config.channels, "pt": pt, "ph": ph, "pw": pw}
        return rearrange(tokens, "b t (y x) (c pt ph pw) -> b (t pt) c (y ph) (x pw)", **sizes)


if __name__ == "__main__":
    runpy.run_path(str(REPOSITORY / "tests" / "self_tests" / "tiny_causal_wan.py"), run_name="__main__")
