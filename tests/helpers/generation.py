"""Calls of generate.py with tiny networks."""

from pathlib import Path

import pytest
from helpers.networks import SMALL_SIZES, save_untrained

from generate import main
from moving_mnist import DatasetConfig
from network.text_encoder import TextEncoderConfig
from tiny_causal_wan import ModelConfig
from training.config import Config, PretrainConfig, SelfForcingConfig, TrainingConfig

STUDENT = SelfForcingConfig(denoising_steps=[1000, 600, 300], context_noise=100, guidance=3.0)
TEACHER = PretrainConfig(teacher_steps=3, teacher_guidance=2.0, teacher_eta=0.4, teacher_ink_kept=0.3)
COMMON = ("--device", "cpu", "--precision", "float32")


def write_networks(path: Path, training: TrainingConfig) -> Path:
    dataset, text = DatasetConfig(frame_size=8, digit_size=4), TextEncoderConfig(width=32)
    return save_untrained(path, Config(model=ModelConfig(**SMALL_SIZES), text=text, dataset=dataset, training=training))


def generate_files(checkpoint: Path, folder: Path, *arguments: str) -> None:
    """A call of generate.py that writes into the folder."""
    main(["--checkpoint", str(checkpoint), "--output_dir", str(folder), *COMMON, *arguments])


def refusal(*arguments: str) -> str:
    """The one line with which the command line ends on bad input."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *COMMON])
    message = stop.value.code
    assert isinstance(message, str), "a text as exit code is printed to stderr, with status 1"
    assert message.startswith("error: ") and "\n" not in message
    return message
