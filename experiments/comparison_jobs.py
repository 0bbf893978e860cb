"""The jobs of a comparison: one training, one score. Each is a child process with a folder of its own, named after its settings."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experiments.comparison_settings import REAL
from training.config import Config
from training.resume import newest_readable

SECONDS_TO_STOP = 60.0  # a training step and a checkpoint
UNFINISHED = ".unfinished"  # ends the name of a score's folder until it is complete


class Job(Protocol):
    """One child process. label: what it is, for people. settings: all that its result depends on."""

    label: str
    script: str
    folder: Path
    settings: dict[str, Any]
    needs: Job | None

    def is_done(self) -> bool: ...
    def arguments(self) -> list[str]: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class Training:
    """A run of train.py: its attempts are folders run, run-2, ... in `folder`, beside a link to the finished checkpoint."""

    label: str
    paradigm: str
    block: int
    seed: int
    config: Config  # of the run
    overrides: list[str]  # which make it so
    checkpoint_interval: int
    folder: Path
    settings: dict[str, Any]
    flops_per_step: float
    script: str = "train.py"
    needs: Job | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_final.pt"

    def is_done(self) -> bool:
        return self.checkpoint.exists()

    def interval_checkpoints(self) -> list[Path]:
        """Those of all attempts, the newest last."""
        return sorted(self.folder.glob("run*/checkpoint_[0-9]*.pt"), key=lambda path: path.stem)

    def resumed_from(self) -> Path | None:
        found = newest_readable(self.interval_checkpoints())
        return None if found is None else found[0]

    def arguments(self) -> list[str]:
        resume = self.resumed_from()
        return [
            *self.overrides, f"training.checkpoint_interval={self.checkpoint_interval}", "training.keep_last=1", "wandb.mode=disabled",
            f"log_dir={quote(self.folder)}", "run_name=run", *([] if resume is None else [f"training.resume={quote(resume)}"]),
        ]

    def finish(self) -> None:
        for path in self.interval_checkpoints():
            path.unlink()

    def minutes(self) -> float:
        """Of all attempts together, in training steps alone."""
        seconds = 0.0
        for path in self.folder.glob("run*/scalars.csv"):
            with open(path, newline="") as file:
                rows = [row["seconds"] for row in csv.DictReader(file) if row["seconds"]]
            seconds += float(rows[-1]) if rows else 0.0
        return seconds / 60


@dataclass(frozen=True)
class Score:
    """A run of evaluate.py on one checkpoint; it moves to `folder` when it is complete."""

    label: str
    row: str
    block: int
    seed: int
    checkpoint: Path
    options: list[str]
    folder: Path
    settings: dict[str, Any]
    kept: dict[str, dict[str, Any]] | None = None  # its figures in the table of an earlier call
    script: str = "evaluate.py"
    needs: Training | None = None

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(self.folder.name + UNFINISHED)

    def is_done(self) -> bool:
        return self.folder.exists() or self.kept is not None

    def arguments(self) -> list[str]:
        return [f"checkpoint={quote(self.checkpoint)}", *self.options, f"output_dir={quote(self.unfinished)}"]

    def finish(self) -> None:
        os.replace(self.unfinished, self.folder)

    def figures(self) -> dict[str, dict[str, Any]]:
        """Those of real videos and those of the network, with its sampler and machine in words, and what they were made with; by frame
        they stay in the file."""
        if not self.folder.exists():
            assert self.kept is not None
            return self.kept
        scored = json.loads((self.folder / "evaluation.json").read_text())
        real, network = ({key: value for key, value in row.items() if "_by_frame" not in key} for row in scored.values())
        started = json.loads((self.folder / "settings.json").read_text())
        sampler = list(scored)[1].partition(", ")[2]
        about = {"sampler": sampler, "machine": started["machine"], "made_with": started["settings"]}
        return {REAL: real, "network": {**network, **about}}


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def quote(path: Path) -> str:
    """A path as a value of Hydra's command line, whatever its characters; relative ones stay so."""
    return "'" + str(path).replace("'", "\\'") + "'"


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to end, and end those that do not."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
