"""What is done to a whole network: its weights held constant or averaged over training, its activations recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


def exponential_decay(decay: float, num_updates: int) -> float:
    """The decay of an exponential moving average; lower after few updates, so that the start is forgotten soon."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def power_decay(power: float, num_updates: int) -> float:
    """The decay with which update k (1, 2, ...) weighs about k^power in the average: it reaches back over a fixed share of the training,
    however long that is (EDM2, arXiv 2312.02696, section 3.1: beta_gamma(t) = (1 - 1/t)^(gamma + 1)). The start weighs nothing."""
    return (num_updates / (num_updates + 1)) ** (power + 1)


@torch.no_grad()
def update_average(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move averaged weights toward the live ones, of which they keep a share of 1 - decay."""
    for averaged, current in zip(average.parameters(), live.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def recomputed(module: nn.Module, *inputs: Any) -> Tensor:
    """module(*inputs), whose activations are computed again in the backward pass instead of being kept (activation checkpointing, Chen et
    al., arXiv 1604.06174); inputs must stay as they are until then. A module that is frozen now is frozen in that second pass too."""
    is_frozen = not any(parameter.requires_grad for parameter in module.parameters())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen(module) if is_frozen else nullcontext()

    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
