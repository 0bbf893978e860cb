"""Random streams: everything random in the project draws from the stream of a (seed, index, purpose).

No two streams overlap: seed and index, each 0 to 2**64 - 1, are the key of a counter-based generator (Philox, Salmon et al. 2011), the
purpose is the upper word of its counter. torch's CPU generator keeps only 32 bits of a seed, so `torch_generator` fills its whole state.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch

MAX_SEED = 2**64 - 1
_STATE_BYTES, _WORDS, _FIRST_WORD = 5056, 624, 24  # of the state of torch's CPU generator: its size, and its Mersenne twister's words


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the streams: never change or reuse one."""

    TRAINING_VIDEO = 0  # what a training video shows: digit, motion, caption
    DEFORMATION = 1  # how its digits are deformed
    HELD_OUT_VIDEO = 2  # the same for digits that no network sees
    JUDGE_VIDEO = 3  # and for those that the judges learn from
    NOISE = 4  # the noise that one generated video starts from and meets; the seed is that video's own
    WEIGHTS = 5  # initial weights, and whatever libraries draw from the global generators
    TRAINING = 6  # a run: exit steps, times, noise, dropped prompts
    RUN_SAMPLE = 7  # the prompts and real videos that a run shows, and their noise
    RUN_SAMPLE_NOISE = 8
    RUN_FIGURES = 9  # the prompts that a run is scored on at its end, and their noise
    RUN_FIGURES_NOISE = 10
    FIXED_PROMPTS = 11  # the noise behind the fixed prompts of the health panel
    EVALUATION = 12  # held-out prompts and real videos of evaluate.py, and their noise
    EVALUATION_NOISE = 13
    REFERENCE = 14  # real videos that distributions are compared with
    IMITATION = 15  # real videos of training digits: what perfect imitation would look like
    LONG_VIDEO = 16  # held-out prompts and real videos of long_video.py
    EXAMINATION = 17  # real held-out videos and frames that a judge is examined on
    JUDGE_TRAINING = 18  # what a judge's training draws beside its videos
    BOOTSTRAP = 19  # resampled videos behind an interval
    FAULT = 20  # real video made worse on purpose
    SELF_TEST = 21
    OWN_SHAPES = 22  # the clips of experiments.shapes


def stream(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """The stream of (seed, index) for this purpose. Raises ValueError for a seed or an index outside 0 to 2**64 - 1."""
    for name, number in (("seed", seed), ("index", index)):
        if not 0 <= number <= MAX_SEED:
            raise ValueError(f"{name} is {number}: expected 0 to 2**64 - 1")
    key, counter = np.array([seed, index], dtype=np.uint64), np.array([0, 0, 0, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def video_seeds(seed: int, indices: Iterable[int], purpose: Purpose) -> list[int]:
    """A seed, 0 to 2**63 - 1, for each of the generated videos (seed, index)."""
    return [int(stream(seed, index, purpose).integers(2**63)) for index in indices]


def torch_generator(seed: int, purpose: Purpose, index: int = 0) -> torch.Generator:
    """A CPU generator of torch whose whole state comes from the stream of (seed, index)."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    if state.numel() != _STATE_BYTES:
        raise RuntimeError(f"a generator of torch {torch.__version__} holds {state.numel()} bytes, expected {_STATE_BYTES}: adapt seeds.py")
    words = stream(seed, index, purpose).integers(2**32, size=_WORDS, dtype=np.uint64)
    state[_FIRST_WORD: _FIRST_WORD + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8))
    generator.set_state(state)
    return generator


def seed_global_generators(seed: int, purpose: Purpose = Purpose.WEIGHTS) -> None:
    """Seed the global generators of torch (all devices), numpy and Python, from which initial weights are drawn."""
    torch.set_rng_state(torch_generator(seed, purpose).get_state())
    rest = stream(seed, 1, purpose)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(int(rest.integers(2**63)))
    np.random.seed(rest.integers(2**32, size=_WORDS, dtype=np.uint32))
    random.seed(int(rest.integers(2**63)))
