"""Helpers that several test files share."""

import pytest
import torch
from torch import nn

from text_encoder import TextEncoder, TextEncoderConfig
from tiny_causal_wan import ModelConfig, TinyCausalWanModel


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Replace zero-initialised parameters by small normals, so that every path through a fresh network matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return module


@pytest.fixture
def small_config() -> ModelConfig:
    return ModelConfig(frame_size=8, width=24, num_layers=2, num_heads=2, ffn_ratio=2, patch_size=[1, 4, 4], text_width=32)


@pytest.fixture
def small_model(small_config: ModelConfig) -> TinyCausalWanModel:
    torch.manual_seed(0)
    return randomise(TinyCausalWanModel(small_config)).eval()


@pytest.fixture
def small_text_encoder() -> TextEncoder:
    torch.manual_seed(1)
    return TextEncoder(TextEncoderConfig(width=32, max_tokens=12)).eval()
