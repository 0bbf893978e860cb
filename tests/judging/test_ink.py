"""Sharpness falls with blur alone: not with fainter ink, thicker strokes, or the haze that networks leave behind."""

import pytest
import torch
from torch.nn import functional

from judging.corruptions import corrupt
from judging.ink import HAZE, display_intensity, intensity_sharpness
from moving_mnist import DatasetConfig, MovingMNISTGenerator


def edge_sharpness(video: torch.Tensor) -> torch.Tensor:
    return intensity_sharpness(display_intensity(video))


@pytest.fixture(scope="module")
def video():
    return MovingMNISTGenerator(DatasetConfig(), "test").sample(seed=1, indices=range(40), num_frames=3).video


def test_a_hard_edge_has_sharpness_one_and_a_ramp_that_of_its_step():
    square = torch.zeros(1, 12, 12)
    square[:, 4:8, 4:8] = 0.6
    torch.testing.assert_close(intensity_sharpness(square), torch.ones(1))
    stripe = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]).expand(1, 9, 9)
    ends = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]).repeat(2)  # where it meets the upper and the lower border
    expected = (72 * 0.25**2 + ends.square().sum()) / (72 * 0.25 + ends.sum())
    torch.testing.assert_close(intensity_sharpness(stripe), expected.view(1))
    assert intensity_sharpness(torch.zeros(2, 5, 5)).tolist() == [0, 0]
    assert intensity_sharpness((torch.arange(6) == 0).float().expand(1, 6, 6)).tolist() == [1]  # the border is an edge too


def test_blur_lowers_it_and_little_else_does(video):
    real = edge_sharpness(video).mean()
    haze = HAZE / 4 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    thick = functional.max_pool2d(video.flatten(0, 1), 3, stride=1, padding=1).view_as(video)
    assert edge_sharpness(corrupt(video, "softened")).mean() < 0.7 * real
    assert edge_sharpness(corrupt(video, "blurred")).mean() < 0.5 * real
    for same in (corrupt(video, "faint"), thick, video + haze):
        assert edge_sharpness(same).mean() == pytest.approx(real.item(), rel=0.05)
