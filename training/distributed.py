"""Several processes as one: who they are, how they average gradients and agree, and who may write and speak.

`torchrun --nproc_per_node=N train.py` starts N processes, which form a group: gloo for the CPU, nccl for gradients on GPUs. Each takes its
part of every batch (`machine/batch_random.py`). Gradients are averaged by an explicit all-reduce after the last backward pass and before
clipping: DistributedDataParallel hooks into a network's `forward`, and this project calls other methods, several in one step. All processes
must see one file system: the first writes, all read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from machine.batch_random import BatchRandom
from training.sharding import clip_gradients, is_sharded

Answer = TypeVar("Answer")
PEER_TIMEOUT = timedelta(hours=2)  # the others wait while the first process samples and saves; one that ends is noticed at once
STORE_TIMEOUT = timedelta(minutes=5)  # for all processes to be there


class ProcessLost(ConnectionError):
    """Another process of this run has ended or no longer answers."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. rank: 0..count - 1; local_rank: among those of its machine. store: a table that all share."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Make the group that the methods below need. Raises ProcessLost if the others do not join."""
        if self.count > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with losses_named(is_message=True):
                dist.init_process_group(
                    backend, store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=self.count, timeout=PEER_TIMEOUT,
                )

    def leave(self) -> None:
        """End the group, once every process is here."""
        if self.count > 1 and dist.is_initialized():
            self.gather(None)
            dist.destroy_process_group()

    def own_device(self, device: torch.device) -> torch.device:
        """The GPU of this process if the device is cuda. Raises ValueError if the machine has fewer GPUs than processes."""
        if self.count == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {self.local_rank} of this machine has no GPU of its own: expected one each, found "
                             f"{torch.cuda.device_count()}; start fewer processes or set device=cpu")
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, the same in all of them bit for bit. Those of sharded parameters are
        skipped: FSDP has averaged them in the backward pass."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None and not is_sharded(parameter.grad)]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message
        with losses_named(is_message=True):
            dist.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def gather(self, value: Answer) -> list[Answer]:
        """The values of all processes, by rank; small objects that can be pickled."""
        if self.count == 1:
            return [value]
        answers: list[Any] = [None] * self.count
        with losses_named(is_message=True):
            dist.all_gather_object(answers, value)
        return answers

    def from_first(self, make: Callable[[], Answer]) -> Answer:
        """What make returns in the first process; the others do not call it."""
        return self.gather(make() if self.is_first else None)[0]

    def may_speak(self) -> bool:
        """True in the first process to ask, False in all others: one of them reports a failure that reaches all."""
        with suppress(RuntimeError):  # the process that keeps the table is gone: better told twice than not at all
            return self.store is None or self.store.add("spoken", 1) == 1
        return True


ONE_PROCESS = Processes()


@contextmanager
def losses_named(is_message: bool = False) -> Iterator[None]:
    """Within, torch's error for a peer that is gone, or silent for too long, becomes a ProcessLost. is_message: every RuntimeError is one;
    else those of FSDP's own messages are told apart from others."""
    try:
        yield
    except RuntimeError as error:
        if not (is_message or isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors name its source files
            raise
        reason = str(error).strip().partition("\n")[0][:160]
        raise ProcessLost(f"another process of this run has ended or no longer answers ({reason})") from error


def processes_of_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """The processes that torchrun started, by its environment variables; `ONE_PROCESS` without them. Raises ValueError for an incomplete
    environment, ProcessLost if the others cannot be reached."""
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return ONE_PROCESS
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set: start with torchrun")
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    keeps_store = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself keeps it
    store = _connect(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), count, keeps_store)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # a restarted group must not find the table of the one before
    return Processes(rank, count, int(environment["LOCAL_RANK"]), dist.PrefixStore(f"attempt {attempt}", store))


@cache  # one connection a process, also in a sweep
def _connect(host: str, port: int, count: int, keeps_store: bool) -> dist.Store:
    with losses_named(is_message=True):
        return dist.TCPStore(host, port, count, keeps_store, STORE_TIMEOUT, wait_for_workers=False)


class BatchParts:
    """The parts of every batch that fall to this process: one, or `accumulation_steps` micro-batches one after the other."""

    def __init__(self, processes: Processes, accumulation_steps: int):
        self.processes, self.accumulation_steps = processes, accumulation_steps

    def check_divides(self, key: str, batch_size: int) -> None:
        """Raise ValueError where a batch cannot be cut into equal parts."""
        num_parts = self.processes.count * self.accumulation_steps
        if batch_size % num_parts:
            below = batch_size // num_parts * num_parts
            nearest = " or ".join(str(size) for size in (below, below + num_parts) if size > 0)
            raise ValueError(f"{key} is {batch_size}, over all processes: expected a multiple of {num_parts} ({self.processes.count} "
                             f"processes times training.accumulation_steps={self.accumulation_steps}); nearest valid: {nearest}")

    def of(self, batch_size: int, random: BatchRandom) -> Iterator[slice]:
        """This process's parts of a batch in turn; `random` draws for the current one."""
        size = batch_size // (self.processes.count * self.accumulation_steps)
        first = self.processes.rank * self.accumulation_steps * size
        return random.parts([slice(first + i * size, first + (i + 1) * size) for i in range(self.accumulation_steps)], batch_size)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part, whose loss is a mean over equal parts."""
        (loss / self.accumulation_steps).backward()

    def clip(self, parameters: Iterable[nn.Parameter], clip_norm: float) -> float:
        """Average the gradients over the processes, then clip them to this norm over all of them; returns the norm before."""
        parameters = list(parameters)
        self.processes.average_gradients(parameters)
        return clip_gradients(parameters, clip_norm)


def mean_figures(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the parts that have it. One that is not finite in any part is not finite here."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: [part[name] for part in parts if name in part] for name in dict.fromkeys(chain(*parts))}
    return {name: sum(values) / len(values) for name, values in columns.items()}
