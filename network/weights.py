"""What is done to all weights of a network at once: held constant, averaged over training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters are constants: gradient passes through to its input and not into them."""
    switched = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in switched:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float, num_updates: int) -> None:
    """Exponential moving average of the weights; the first updates use a lower decay, so that the start is forgotten soon."""
    decay = min(decay, (1 + num_updates) / (10 + num_updates))
    for averaged, current in zip(average.parameters(), live.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)
