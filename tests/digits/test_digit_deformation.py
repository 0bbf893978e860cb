"""Random linear maps of digits: how they are spread, and what they do to ink."""

import torch

from digits.deformation import MAX_VARIATION, deform, draw_deformations
from digits.mnist import unit_ink
from moving_mnist import DatasetConfig, MovingMNISTGenerator


def test_the_same_digit_looks_different_in_every_video():
    maps = draw_deformations(0, range(500), 2, 0.15)
    assert maps.shape == (500, 2, 2, 2) and len(maps.flatten(1).unique(dim=0)) == 500
    entries = (maps - torch.eye(2)).flatten()
    assert entries.abs().max() <= 0.15 and entries.abs().max() > 0.149
    assert entries.mean().abs() < 3 * 0.15 / (3 * len(entries)) ** 0.5  # three standard errors of a uniform number's mean
    torch.testing.assert_close(entries.std(), torch.tensor(0.15 / 3**0.5), rtol=0.03, atol=0)
    assert torch.linalg.det(draw_deformations(1, range(500), 2, MAX_VARIATION)).min() > 0  # never inside out


def test_a_deformation_turns_stretches_and_keeps_ink():
    generator = MovingMNISTGenerator(DatasetConfig())
    images = unit_ink(generator.digit_set.images[:40])[:, None]  # (B, 1, 28, 28)

    def deformed(*entries: float, size: int = 28) -> torch.Tensor:
        return deform(images, torch.tensor(entries, dtype=torch.float32).view(1, 1, 2, 2).expand(40, -1, -1, -1), size)

    torch.testing.assert_close(deformed(1, 0, 0, 1), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(deformed(1, 0, 0, 1, size=14)[:, 0], generator.sprites[:40], rtol=0, atol=1e-5)
    torch.testing.assert_close(deformed(0, -1, 1, 0), images.rot90(1, dims=(-2, -1)), rtol=0, atol=1e-5)  # right from below
    ink, narrow = (sprites.sum(dim=(1, 2, 3)) for sprites in (images, deformed(1.25, 0, 0, 1)))
    torch.testing.assert_close(narrow, ink / 1.25, rtol=0.06, atol=0)
    torch.testing.assert_close(deformed(1, 0.2, 0, 1).sum(dim=(1, 3)), images.sum(dim=(1, 3)), rtol=0.06, atol=0.4)  # row by row
