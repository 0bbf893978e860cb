"""Several processes as one: who they are, how they average gradients and agree, and who may write and speak.

`torchrun --nproc_per_node=N train.py` starts N processes, which this room makes a group: gloo for the CPU, nccl for gradients
on GPUs. Each takes its share of every batch (`machine/batch_random.py`). Gradients are averaged by an explicit all-reduce after the last
backward pass and before clipping: PyTorch's DistributedDataParallel hooks into a network's `forward`, and this project calls other
methods of its networks, several of them in one step. All processes must see one file system: the first writes, all read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
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
    """This process among those of a run. rank: 0..count - 1, that of its own machine local_rank. store: a small table that all share."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Make the group that `average_gradients`, `gather` and `from_first` need. Raises ProcessLost if the others do not come."""
        if self.count > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            _ask(lambda: dist.init_process_group(
                backend, store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=self.count, timeout=PEER_TIMEOUT,
            ))

    def leave(self) -> None:
        """End the group, once every process is here."""
        if self.count > 1 and dist.is_initialized():
            self.gather(None)
            dist.destroy_process_group()

    def own_device(self, device: torch.device) -> torch.device:
        """The GPU of this process where the device is cuda. Raises ValueError where a machine has fewer than processes."""
        if self.count == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {self.local_rank} of this machine has no GPU of its own: expected one each, found "
                             f"{torch.cuda.device_count()}; start fewer processes or set device=cpu")
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; the result is the same in all of them, bit for bit. Those of sharded
        parameters are left: FSDP has averaged them in the backward pass."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None and not is_sharded(parameter.grad)]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message
        _ask(lambda: dist.all_reduce(flat))
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def gather(self, value: Answer) -> list[Answer]:
        """What every process hands in, by rank; a small object that can be pickled."""
        if self.count == 1:
            return [value]
        answers: list[Any] = [None] * self.count
        _ask(lambda: dist.all_gather_object(answers, value))
        return answers

    def from_first(self, make: Callable[[], Answer]) -> Answer:
        """What make returns in the first process, in all of them; only that one calls it."""
        return self.gather(make() if self.is_first else None)[0]

    def may_speak(self) -> bool:
        """True in the first process to ask, False in all others: of a failure that reaches all, one tells."""
        if self.store is None:
            return True
        with suppress(RuntimeError):
            return self.store.add("spoken", 1) == 1
        return True  # the table is gone with the process that kept it, maybe killed: better told twice than not at all


ONE_PROCESS = Processes()


def _ask(question: Callable[[], Answer]) -> Answer:
    try:
        return question()
    except RuntimeError as error:  # torch's for a peer that is gone, or silent for too long
        raise _lost(error) from error


@contextmanager
def losses_named() -> Iterator[None]:
    """Within, a process lost in the middle of a message of FSDP's, which asks for itself, is a ProcessLost too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's are plain RuntimeErrors that name its source files
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> ProcessLost:
    reason = str(error).strip().partition("\n")[0][:160]
    return ProcessLost(f"another process of this run has ended or no longer answers ({reason})")


def processes_of_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """The processes that torchrun started, by its environment variables; a process of its own where there are none. Raises ValueError for
    an incomplete environment, ProcessLost where the others cannot be reached."""
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


@cache  # one connection a process, however often it is asked for
def _connect(host: str, port: int, count: int, keeps_store: bool) -> dist.Store:
    return _ask(lambda: dist.TCPStore(host, port, count, keeps_store, STORE_TIMEOUT, wait_for_workers=False))


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
        """This process's parts of a batch, one after the other; `random` draws for the part in work."""
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
    """The mean of each figure over the parts that have it. One that is not finite anywhere is not finite here."""
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}
