"""Ink: its amount, its centre, and its sharpness, which falls with blur and not with fainter ink, thicker strokes or haze."""

import pytest
import torch
from torch.nn import functional

from judging.corruptions import corrupt
from judging.ink import HAZE, display_intensity, intensity_centres, intensity_sharpness


def frame_with(pixels: dict[tuple[int, int], float], background: float = -1.0) -> torch.Tensor:
    """A frame (1, 32, 32) with values at (row, column)."""
    frame = torch.full((1, 32, 32), background)
    for (row, column), value in pixels.items():
        frame[0, row, column] = value
    return frame


def edge_sharpness(video: torch.Tensor) -> float:
    return intensity_sharpness(display_intensity(video)).mean().item()


@pytest.mark.parametrize(("pixels", "background", "centre"), [
    ({(4, 10): 1.0, (4, 20): 0.0}, -1.0, (40 / 3, 4)),  # x, then y; intensities 1 and 1/2
    ({(4, 10): 1.0}, -0.9, (10, 4)), ({(4, 10): 1.0, (25, 3): -3.0}, -0.9, (10, 4)),  # neither haze nor what is below the range pulls it
    ({}, -1.0, (15.5, 15.5)),
])
def test_the_centre_is_that_of_the_ink(pixels, background, centre):
    torch.testing.assert_close(intensity_centres(display_intensity(frame_with(pixels, background))), torch.tensor(centre).float())


def test_intensity_is_clamped_and_averaged_over_the_channels():
    frame = frame_with({(4, 10): 5.0, (9, 9): 0.0})
    assert display_intensity(frame).sum() == display_intensity(frame.repeat(3, 1, 1)).sum() == 1.5
    assert display_intensity(frame_with({})).sum() == 0


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


def test_blur_lowers_sharpness_and_little_else_does(batch):
    video = batch.video[:40, :3]
    real = edge_sharpness(video)
    haze = HAZE / 4 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    thick = functional.max_pool2d(video.flatten(0, 1), 3, stride=1, padding=1).view_as(video)
    assert edge_sharpness(corrupt(video, "softened")) < 0.7 * real and edge_sharpness(corrupt(video, "blurred")) < 0.5 * real
    for same in (corrupt(video, "faint"), thick, video + haze):
        assert edge_sharpness(same) == pytest.approx(real, rel=0.05)
