"""Where a run computes: device and number format, resolved once; and digests that name code and files."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from machine.paths import REPOSITORY

WINGS = ("machine", "digits", "network", "method", "clips", "training", "sampling", "judging", "experiments")  # folders of modules
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW_GAIN = 0.8  # below this speed relative to float32, bfloat16 is warned of
LEAST_GAIN = 1.2  # above it, precision=auto chooses bfloat16


@dataclass(frozen=True)
class Runtime:
    """A device and the format of its matrix products: torch.float32 or torch.bfloat16 (autocast)."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks run; it changes nothing in float32. Without the cache of cast weights: before PyTorch 2.11 a weight
        cast in a pass without gradient was reused, detached, by a later pass with gradient, and a rollout has both."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16, cache_enabled=False)

    @property
    def precision(self) -> str:
        """The format as `resolve_runtime` takes it: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.device} in {self.precision}"


def resolve_runtime(device: str, precision: str) -> Runtime:
    """Turn `auto|cpu|cuda|mps` and `auto|float32|bfloat16` into a Runtime. Raises ValueError for a device that this machine lacks."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if device not in has:
        raise ValueError(f"device is {device}: expected auto, cpu, cuda or mps")
    if not has[device]:
        raise ValueError(f"device is {device}, which this machine does not have; found: {', '.join(n for n in has if has[n])}")
    resolved = torch.device(device)
    if precision == "auto":
        precision = "bfloat16" if _bfloat16_pays(resolved) else "float32"
    elif precision == "bfloat16" and resolved.type == "cpu" and gain_over_float32(torch.bfloat16) < SLOW_GAIN:
        warnings.warn(
            f"a product in bfloat16 takes {1 / gain_over_float32(torch.bfloat16):.1f} times as long as in float32 on this processor: "
            "precision=float32 is the faster one here", stacklevel=2,
        )
    return Runtime(resolved, PRECISIONS[precision])


def _bfloat16_pays(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 natively, and faster: 2 to 8 times on most, but on some slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_instructions = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return has_instructions and gain_over_float32(torch.bfloat16) > LEAST_GAIN


@cache
def gain_over_float32(dtype: torch.dtype) -> float:
    """Speed of a matrix product in bfloat16 or int8 on this CPU, relative to float32: the best of alternating tries, so that other load
    matters little."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], dtype: []}
    for _ in range(10):
        for each, tries in seconds.items():
            matrix = torch.ones(512, 512, dtype=each)
            product = torch._int_mm if each == torch.int8 else torch.mm
            start = time.perf_counter()
            product(matrix, matrix)
            tries.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[dtype])


def require_compiler(name: str, device: torch.device) -> None:
    """Raise ValueError naming the option if torch.compile would find no C++ compiler."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"{name} needs a C++ compiler, and {compiler} is not there: install it, name another in CXX, or leave {name} out")


def describe_machine(num_threads: int) -> str:
    """Processor, cores and versions in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {num_threads} threads, torch {torch.__version__}"


def code_digest(*modules: str) -> str:
    """SHA-256 over the names and text of the project's Python files; given modules: of these and all that they import."""
    files = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path.read_text(encoding="utf-8")
        for pattern in ("*.py", *(f"{wing}/*.py" for wing in WINGS)) for path in REPOSITORY.glob(pattern)
    }
    waiting, counted, digest = list(modules or files), set(), hashlib.sha256()
    while waiting:
        name = waiting.pop()
        if name in files and name not in counted:
            counted.add(name)
            for package, imported in re.findall(r"^\s*from ([\w.]+) import (\([^)]*\)|.*)", files[name], re.MULTILINE):
                waiting += [package, *(f"{package}.{each}" for each in re.findall(r"\w+", imported))]
    for name in sorted(counted):
        digest.update(f"{name}\n{files[name]}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
