"""Stages of tiny networks, and what is compared of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from machine.runtime import Runtime
from moving_mnist import DatasetConfig
from network.text_encoder import TextEncoderConfig
from tiny_causal_wan import ModelConfig
from training.config import Config, SelfForcingConfig, TrainingConfig
from training.stages import SelfForcingStage

CPU = Runtime(torch.device("cpu"), torch.float32)
MODEL = {"frame_size": 16, "width": 24, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2, "patch_size": [1, 8, 8], "text_width": 32}
LENGTHS = {"batch_size": 2, "min_num_frames": 3, "max_num_frames": 9, "teacher_steps": 2}


def run_config(training: TrainingConfig, **model_sizes: int) -> Config:
    return Config(
        model=ModelConfig(**(MODEL | model_sizes)), text=TextEncoderConfig(width=32, max_tokens=12),
        dataset=DatasetConfig(frame_size=16, digit_size=8), training=training,
    )


def self_forcing_config(teacher: Path, **changes: Any) -> SelfForcingConfig:
    own = {"pretrained_checkpoint": str(teacher), "dfake_gen_update_ratio": 2, "critic_warmup_steps": 3}
    return SelfForcingConfig(**(own | LENGTHS | changes))


def build_self_forcing(teacher: Path, seed: int = 0, **changes: Any) -> SelfForcingStage:
    torch.manual_seed(seed)
    return SelfForcingStage(run_config(self_forcing_config(teacher, **changes)), CPU, torch.Generator().manual_seed(seed))


def snapshot(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def assert_same(actual: Any, expected: Any, name: str) -> None:
    """Equal bit for bit, through dicts and lists."""
    (found, shape), (wanted, expected_shape) = tree_flatten_with_path(actual), tree_flatten_with_path(expected)
    assert shape == expected_shape, name
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else type(a) is type(b) and a == b, f"{name}{keystr(path)}"
