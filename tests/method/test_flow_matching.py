"""The path's algebra against itself, time shift and sampling against closed forms, samplers against a Gaussian's flow."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from method.flow_matching import (
    VELOCITY_TIME_FLOOR,
    add_noise,
    ancestral_sampler,
    classifier_free_guidance,
    eps_from_velocity,
    euler_sampler,
    expand_time,
    fresh_share,
    interval_weight,
    projected_guidance,
    sample_time,
    sampling_times,
    shift_time,
    unshift_time,
    velocity_from_x_0,
    x_0_from_velocity,
)

SHIFTS = (0.5, 1.0, 3.0, 8.0)


@pytest.fixture
def path() -> tuple[Tensor, Tensor, Tensor]:
    """x_0, eps (4, 6, 1, 3, 5) and t (4, 6) in float64."""
    random = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 6, 1, 3, 5, generator=random, dtype=torch.float64)
    return x_0, eps, torch.rand(4, 6, generator=random, dtype=torch.float64)


def test_round_trips_of_the_path_are_exact(path):
    x_0, eps, t = path
    x_t, v = add_noise(x_0, eps, t), eps - x_0
    torch.testing.assert_close(x_0_from_velocity(x_t, v, t), x_0, rtol=0, atol=1e-14)
    torch.testing.assert_close(eps_from_velocity(x_t, v, t), eps, rtol=0, atol=1e-14)


def test_time_zero_is_data_and_time_one_is_noise_and_each_frame_has_its_own(path):
    x_0, eps, t = path
    torch.testing.assert_close(add_noise(x_0, eps, t)[3, 5], (1 - t[3, 5]) * x_0[3, 5] + t[3, 5] * eps[3, 5], rtol=0, atol=0)
    torch.testing.assert_close(add_noise(x_0, eps, torch.zeros_like(t)), x_0, rtol=0, atol=0)
    torch.testing.assert_close(add_noise(x_0, eps, torch.ones_like(t)), eps, rtol=0, atol=0)


def test_velocity_is_the_derivative_of_the_path(path):
    x_0, eps, t = path
    _, derivative = torch.func.jvp(lambda time: add_noise(x_0, eps, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(derivative, eps - x_0)


def test_velocity_from_x_0_inverts_above_the_floor_and_is_bounded_below(path):
    x_0, eps, t = path
    t = t.clamp(min=VELOCITY_TIME_FLOOR)
    t[0, 0] = VELOCITY_TIME_FLOOR
    torch.testing.assert_close(velocity_from_x_0(add_noise(x_0, eps, t), x_0, t), eps - x_0, rtol=0, atol=1e-12)
    wrong_x_0, x_t = x_0 + 1, x_0  # an error of 1 at times where 1 / t is unbounded
    for time in (0.0, 1e-9, VELOCITY_TIME_FLOOR / 2, VELOCITY_TIME_FLOOR):
        v = velocity_from_x_0(x_t, wrong_x_0, torch.full_like(t, time))
        torch.testing.assert_close(v, torch.full_like(v, -1 / VELOCITY_TIME_FLOOR))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (6, 4), (1, 6), (4, 6, 1)])
def test_a_time_of_the_wrong_shape_is_refused(path, shape):
    x_0, eps, _ = path
    for function in (add_noise, x_0_from_velocity, eps_from_velocity, velocity_from_x_0):
        with pytest.raises(ValueError, match=r"expected one time per frame, \(4, 6\)"):
            function(x_0, eps, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_keeps_the_ends_rises_and_has_its_inverse(shift):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert (shift - 1) * (shifted - t)[500] >= 0  # toward noise for s > 1, toward data for s < 1
    torch.testing.assert_close(unshift_time(shifted, shift), t, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", SHIFTS)
def test_many_sampling_times_are_distinct_and_end_at_the_floor(shift):
    for num_steps in (2, 50, 51, 57, 58, 59, 100, 1000):
        times = sampling_times(num_steps, shift)
        assert len(times) == num_steps + 1 and times[0] == 1 and times[-1] == 0
        assert (times.diff() < 0).all() and times[-2] >= VELOCITY_TIME_FLOOR
        plain = shift_time(torch.linspace(1, 0, num_steps + 1), shift)
        if plain[-2] >= VELOCITY_TIME_FLOOR:
            assert torch.equal(times, plain)
        else:
            assert times[-2].item() == pytest.approx(VELOCITY_TIME_FLOOR, abs=1e-6)
            steps = unshift_time(times[:-1].double(), shift).diff()
            torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="num_steps is 0"):
        sampling_times(0, shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_training_times_follow_the_shifted_uniform(shift):
    t = sample_time((400, 500), shift, torch.Generator().manual_seed(3)).double()
    assert t.shape == (400, 500) and t.min() >= 0 and t.max() <= 1 and t[0].unique().numel() > 400
    mean = 0.5 if shift == 1 else shift / (shift - 1) - shift * math.log(shift) / (shift - 1) ** 2
    assert abs(t.mean().item() - mean) < 0.004  # six standard errors
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        cumulative = level / (shift - (shift - 1) * level)
        assert abs((t <= level).double().mean().item() - cumulative) < 0.007


def test_guidance_weight_one_is_cond_and_zero_is_uncond(path):
    cond, uncond, _ = path
    torch.testing.assert_close(classifier_free_guidance(cond, uncond, 1.0), cond)
    torch.testing.assert_close(classifier_free_guidance(cond, uncond, 0.0), uncond, rtol=0, atol=0)
    torch.testing.assert_close(classifier_free_guidance(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_guidance_in_an_interval_is_none_outside():
    t = torch.tensor([[0.1, 0.3, 0.5], [0.7, 0.9, 1.0]])
    assert interval_weight(t, 2.5, [0.3, 0.7]).tolist() == [[1.0, 2.5, 2.5], [2.5, 1.0, 1.0]]
    assert interval_weight(t, 2.5, [0.0, 1.0]).eq(2.5).all()


def test_projected_guidance_keeps_a_share_of_what_it_adds_along_a_direction():
    cond, uncond, direction = torch.randn(3, 2, 4, 1, 5, 5, dtype=torch.float64).unbind()
    dot = lambda a, b: (a * b).sum((1, 2, 3, 4), keepdim=True)  # noqa: E731  of each video
    whole = classifier_free_guidance(cond, uncond, 3.0)
    along = dot(whole - cond, direction) / dot(direction, direction) * direction
    for kept in (0.0, 0.4, 1.0):
        torch.testing.assert_close(projected_guidance(cond, uncond, 3.0, direction, kept), whole - (1 - kept) * along)
    torch.testing.assert_close(projected_guidance(cond, uncond, 1.0, direction, 0.0), cond)
    torch.testing.assert_close(projected_guidance(cond, uncond, 3.0, 0 * direction, 0.0), whole)  # no direction: nothing to take away


def test_euler_is_exact_for_a_constant_velocity(path):
    x_0, eps, _ = path
    seen = []
    sample = euler_sampler(lambda x, t: seen.append(t) or eps - x_0, eps, sampling_times(5, 3.0))
    torch.testing.assert_close(sample, x_0, rtol=0, atol=1e-6)
    assert all(t.shape == eps.shape[:2] and t.dtype == eps.dtype for t in seen)
    torch.testing.assert_close(torch.stack([t[0, 0] for t in seen]).float(), sampling_times(5, 3.0)[:-1])


def gaussian_velocity(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[eps - x_0 | x_t = x] for x_0 ~ N(mean, std^2)."""
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, x)
        variance, covariance = (1 - t) ** 2 * std**2 + t**2, t - (1 - t) * std**2
        return -mean + covariance / variance * (x - (1 - t) * mean)
    return velocity


def test_euler_converges_at_first_order_to_the_flow_of_a_gaussian(path):
    _, eps, _ = path
    errors = []
    for num_steps in (128, 256, 512):
        times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        errors.append((euler_sampler(gaussian_velocity(0.7, 0.3), eps, times) - (0.7 + 0.3 * eps)).abs().max().item())
    assert errors[-1] < 0.01
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1


def test_ancestral_sampling_without_fresh_noise_is_euler(path):
    (_, eps, _), times, velocity = path, sampling_times(7, 3.0).double(), gaussian_velocity(0.7, 0.3)
    sample = ancestral_sampler(velocity, eps, times, 0.0, lambda: pytest.fail("no noise is due"))
    torch.testing.assert_close(sample, euler_sampler(velocity, eps, times))


def test_ancestral_sampling_keeps_the_spread_of_a_gaussian_and_fresh_noise_alone_would_not():
    mean, std, times = 0.7, 0.3, torch.linspace(1, 0, 201, dtype=torch.float64)
    generator, velocity = torch.Generator().manual_seed(0), gaussian_velocity(mean, std)

    def draw() -> Tensor:
        return torch.randn(4000, 1, 1, 1, 1, generator=generator, dtype=torch.float64)

    for eta in (0.5, 1.0):
        sample = ancestral_sampler(velocity, draw(), times, eta, draw)
        assert sample.mean().item() == pytest.approx(mean, abs=0.02) and sample.std().item() == pytest.approx(std, rel=0.05)
    noise = draw()
    change = (ancestral_sampler(velocity, noise, times, 1.0, draw) - (mean + std * noise)).std()
    assert change.item() == pytest.approx(2**0.5 * std, rel=0.1)  # at eta = 1 the result has forgotten its first noise
    share = fresh_share(torch.tensor(0.8), torch.tensor(0.6), 1.0).item()
    posterior = (0.6 / 0.8) ** 2 * (0.8**2 - (0.2 / 0.4) ** 2 * 0.6**2)  # variance of x_0.6 given x_0.8 and x_0
    assert 0.6 * share == pytest.approx(posterior**0.5)


def test_many_steps_end_at_x_0_through_the_bounded_velocity(path):
    """However fine the steps, a network that predicts x_0 is followed to it, though its velocity is bounded near t = 0."""
    x_0, eps, _ = path
    for num_steps in (4, 50, 400):
        sample = euler_sampler(lambda x, t: velocity_from_x_0(x, x_0, t), eps, sampling_times(num_steps, 3.0))
        torch.testing.assert_close(sample, x_0, rtol=0, atol=1e-6)
