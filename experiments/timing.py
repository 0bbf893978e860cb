"""Seconds and FLOPs: contestants timed in turns beside the machine's limit, and real calls split into phases from outside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from machine.runtime import Runtime

MATRIX_SIZES = (1024, 2048)  # the limit is that of the faster one
PRODUCT_FLOPS = 2 * 2048**3  # of a timed run of products
WHOLE, REST = "whole", "rest"  # all that was watched; what no phase covers

Gauge = Callable[[], float]  # a clock, a FLOP counter
Call = tuple[str, float, float]  # phase, the gauge before, the gauge after
Key = TypeVar("Key", bound=Hashable)


def clock(device: torch.device) -> Gauge:
    """Seconds, read once the device has finished all its work."""

    def read() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def flop_counter() -> FlopCounterMode:
    """Counts matrix products, forward and backward, including the CPU's fused attention, which PyTorch's own table leaves out."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    })


@contextmanager
def watch(gauge: Gauge, places: list[tuple[Any, str, str | Callable[[], str]]]) -> Iterator[list[Call]]:
    """Yield a list that collects every call of the places (owner, name of its function, phase) made within, and last `WHOLE`.

    A call inside a watched call belongs to the outer one, so phases never overlap. A phase may be a function, asked when the call ends."""
    calls: list[Call] = []
    is_inside = False

    def read_around(function: Callable[..., Any], phase: str | Callable[[], str]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*args, **kwargs)
            is_inside, begin = True, gauge()
            try:
                return function(*args, **kwargs)
            finally:
                calls.append((phase if isinstance(phase, str) else phase(), begin, gauge()))
                is_inside = False

        return watched

    with ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(patch.object(owner, name, read_around(getattr(owner, name), phase)))
        begin = gauge()
        yield calls
        calls.append((WHOLE, begin, gauge()))


def phase_totals(calls: list[Call]) -> dict[str, float]:
    """By phase, in the order of their first calls, and `REST`: their sum is the whole."""
    sums: dict[str, float] = {}
    for phase, begin, end in calls:
        sums[phase] = sums.get(phase, 0.0) + end - begin
    whole = sums.pop(WHOLE)
    return {**sums, REST: whole - sum(sums.values())}


def median_totals(runs: list[list[Call]]) -> dict[str, float]:
    """The median of each phase's total over runs that have the same phases."""
    totals = [phase_totals(calls) for calls in runs]
    return {phase: statistics.median(each[phase] for each in totals) for phase in totals[0]}


def time_in_turns(contestants: Mapping[Key, Callable[[], object]], repeats: int, device: torch.device) -> dict[Key, float]:
    """Median seconds of each contestant over `repeats` rounds in which each runs once, after a warm-up round."""
    seconds: dict[Key, list[float]] = {name: [] for name in contestants}
    read = clock(device)
    for _ in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):
        for name, contestant in contestants.items():
            start = read()
            contestant()
            seconds[name].append(read() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def time_beside_products(
    contestants: Mapping[tuple[str, Any], Callable[[], object]], runtimes: dict[str, Runtime], repeats: int
) -> tuple[dict[tuple[str, Any], float], dict[str, float]]:
    """`time_in_turns` of contestants (precision, name), and by precision the limit: FLOP/s of large square products in the same rounds."""

    def multiply(a: torch.Tensor, out: torch.Tensor) -> None:
        for _ in range(PRODUCT_FLOPS // (2 * len(a) ** 3)):
            torch.mm(a, a, out=out)

    timed: dict[tuple[str, Any], Callable[[], object]] = {}
    for precision, runtime in runtimes.items():
        for size in MATRIX_SIZES:
            a = torch.randn(size, size, device=runtime.device, dtype=runtime.dtype)
            timed[precision, size] = partial(multiply, a, torch.empty_like(a))
    seconds = time_in_turns({**timed, **contestants}, repeats, next(iter(runtimes.values())).device)
    return seconds, {precision: max(PRODUCT_FLOPS / seconds[precision, size] for size in MATRIX_SIZES) for precision in runtimes}
