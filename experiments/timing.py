"""Where time and arithmetic go, measured from outside, inside the real code path: a gauge (a clock, a FLOP counter) is read before and
after the calls that `Phases` is told of. Compared samplers take turns, with the machine's limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from machine.runtime import Runtime

MATRIX_SIZES = (1024, 2048)  # the limit is that of the faster one
PRODUCT_FLOPS = 2 * 2048**3  # of a timed run of products
REST = "rest"  # what no phase covers

Gauge = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)


def clock(device: torch.device) -> Gauge:
    """Seconds at which all work given to the device so far is done."""

    def read() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def flop_counter() -> FlopCounterMode:
    """Counts matrix products, forwards and backwards, the CPU's fused attention too, which PyTorch's own table leaves out."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    })


@dataclass
class Phases:
    """What the calls named in `watch` took by `gauge`: (phase, begin, end) of each, in order. A call inside another watched one belongs to
    the outer one, so phases never overlap."""

    gauge: Gauge
    calls: list[tuple[str, float, float]] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    _is_inside: bool = False

    @contextmanager
    def watch(self, *places: tuple[Any, str, str | Callable[[], str]]) -> Iterator[None]:
        """Within, calls of each place (owner, name of its function, phase) are read; the gauge's whole is taken too. A phase may be a
        function that says, when the call ends, which one it was. Raises AttributeError for a name that the owner lacks."""
        with ExitStack() as stack:
            for owner, name, phase in places:
                patcher = patch.object(owner, name)
                original, _ = patcher.get_original()
                patcher.new = self._read_around(original, phase)
                stack.enter_context(patcher)
            self.begin = self.gauge()
            yield
            self.end = self.gauge()

    def _read_around(self, function: Callable[..., Any], phase: str | Callable[[], str]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, begin = True, self.gauge()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append((phase if isinstance(phase, str) else phase(), begin, self.gauge()))
                self._is_inside = False

        return wrapped

    @property
    def whole(self) -> float:
        return self.end - self.begin

    def totals(self) -> dict[str, float]:
        """By phase, in the order of their first calls, and `REST`: their sum is the whole."""
        sums: dict[str, float] = {}
        for phase, begin, end in self.calls:
            sums[phase] = sums.get(phase, 0.0) + end - begin
        return {**sums, REST: self.whole - sum(sums.values())}


def time_in_turns(contestants: Mapping[Key, Callable[[], object]], repeats: int, device: torch.device) -> dict[Key, float]:
    """Median seconds of each contestant; one warm-up of each, then all of them in turn, `repeats` times."""
    seconds: dict[Key, list[float]] = {name: [] for name in contestants}
    read = clock(device)
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):
        for name, contestant in contestants.items():
            start = read()
            contestant()
            if repeat > 0:
                seconds[name].append(read() - start)
            else:
                read()
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_products(runtime: Runtime) -> dict[int, Callable[[], object]]:
    """By matrix size, a run of square products of `PRODUCT_FLOPS` in all, in the runtime's format: what the limit is measured with."""

    def products(size: int) -> Callable[[], object]:
        a = torch.randn(size, size, device=runtime.device, dtype=runtime.dtype)
        out = torch.empty_like(a)
        return lambda: [torch.mm(a, a, out=out) for _ in range(PRODUCT_FLOPS // (2 * size**3))]

    return {size: products(size) for size in MATRIX_SIZES}


def matrix_limit(seconds: Mapping[tuple[str, Any], float], precision: str) -> float:
    """FLOP/s of the fastest of the timed products, of the seconds of `time_in_turns` by number format and matrix size."""
    return max(PRODUCT_FLOPS / seconds[precision, size] for size in MATRIX_SIZES)


def median_totals(runs: list[Phases]) -> dict[str, float]:
    """The median of each phase's total over runs that have the same phases."""
    totals = [run.totals() for run in runs]
    return {phase: statistics.median(each[phase] for each in totals) for phase in totals[0]}
