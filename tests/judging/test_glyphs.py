"""Glyphs see the style that the video judge's features forget: one digit a class is no variety, whatever moves exactly."""

import pytest
import torch
from torch import Tensor

from judging.glyphs import LEAST_GLYPHS, LEAST_STROKE, glyph_diversity, recentre, relative_spread
from judging.ink import intensity_centres
from moving_mnist import DatasetConfig, MovingMNISTGenerator

SIDE, NUM_VIDEOS, NUM_FRAMES = 16, 300, 5


def glyphs_of(split: str, rows: Tensor | None = None, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Glyphs (N, S, S) and digits (N,) of moving digits of the split; rows (N,) of its sprites, or those that the videos draw."""
    generator = MovingMNISTGenerator(DatasetConfig(), split)
    batch = generator.sample(0, range(NUM_VIDEOS), NUM_FRAMES)
    rows = batch.digit_index[:, 0] if rows is None else rows
    video = generator.render(generator.sprites[rows][:, None], batch.track)
    video = video + noise * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    intensity = ((video.clamp(-1, 1) + 1) / 2).mean(dim=2).flatten(0, 1)
    return recentre(intensity, SIDE).view(NUM_VIDEOS, NUM_FRAMES, SIDE, SIDE).mean(dim=1), generator.digit_set.labels[rows]


def rows_of_a_few(split: str, kept: int) -> Tensor:
    """A row for each video of the split: its class's first `kept` digits, one after the other."""
    generator = MovingMNISTGenerator(DatasetConfig(), split)
    labels = generator.digit_set.labels[generator.sample(0, range(NUM_VIDEOS), 1).digit_index[:, 0]]
    return torch.stack([(generator.digit_set.labels == label).nonzero()[number % kept, 0] for number, label in enumerate(labels)])


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    return glyphs_of("test")


def test_recentring_moves_the_centre_of_mass_to_the_middle_and_keeps_the_ink():
    batch = MovingMNISTGenerator(DatasetConfig()).sample(0, range(32), 4)
    intensity = ((batch.video + 1) / 2).mean(dim=2).flatten(0, 1)
    window = recentre(intensity, 2 * SIDE)
    off = (intensity_centres(window, LEAST_STROKE) - (2 * SIDE - 1) / 2).abs()  # pixels pass the threshold as they are interpolated
    assert off.mean() < 0.15 and off.max() < 0.5
    torch.testing.assert_close(window.sum((1, 2)), intensity.sum((1, 2)), rtol=1e-3, atol=1e-3)


def test_relative_spread_is_the_variance_over_the_squared_mean_and_a_factor_changes_nothing():
    glyphs = torch.rand(7, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = glyphs.flatten(1).var(dim=0).sum() / glyphs.mean(dim=0).square().sum()
    torch.testing.assert_close(relative_spread(glyphs)[0], expected)
    torch.testing.assert_close(relative_spread(3 * glyphs)[0], expected)
    twice = torch.tensor([[2.0, 0, 1, 1, 1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(relative_spread(glyphs, twice), relative_spread(glyphs[[0, 0, 2, 3, 4, 5, 6]]))


def test_one_digit_a_class_has_no_variety_a_few_have_some_and_noise_adds_little(real):
    one, noisy, three = (
        glyph_diversity(*glyphs_of("train", rows_of_a_few("train", kept), noise), *real)["glyph_diversity"]
        for kept, noise in ((1, 0.0), (1, 0.15), (3, 0.0))
    )
    assert one < 0.02 and noisy < 0.1 and 0.3 < three < 0.9


def test_classes_with_too_few_glyphs_are_left_out(real):
    glyphs, digits = real
    few = torch.cat([(digits == digit).nonzero()[: LEAST_GLYPHS - 1, 0] for digit in range(10)])
    assert glyph_diversity(glyphs[few], digits[few], *real) == {}
    more = torch.cat([few, (digits == 4).nonzero()[:, 0]])
    assert glyph_diversity(glyphs[more], digits[more], *real)["glyph_diversity"] > 0.5
