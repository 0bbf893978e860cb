"""Continuing a run: its newest readable checkpoint, a lock against other processes, and the state of the global random generators.

`training.resume` is `never`, the PATH of a checkpoint, or `auto`: the newest readable checkpoint of this run. "This run" are the
folders under log_dir (with run_name: NAME, NAME-2, ... only) whose stored settings equal those asked for, apart from
`NO_MATTER`, which change no weight, and training.num_steps, which may grow. Of those folders the one last written to counts.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from machine.files import remove_leftovers
from machine.runtime import PRECISIONS, Runtime
from training.checkpoint import CheckpointError, checkpoint_config, load_checkpoint
from training.config import Config, config_to_dict, flatten
from training.distributed import Processes

try:
    import fcntl
except ImportError:  # Windows: there a run that still works cannot be told from one that was killed
    fcntl = None

NEVER, AUTO = "never", "auto"
NO_MATTER = (
    "log_dir", "run_name", "wandb", "training.resume", "training.checkpoint_interval", "training.keep_last",
    "training.log_interval", "training.sample_interval", "training.eval_videos", "training.health_interval",
)
FINAL = "checkpoint_final.pt"
INTERVAL_NAME = re.compile(r"checkpoint_\d{7,}\.pt")


class RunFinished(Exception):
    """There is nothing left to do; the message says of which run and how to continue it."""


@dataclass(frozen=True)
class Start:
    """What a run continues. attempts: the folders of this run so far, whose interval checkpoints count towards keep_last; empty for a
    PATH, which may be another run's."""

    path: Path
    checkpoint: dict[str, Any]
    attempts: tuple[Path, ...]


def settings_without(config: Config, ignored: tuple[str, ...]) -> dict[str, Any]:
    """The flat configuration without these keys and groups of keys."""
    return {
        key: value for key, value in flatten(config_to_dict(config)).items()
        if not any(key == other or key.startswith(f"{other}.") for other in ignored)
    }


def describe_difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which settings differ, as "KEY A, now B"; empty if none does."""
    stored, wanted = flatten(stored), flatten(wanted)
    differing = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {stored.get(key)}, now {wanted.get(key)}" for key in differing)


def interval_checkpoints(folder: Path) -> list[Path]:
    """Those of one folder, the newest last."""
    named = [path for path in folder.glob("checkpoint_*.pt") if INTERVAL_NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.stem.removeprefix("checkpoint_")))


def newest_readable(paths: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The last of the paths that holds a whole checkpoint, and its content, whose tensors stay in the file until they are read. A warning
    names each path that is passed over."""
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path, is_mapped=True)
            checkpoint_config(path, checkpoint)
            return path, checkpoint
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return None


def find_start(config: Config) -> Start | None:
    """What training.resume asks to continue, None for a run from the start; `auto` prints what it found. Raises CheckpointError for a PATH
    that cannot be read and RunFinished if `auto` finds a run that is done."""
    resume = config.training.resume
    if resume == NEVER:
        return None
    if resume != AUTO:
        return Start(Path(resume), load_checkpoint(Path(resume)), ())
    others: list[str] = []
    for folder in _folders_newest_first(config):
        found = newest_readable(_checkpoints(folder))
        if found is None:
            continue
        path, checkpoint = found
        stored, num_steps = checkpoint_config(path, checkpoint), config.training.num_steps
        ignored = (*NO_MATTER, "training.num_steps")
        difference = describe_difference(settings_without(stored, ignored), settings_without(config, ignored))
        if difference:
            others.append(f"{folder.name} has {difference}")
            continue
        if checkpoint["step"] >= num_steps:
            raise RunFinished(f"{folder} is finished: {path.name} is at step {checkpoint['step']} of {num_steps}; a larger "
                              "training.num_steps continues it, training.resume=never starts a new run")
        longer = "" if stored.training.num_steps == num_steps else f"; it was to end at {stored.training.num_steps}"
        print(f"training.resume=auto: goes on from {path}, step {checkpoint['step']} of {num_steps}{longer}")
        return Start(path, load_checkpoint(path), _attempts(folder, checkpoint))
    reason = others[0] if others else "no readable checkpoint"
    name = f" named {config.run_name}" if config.run_name else ""
    print(f"training.resume=auto: starts from the beginning, as {config.log_dir} holds no run{name} with these settings ({reason})")
    return None


def find_common_start(config: Config, processes: Processes) -> Start | None:
    """What the first process finds to continue; the others read the same file."""
    start = finished = None
    if processes.is_first:
        try:
            start = find_start(config)
        except RunFinished as error:
            finished = error
    path, finished = processes.from_first(lambda: (start and start.path, finished))
    if finished is not None:
        raise finished
    return start if processes.is_first or path is None else Start(path, load_checkpoint(path), ())


def choose_format(runtime: Runtime, start: Start | None, precision: str) -> torch.dtype:
    """The number format of a run: with precision=auto that of the run that it continues. Prints where the format changes."""
    stored = runtime.precision
    if start is not None and "runtime" in start.checkpoint:  # earlier versions stored none
        stored = start.checkpoint["runtime"]["precision"]
    if stored != runtime.precision and precision == "auto":
        print(f"resumes in {stored}, the format of {start.path}, where precision=auto would now choose {runtime.precision}")
        return PRECISIONS[stored]
    if stored != runtime.precision:
        print(f"resumes in {runtime.precision}, as asked, where {start.path} was trained in {stored}: the run changes its format here")
    return runtime.dtype


def _checkpoints(folder: Path) -> list[Path]:
    """All of a folder, the newest last."""
    return [*interval_checkpoints(folder), *folder.glob(FINAL)]


def _folders_newest_first(config: Config) -> list[Path]:
    """The folders under log_dir that hold a checkpoint and may be of this run by their name, the one last written to first."""
    name = config.run_name
    is_own = re.compile(".*" if name is None else rf"{re.escape(name)}(-\d+)?", re.DOTALL)
    folders = [path for path in Path(config.log_dir).glob("*/") if is_own.fullmatch(path.name)]
    written = [(path.stat().st_mtime_ns, folder) for folder in folders for path in _checkpoints(folder)]
    return list(dict.fromkeys(folder for _, folder in sorted(written, reverse=True)))


def _attempts(folder: Path, checkpoint: dict[str, Any]) -> tuple[Path, ...]:
    """The folders that led to this checkpoint, by the names in it; earlier versions stored none."""
    names = checkpoint["attempts"] if isinstance(checkpoint.get("attempts"), list) else []
    siblings = {path.name: path for path in folder.parent.glob("*/") if path != folder}  # so that no name leads elsewhere
    earlier = dict.fromkeys(siblings[name] for name in names if isinstance(name, str) and name in siblings)
    return *earlier, folder


class RunClaim:
    """Locks run folders, so that no other process continues or clears them; the kernel releases them when this one ends. On a file system
    without locks nothing is held."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def add(self, folder: Path) -> bool:
        """Is the folder held now? Raises ValueError naming it if another process holds it."""
        if fcntl is None:
            return False
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"another process is still training in {folder}: wait for it or stop it, or give another run_name or "
                                 "training.resume=never") from error
            return False  # a file system without locks, such as some network ones
        self._descriptors[folder] = descriptor
        return True

    def add_attempts(self, start: Start) -> list[Path]:
        """Hold this run's earlier folders; returns their interval checkpoints, those to be replaced first."""
        for folder in start.attempts:
            if self.add(folder):
                remove_leftovers(folder)
        kept = [path for folder in start.attempts for path in interval_checkpoints(folder)]
        newest = f"checkpoint_{start.checkpoint['step']:07d}"
        return sorted(kept, key=lambda path: path.stem if path.stem <= newest else "")  # unreadable ones, which are newer, first

    def release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:  # of a trainer that was built and never ran
        self.release()


def global_random_states() -> dict[str, Any]:
    """Of the generators of `seeds.seed_global_generators`, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "position": position, "gauss": [has_gauss, cached]},
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
    }


def restore_global_random_states(states: dict[str, Any]) -> None:
    """The inverse. CUDA generators are restored where they are stored and there. Raises KeyError, TypeError, ValueError, RuntimeError."""
    numpy_state, python_state = states["numpy"], states["python"]
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy_state["kind"], keys, numpy_state["position"], *numpy_state["gauss"]))
    random.setstate((python_state["version"], tuple(python_state["internal"]), python_state["gauss"]))
