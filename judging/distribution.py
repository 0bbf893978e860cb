"""How near a set of videos is to the real ones as a distribution: Frechet distance, density and coverage, over features.

Dimensions: N generated and M real videos, E features of a video, R bootstrap resamples. Features are (N, E) or (M, E), float64, on the CPU.
A figure is a dict: under its name a number, and under NAME_ci its 95 % interval.

The Frechet distance is the one behind FID and FVD (Heusel et al. 2017, arXiv 1706.08500, eq. 6), here in the features of `video_judge`, so
its values are neither: read them between the floor (real against other real videos) and the ceiling (real against real with frames
shuffled) of the same run. It grows as sets shrink: compare equal numbers.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from machine.seeds import Purpose, torch_generator

NEIGHBOURS = 5  # k of density and coverage, as in the paper's experiments
LEAST_VIDEOS = NEIGHBOURS + 2  # for k other neighbours and a covariance
RESAMPLES = 200


def frechet_distance(features: Tensor, reference: Tensor, counts: Tensor | None = None) -> Tensor:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the Gaussians fitted to features (N, E) and reference (M, E): (R,) for counts (R, N),
    each row a resample that says how often a video counts; (1,) without.

    tr (S S')^(1/2) is the sum of the roots of the eigenvalues of S'^(1/2) S S'^(1/2), which is symmetric: no complex matrix root, and a
    singular covariance does no harm."""
    mean, covariance = _moments(features, counts)  # (R, E), (R, E, E)
    real_mean, real_covariance = (moment[0] for moment in _moments(reference))
    eigenvalues, vectors = torch.linalg.eigh(real_covariance)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T  # S'^(1/2)
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum(dim=-1)  # (R,)
    traces = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + real_covariance.trace()
    return ((mean - real_mean).square().sum(dim=-1) + traces - 2 * cross).clamp_min(0)


def _moments(features: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means (R, E) and unbiased covariances (R, E, E) of features (N, E) under counts (R, N)."""
    counts = torch.ones(1, len(features), dtype=features.dtype) if counts is None else counts
    total = counts.sum(dim=1, keepdim=True)  # (R, 1)
    mean = counts @ features / total
    second = torch.stack([(features * row.unsqueeze(1)).T @ features for row in counts])  # (R, E, E)
    covariance = (second - total.unsqueeze(2) * mean.unsqueeze(2) * mean.unsqueeze(1)) / (total.unsqueeze(2) - 1)
    return mean, covariance


def frechet_figure(name: str, features: Tensor, reference: Tensor, counts: Tensor) -> dict[str, float | list]:
    """Their Frechet distance, with its interval over the resamples."""
    return figure(name, frechet_distance(features, reference), frechet_distance(features, reference, counts))


def real_neighbourhoods(features: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Whether generated video i lies within the distance of real video j to its k-th nearest other real video: (N, M) bool."""
    radius = torch.cdist(reference, reference).kthvalue(k + 1, dim=1).values  # the nearest of all is the video itself
    return torch.cdist(features, reference) <= radius


def density(inside: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Mean over generated videos of the number of real neighbourhoods they lie in, over k (Naeem et al. 2020, eq. 4): about 1 for
    real videos, more for videos crowded where real ones are. inside: (N, M) of `real_neighbourhoods`."""
    return inside.double().sum(dim=1).mean() / k


def coverage(inside: Tensor) -> Tensor:
    """Share of real videos with a generated one in their neighbourhood (Naeem et al. 2020, arXiv 2002.09797, eq. 5): falls where
    modes are missing. inside: (N, M) of `real_neighbourhoods`."""
    return inside.any(dim=0).double().mean()


def compare_distributions(features: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float | list]:
    """frechet_distance, density and coverage of features (N, E) against reference (M, E), both of at least `LEAST_VIDEOS`, with bootstrap
    intervals over the N videos."""
    inside = real_neighbourhoods(features, reference)
    counts = resampled_counts(len(features), RESAMPLES, torch_generator(seed, Purpose.BOOTSTRAP))
    resampled_density = counts @ inside.double().sum(dim=1) / (NEIGHBOURS * len(features))
    resampled_coverage = ((counts > 0).double() @ inside.double() > 0).double().mean(dim=1)
    return {
        **frechet_figure("frechet_distance", features, reference, counts),
        **figure("density", density(inside), resampled_density),
        **figure("coverage", coverage(inside), resampled_coverage, most=1.0),
    }


def resampled_counts(num_videos: int, num_resamples: int, rng: torch.Generator) -> Tensor:
    """Bootstrap resamples of videos: how often each one is drawn, (num_resamples, num_videos), float64."""
    rows = torch.randint(num_videos, (num_resamples, num_videos), generator=rng)
    return torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))


def figure(name: str, value: Tensor, resampled: Tensor, most: float = inf) -> dict[str, float | list]:
    """The figure with the 95 % spread of its resamples (R,) about their own mean; no figure here can be negative, or above `most`. A
    resample repeats videos, which raises its Frechet distance and lowers its coverage whatever the videos are."""
    spread = (resampled - resampled.mean()).quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype))
    low, high = (value + spread).clamp(0, most).tolist()
    return {name: value.item(), f"{name}_ci": [min(low, value.item()), max(high, value.item())]}
