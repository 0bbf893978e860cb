"""Activation checkpointing: activations of a part of a network are made again in the backward pass instead of being kept
(Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from network.weights import frozen


def recomputed(module: nn.Module, *inputs: Any) -> Tensor:
    """module(*inputs), whose activations are made again in the backward pass; inputs must stay as they are until then.

    A module that is frozen now is frozen in that second pass too, whatever has been switched on since: both must keep the same.
    """
    is_frozen = not any(parameter.requires_grad for parameter in module.parameters())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen(module) if is_frozen else nullcontext()

    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
