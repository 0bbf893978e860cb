"""Frechet distance, density and coverage: against closed forms, another library's matrix root, and faults that they must see."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from judging.distribution import compare_distributions, coverage, density, frechet_distance, real_neighbourhoods


def normal(num: int, width: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(num, width, generator=rng, dtype=torch.float64)


def test_frechet_distance_equals_the_formula_with_a_matrix_root():
    x = normal(300, 6) @ normal(6, 6, seed=1) + 0.3
    y = normal(200, 6, seed=2) @ normal(6, 6, seed=3)
    s, s_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    gap = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item()
    expected = gap + np.trace(s + s_y - 2 * sqrtm(s @ s_y).real)
    assert frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x).item() == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x).item() == pytest.approx(0, abs=1e-9)
    assert 0 < frechet_distance(normal(8, 20), normal(9, 20, seed=1)).item() < 100  # fewer videos than features


def test_weighted_distance_is_that_of_the_repeated_videos():
    x, y = normal(20, 3), normal(30, 3, seed=1)
    counts = torch.ones(2, 20, dtype=torch.float64)
    counts[0, :10], counts[0, 10:] = 2, 0
    expected = torch.cat((frechet_distance(x[:10].repeat(2, 1), y), frechet_distance(x, y)))
    torch.testing.assert_close(frechet_distance(x, y, counts), expected)


def test_neighbourhoods_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)  # distances to the second nearest other: 3, 2, 3, 6
    made = torch.tensor([[-2.5], [0.9], [30.0]], dtype=torch.float64)
    inside = real_neighbourhoods(made, real, k=2)
    assert inside.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert density(inside, k=2).item() == pytest.approx(4 / (2 * 3))
    assert coverage(inside).item() == pytest.approx(3 / 4)


def test_density_and_coverage_of_the_same_distribution_are_near_their_expectations():
    inside = real_neighbourhoods(normal(500, 8), normal(500, 8, seed=1))
    assert density(inside).item() == pytest.approx(1, abs=0.12)
    assert coverage(inside).item() == pytest.approx(1 - 0.5**5, abs=0.04)  # Naeem et al., lemma 2: about 1 - 2^-k for N = M


def test_intervals_hold_the_figure_and_narrow_with_more_videos():
    real = normal(300, 4)
    many, few = compare_distributions(normal(300, 4, 1, 0.5), real), compare_distributions(normal(30, 4, 1, 0.5), real)
    for name in ("frechet_distance", "density", "coverage"):
        (low, high), (few_low, few_high) = many[f"{name}_ci"], few[f"{name}_ci"]
        assert low <= many[name] <= high and low < high, name
        if name != "coverage":  # few videos cover little, whichever they are
            assert high - low < 0.7 * (few_high - few_low), name
    assert compare_distributions(normal(300, 4, 1, 0.5), real) == many
    low, high = many["frechet_distance_ci"]
    assert low < 4 * 0.5**2 < high  # the truth


def test_the_interval_of_coverage_ends_at_one():
    real = normal(60, 2)
    found = compare_distributions(real + 0.01 * normal(60, 2, seed=1), real)
    low, high = found["coverage_ci"]
    assert found["coverage"] > 0.98 and high <= 1 and low < found["coverage"]
