"""What is done to a whole network: weights frozen or averaged, activations recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters are constants: gradient reaches its inputs but not its parameters."""
    switched = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in switched:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


def exponential_decay(decay: float, num_updates: int) -> float:
    """The decay of an exponential moving average, lower for the first updates, so that the start is soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def power_decay(power: float, num_updates: int) -> float:
    """The decay that gives update k (1, 2, ...) about the weight k^power, and the start none, so that the average covers a fixed share of
    any training (EDM2, arXiv 2312.02696, section 3.1: beta_gamma(t) = (1 - 1/t)^(gamma + 1))."""
    return (num_updates / (num_updates + 1)) ** (power + 1)


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * live, for every weight."""
    for averaged, current in zip(average.parameters(), live.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def recomputed(module: nn.Module, *inputs: Any) -> Tensor:
    """module(*inputs), with activations recomputed in the backward pass instead of kept (activation checkpointing, Chen et al., arXiv
    1604.06174); inputs must not change until then. A module that is frozen now is frozen in the second pass too."""
    is_frozen = not any(parameter.requires_grad for parameter in module.parameters())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen(module) if is_frozen else nullcontext()

    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
