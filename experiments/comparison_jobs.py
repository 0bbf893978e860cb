"""The jobs of a comparison: a training or a score, each a child process of train.py or evaluate.py. A finished job is reused only if its
files say that it was made as planned."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.comparison_settings import REAL
from machine.files import free_paths
from machine.runtime import file_digest
from training.checkpoint import CheckpointError, checkpoint_config, load_checkpoint
from training.config import Config
from training.resume import FINAL, describe_difference, settings_without
from training.run_log import read_scalars

SECONDS_TO_STOP = 60.0  # a training step and a checkpoint
NOT_OF_THE_RESULT = ("log_dir", "run_name", "wandb", "training.pretrained_checkpoint", "training.checkpoint_interval",
                     "training.keep_last", "training.log_interval", "training.resume")  # keys of a run that change no weight


@dataclass(frozen=True)
class Training:
    """A run of train.py: its attempts are folders run, run-2, ... in `folder`, beside a link to the finished checkpoint. overrides: make
    `config`. settings: all that its weights depend on; the folder's name ends in their fingerprint."""

    label: str
    paradigm: str
    block: int
    seed: int
    config: Config
    overrides: list[str]
    folder: Path
    settings: dict[str, Any]
    flops_per_step: float
    script: str = "train.py"

    @property
    def checkpoint(self) -> Path:
        return self.folder / FINAL

    def arguments(self) -> list[str]:
        own = ["training.keep_last=1", "training.resume=auto", "wandb.mode=disabled", "run_name=run", f"log_dir={quote(self.folder)}"]
        return [*self.overrides, *own]

    def difference(self) -> str:
        """How the finished training differs from the plan, in one line; empty if it does not."""
        try:
            stored = load_checkpoint(self.checkpoint, is_mapped=True)
            resolved = settings_without(checkpoint_config(self.checkpoint, stored), NOT_OF_THE_RESULT)
        except CheckpointError as error:
            return str(error)
        planned = {**self.settings, "step": self.config.training.num_steps}
        return describe_difference({**self.settings, **resolved, "step": stored["step"]}, planned)

    def finish(self) -> str:
        """Remove the checkpoints that only resuming needed; returns how the result differs from the plan."""
        for path in self.folder.glob("run*/checkpoint_[0-9]*.pt"):
            path.unlink()
        return self.difference()

    def set_aside(self) -> str:
        """Rename the folder of a finished training that is not what was planned; returns its new name."""
        (aside,) = free_paths(self.folder.parent, [f"{self.folder.name}.stale"])
        return self.folder.rename(aside).name

    def minutes(self) -> float:
        """Of the steps of all attempts."""
        logs = [read_scalars(path, with_seconds=True) for path in self.folder.glob("run*/scalars.csv")]
        return sum(float(log["seconds"][1][-1]) for log in logs if "seconds" in log) / 60


@dataclass
class Score:
    """A run of evaluate.py on one checkpoint. place: row, block size and seed in the table. settings: all that its figures depend on.
    figures: those of the network and of the real videos; None until it is done."""

    label: str
    place: tuple[str, str, str]
    training: Training | None  # None for the teacher's file
    checkpoint: Path
    options: list[str]
    folder: Path
    settings: dict[str, Any]
    figures: dict[str, dict[str, Any]] | None = None
    script: str = "evaluate.py"

    def arguments(self) -> list[str]:
        shutil.rmtree(self.folder / "figures", ignore_errors=True)  # of an attempt that was stopped
        return [f"checkpoint={quote(self.checkpoint)}", *self.options, f"output_dir={quote(self.folder / 'figures')}"]

    def finish(self) -> str:
        """Read the figures, without those by frame; returns how what they were made with differs from the plan."""
        scored = json.loads((self.folder / "figures" / "evaluation.json").read_text())
        real, network = ({key: value for key, value in row.items() if "_by_frame" not in key} for row in scored.values())
        made_with = {key: value if key == "network" else network.pop(key) for key, value in self.settings.items()}
        machine = json.loads((self.folder / "settings.json").read_text())["machine"]
        network |= {"sampler": list(scored)[1].partition(", ")[2], "machine": machine, "made_with": made_with}
        difference = row_difference(network, self.settings, self.checkpoint)
        if not difference:
            self.figures = {REAL: real, "network": network}
        return difference


def row_difference(row: dict[str, Any], planned: dict[str, Any], checkpoint: Path) -> str:
    """How a finished row of a table differs from the plan, in one line; empty if it does not."""
    if "made_with" not in row:
        return "what made it is not recorded"
    if difference := describe_difference(row["made_with"], planned):
        return difference
    return f"another {checkpoint}" if checkpoint.exists() and row["checkpoint_sha256"] != file_digest(checkpoint) else ""


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def quote(path: Path) -> str:
    """A path as a value of Hydra's command line, whatever its characters."""
    return "'" + str(path).replace("'", "\\'") + "'"


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Terminate the processes, and kill those that do not end."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
