"""Fixtures that several test files share."""

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import os
from pathlib import Path

import pytest
import torch
from helpers.generation import STUDENT, write_networks
from helpers.networks import build_small_model, save_untrained
from helpers.stages import LENGTHS, run_config

import dynamic_video_sf
from dynamic_video_sf import make_noise_streams
from network.text_encoder import TextEncoder, TextEncoderConfig
from tiny_causal_wan import TinyCausalWanModel
from training.checkpoint import LoadedNetworks, load_networks
from training.config import PretrainConfig


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest-xdist runs tests in several processes, each takes its share of the cores, and its children too."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:
        num_threads = max((os.cpu_count() or 1) // num_workers, 1)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)


@pytest.fixture
def small_model() -> TinyCausalWanModel:
    return build_small_model()


@pytest.fixture
def small_text_encoder() -> TextEncoder:
    torch.manual_seed(1)
    return TextEncoder(TextEncoderConfig(width=32, max_tokens=12)).eval()


@pytest.fixture
def drawn_seeds(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every rollout of an engine."""
    drawn: list[list[int]] = []
    monkeypatch.setattr(dynamic_video_sf, "make_noise_streams", lambda seeds: drawn.append(seeds) or make_noise_streams(seeds))
    return drawn


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A checkpoint of pretraining with random weights everywhere."""
    return save_untrained(tmp_path / "teacher.pt", run_config(PretrainConfig(**LENGTHS)))


@pytest.fixture(scope="module")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_networks(tmp_path_factory.mktemp("student") / "student.pt", STUDENT)


@pytest.fixture(scope="module")
def student(student_path: Path) -> LoadedNetworks:
    return load_networks(student_path, torch.device("cpu"))
