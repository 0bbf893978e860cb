"""Networks too large for one GPU: the transformer blocks of each split over the processes (FSDP2, Zhao et al., arXiv 2304.11277).

Each block is a unit of `torch.distributed.fsdp.fully_shard`: gathered before it runs and freed after, its gradients averaged over the
processes by the backward pass. All else stays whole, including each block's `modulation`, which the network reads without running the
block; `distributed` averages these gradients. Checkpoints hold whole tensors. All processes must run a sharded network, sample it and save
it at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiny_causal_wan import TinyCausalWanModel


def shard_blocks(networks: Iterable[TinyCausalWanModel], num_processes: int, device: torch.device) -> None:
    """Split the blocks of each network over all processes, which must have joined. Call it after every copy of a network and before its
    optimizer is built from the new parameters. Raises ValueError in a single process."""
    if num_processes == 1:
        raise ValueError("training.sharding is fsdp2 in a single process: start several with torchrun --nproc_per_node=N, or choose none")
    from torch.distributed.device_mesh import init_device_mesh  # here: loading them takes a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # prompt keys and values: nothing writes into them
    mesh = init_device_mesh(device.type, (num_processes,))
    for network in networks:
        for block in network.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params={block.modulation})
            register_fsdp_forward_method(block, "prompt_keys_values")
            block.set_force_sum_reduction_for_comms(device.type == "cpu")  # gloo does not average: it sums, FSDP divides


def is_sharded(value: Any) -> bool:
    """Is it a tensor of which every process holds a part? Never before `shard_blocks` has loaded that kind of tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Any) -> Any:
    """The value with every sharded tensor gathered, through dicts and lists; all processes must call it at once."""
    if is_sharded(value):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


def placed_like(value: Tensor, own: Tensor) -> Tensor:
    """The own part of a whole tensor where `own` is sharded, else the tensor itself."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)  # none sends: each has the whole


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer from whole tensors, whether or not its parameters are sharded. Settings other than the rate stay its own."""
    settings = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[name] = placed_like(value, parameter)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> float:
    """Clip to this norm over all parameters, sharded ones wholly counted; returns the norm before."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    others = [parameter for parameter in parameters if not is_sharded(parameter)]
    norms = [whole(nn.utils.get_total_norm([parameter.grad for parameter in group])) for group in (sharded, others) if group]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in (sharded, others):
        nn.utils.clip_grads_with_norm_(group, clip_norm, norm)
    return norm.item()
