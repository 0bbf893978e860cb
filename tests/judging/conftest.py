"""The judge that ships, what it reads in real held-out videos, and how a command refuses."""

import sys
from collections.abc import Callable

import pytest

from judging.digit_judge import DigitJudge, VideoReadings, load_judge, read_videos
from moving_mnist import DatasetConfig, MovingMNISTBatch, MovingMNISTGenerator


@pytest.fixture(scope="session")
def judge() -> DigitJudge:
    return load_judge()


@pytest.fixture(scope="session")
def batch() -> MovingMNISTBatch:
    return MovingMNISTGenerator(DatasetConfig(), "test").sample(seed=8, indices=range(96), num_frames=21)


@pytest.fixture(scope="session")
def readings(judge: DigitJudge, batch: MovingMNISTBatch) -> VideoReadings:
    return read_videos(judge, batch.video)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line with which a command, main, refuses its arguments."""

    def run(main: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit, match="^error: ") as caught:
            main()
        assert "\n" not in caught.value.code
        return caught.value.code

    return run
