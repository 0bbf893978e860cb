"""Muon for the matrices of the transformer blocks, AdamW for everything else."""

from __future__ import annotations

import torch
from torch import nn

from method.settings import SelfForcingConfig

MUON_RATE = 5.0  # AdamW with betas[0] = 0 moves a weight by about lr an update, Muon by 0.2 of its rate: so one lr serves both


def split_matrices(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the linear layers in transformer blocks, and all other parameters that are trained."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    is_matrix = {name: p.ndim == 2 and name.endswith(".weight") and "blocks." in name for name, p in trained.items()}
    return [p for name, p in trained.items() if is_matrix[name]], [p for name, p in trained.items() if not is_matrix[name]]


def build_muon(matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> torch.optim.Muon:
    """Muon (Jordan et al. 2024; https://kellerjordan.github.io/posts/muon). An update has a root mean square of 0.2 lr per weight, that
    of AdamW with momentum ("match_rms_adamw", arXiv 2502.16982)."""
    return torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def self_forcing_optimizers(name: str, network: nn.Module, config: SelfForcingConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of "generator" or "critic", by name: AdamW, and NAME_muon for the matrices if `config.optimizer` asks for it."""
    lr, momentum = (config.lr, config.muon_momentum) if name == "generator" else (config.critic_lr, config.critic_muon_momentum)
    adamw = {"lr": lr, "betas": tuple(config.adam_betas), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return {name: torch.optim.AdamW(network.parameters(), **adamw)}
    matrices, others = split_matrices(network)
    weight_decay = config.weight_decay / MUON_RATE  # the decay of an update is rate times weight_decay
    return {name: torch.optim.AdamW(others, **adamw), f"{name}_muon": build_muon(matrices, MUON_RATE * lr, weight_decay, momentum)}
