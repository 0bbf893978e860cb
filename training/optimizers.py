"""Muon for the matrices of the transformer blocks, AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


def muon_and_adamw(
    parameters: Iterable[nn.Parameter], blocks: nn.Module, muon_lr: float, lr: float, weight_decay: float, momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.999),
) -> dict[str, torch.optim.Optimizer]:
    """The two optimizers of a network, by name: each trainable parameter has exactly one.

    Muon (Jordan 2024; its updates scaled to those of AdamW as in Liu et al., arXiv 2502.16982, section 2.2) moves all directions of a
    matrix alike, so that no direction of a noisy gradient runs ahead of the others. blocks: whose linear layers' weights Muon gets, at
    the rate muon_lr; with 0 there is none and AdamW gets these too.
    """
    matrices = [p for name, p in blocks.named_parameters() if p.ndim == 2 and name.endswith(".weight")] if muon_lr > 0 else []
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in chosen]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(others, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    }
    if matrices:
        optimizers["muon"] = torch.optim.Muon(
            matrices, lr=muon_lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
    return optimizers
