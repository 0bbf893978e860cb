"""Why a few-step causal student regresses on a causal teacher's trajectories: `python -m experiments.injectivity`.

A video of two blocks of one pixel each, x ~ N(0, C) with C = [[1, rho], [rho, 1]], whose score is known exactly. A teacher's ODE carries
noise (e_1, e_2) to a video. A causal student makes block 1 from e_1 alone, so it can hit its target only if that is a function of e_1.

Of a bidirectional teacher it is not: the ODE's map is x = C^(1/2) e, so x_1 = a e_1 + b e_2. The best student predicts a e_1, the mean over
the noise that it cannot see; a^2 + b^2 = 1, so the share b^2 of the variance is lost, whatever its size and its training. A causal teacher
solves block 1 alone, x_1 = e_1, and then block 2 given x_1: both are functions of what the student sees, and nothing is lost.
"""

from __future__ import annotations

import numpy as np

from machine.seeds import Purpose, stream

NUM_STEPS, NUM_VIDEOS = 1000, 4096


def ode_end(noise: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Where the rectified-flow ODE of data N(mean, covariance) carries noise (B, D), by the midpoint method from t = 1 to 0."""

    def velocity(x: np.ndarray, t: float) -> np.ndarray:  # E[eps - x_0 | x_t = x], exactly
        identity = np.eye(len(covariance))
        gain = (t * identity - (1 - t) * covariance) @ np.linalg.inv((1 - t) ** 2 * covariance + t**2 * identity)
        return (x - (1 - t) * mean) @ gain.T - mean

    x, h = noise, 1 / NUM_STEPS
    for t in 1 - h * np.arange(NUM_STEPS):
        x = x - h * velocity(x - h / 2 * velocity(x, t), t - h / 2)
    return x


def unexplained(target: np.ndarray, seen: np.ndarray) -> float:
    """The share of the target's variance (B,) that the best student misses who sees (B, K): everything is Gaussian, so it is linear."""
    return float(np.var(target - seen @ np.linalg.lstsq(seen, target, rcond=None)[0]) / np.var(target))


def lost_by_block(rho: float, is_causal: bool, seed: int = 0) -> tuple[float, float]:
    """The share of variance that a causal student misses of block 1, seeing e_1, and of block 2, seeing x_1 and e_2."""
    e_1, e_2 = stream(seed, 0, Purpose.NOISE).standard_normal((2, NUM_VIDEOS, 1))
    if is_causal:
        x_1 = ode_end(e_1, np.zeros(1), np.eye(1))
        x_2 = ode_end(e_2, rho * x_1, np.array([[1 - rho**2]]))
    else:
        x_1, x_2 = np.split(ode_end(np.hstack([e_1, e_2]), np.zeros(2), np.array([[1, rho], [rho, 1]])), 2, axis=1)
    return unexplained(x_1[:, 0], e_1), unexplained(x_2[:, 0], np.hstack([x_1, e_2]))


def exactly_lost(rho: float) -> float:
    """b^2 of block 1 of the bidirectional teacher, b the off-diagonal entry of C^(1/2)."""
    return ((np.sqrt(1 + rho) - np.sqrt(1 - rho)) / 2) ** 2


def main() -> None:
    print("share of the variance that the best causal student misses, block 1 and block 2")
    for rho in (0.0, 0.5, 0.9, 0.99):
        both, causal = lost_by_block(rho, is_causal=False), lost_by_block(rho, is_causal=True)
        print(f"rho {rho:4.2f}: bidirectional teacher {both[0]:.3f} {both[1]:.3f} (exactly {exactly_lost(rho):.3f} and 0), "
              f"causal teacher {causal[0]:.3f} {causal[1]:.3f} (exactly 0 and 0)")


if __name__ == "__main__":
    main()
