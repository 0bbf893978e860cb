"""One block of the transformer, as Wan's (arXiv 2503.20314, section 4): what happens to the tokens of a video in a layer.

Dimensions: B batch, T, Y, X the patch grid, N = Y X tokens a patch row in time, S = T N tokens of the video, D model width, h heads,
d = D / h, L prompt tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attend, Rope, apply_rope, attention


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
        """modulation (B, T, 6, D), the layer's own too; rope: cos and sin (S, d); prompt key and value (B, h, L, d), mask (B, 1, 1, L).

        Where attend answers for the last rows alone, these alone come out.
        """
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
