"""Helpers that several test files share."""

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from machine.batch_random import BatchRandom
from network.text_encoder import TextEncoder, TextEncoderConfig
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel

SMALL_SIZES = {
    "frame_size": 8, "width": 24, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2, "patch_size": [1, 4, 4], "text_width": 32
}


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest-xdist runs tests in several processes, each takes its share of the cores, and its children too."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:
        num_threads = max((os.cpu_count() or 1) // num_workers, 1)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)


def load_self_test(name: str) -> dict[str, Any]:
    """The functions of the checks that `python NAME.py` runs."""
    return runpy.run_path(str(Path(__file__).parent / "self_tests" / f"{name}.py"))


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Replace zero-initialised parameters by small normals, so that every path through a fresh network matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return module


def build_small_model(seed: int = 0, **sizes: int | list[int]) -> TinyCausalWanModel:
    """A randomised network of `SMALL_SIZES`, some of them replaced."""
    torch.manual_seed(seed)
    return randomise(TinyCausalWanModel(ModelConfig(**{**SMALL_SIZES, **sizes})), seed).eval()


def batch_random(seed: int = 0) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed))


def random_text(model: TinyCausalWanModel, batch_size: int, seed: int = 0, num_tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 2 to num_tokens random token embeddings, as a text encoder returns them."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(batch_size, num_tokens, model.config.text_width, generator=random)
    length = torch.randint(2, num_tokens + 1, (batch_size, 1), generator=random)
    return text, torch.arange(num_tokens) < length


def random_prompt(model: TinyCausalWanModel, batch_size: int, seed: int = 0, num_tokens: int = 5) -> PromptContext:
    """The context of `random_text`."""
    return model.encode_prompt(*random_text(model, batch_size, seed, num_tokens))


def random_video(model: TinyCausalWanModel, batch_size: int, num_frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy video (B, F, C, H, W) and one time in [0.1, 1] per temporal patch, as (B, F)."""
    random = torch.Generator().manual_seed(seed)
    side, temporal_patch = model.config.frame_size, model.config.patch_size[0]
    x_t = torch.randn(batch_size, num_frames, model.config.channels, side, side, generator=random)
    t = 0.1 + 0.9 * torch.rand(batch_size, num_frames // temporal_patch, generator=random)
    return x_t, t.repeat_interleave(temporal_patch, 1)


@pytest.fixture
def small_config() -> ModelConfig:
    return ModelConfig(**SMALL_SIZES)


@pytest.fixture
def small_model() -> TinyCausalWanModel:
    return build_small_model()


@pytest.fixture
def small_text_encoder() -> TextEncoder:
    torch.manual_seed(1)
    return TextEncoder(TextEncoderConfig(width=32, max_tokens=12)).eval()
