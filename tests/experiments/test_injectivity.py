"""The toy of the few-step start: a bidirectional teacher costs a causal student exactly what it must, and a causal one nothing."""

import numpy as np
import pytest

from experiments.injectivity import exactly_lost, lost_by_block, ode_end


@pytest.mark.parametrize("rho", [0.3, 0.9, -0.6])
def test_the_odes_map_is_the_square_root_of_the_covariance(rho):
    covariance = np.array([[1, rho], [rho, 1]])
    values, vectors = np.linalg.eigh(covariance)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    noise = np.random.default_rng(1).standard_normal((50, 2))
    np.testing.assert_allclose(ode_end(noise, np.array([2.0, -1.0]), covariance), noise @ root + [2.0, -1.0], atol=2e-3)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_bidirectional_teacher_costs_block_1_what_it_must_and_a_causal_one_nothing(rho):
    first, second = lost_by_block(rho, is_causal=False)
    assert first == pytest.approx(exactly_lost(rho), abs=0.02) and second < 1e-9
    assert max(lost_by_block(rho, is_causal=True)) < 1e-9
