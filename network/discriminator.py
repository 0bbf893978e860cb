"""The discriminator of the GAN loss: a video transformer's features under a small head.

Dimensions: B batch, F frames, C channels, H height, W width, T rows of temporal patches, N tokens a row, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Discriminator(nn.Module):
    """The critic's network with a small head on its last tokens, in place of the velocity head: one logit per noised video."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        width = backbone.config.width
        self.backbone = backbone
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor, prompt: Any) -> Tensor:
        """Logits (B,) of noised videos x_t (B, F, C, H, W) at times t (B, F); higher is more real."""
        return self.head(self.backbone.forward_features(x_t, t, prompt)).float().mean(dim=(1, 2, 3))  # of (B, T, N, 1)
