"""What a run writes beside its checkpoints: its folder, scalars as CSV and curves, and an offline wandb run."""

from __future__ import annotations

import csv
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.config import WandbConfig

WANDB_TIMEOUT_S = 60.0  # for its first answer


def make_run_folder(log_dir: Path, run_name: str | None) -> Path:
    """Create and return a new folder for this run; a name that is taken gets a number. Raises OSError naming log_dir."""
    name = run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = log_dir / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise OSError(f"cannot write to the folder {log_dir} ({error.strerror}): set log_dir to one that can be written") from error


def point_to_latest(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, atomically replacing an earlier one; a copy on a file system without links."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(target, link.parent))
    except OSError:
        shutil.copyfile(target, temporary)
    os.replace(temporary, link)


class RunLog:
    """Scalars of one run, written as they come: to scalars.csv, and to wandb unless that is disabled or broken. draw(csv path, picture
    path) makes the run's picture. wandb_run_id: that of the resumed run; the attribute is this run's."""

    def __init__(
        self, folder: Path, columns: tuple[str, ...], config: dict[str, Any], wandb_config: WandbConfig, picture: str,
        draw: Callable[[Path, Path], None], wandb_run_id: str | None = None,
    ):
        self.folder = folder
        self._picture, self._draw, self._last_step = folder / picture, draw, 0
        self.columns = ("step", "seconds", *columns)
        self._file = open(folder / "scalars.csv", "w", newline="")
        self._writer = csv.DictWriter(self._file, self.columns)
        self._writer.writeheader()
        self.wandb_run_id = wandb_run_id
        self._wandb: Any = None
        if wandb_config.mode != "disabled":
            self._wandb = self._unless_broken(lambda: self._start_wandb(config, wandb_config))

    def _start_wandb(self, config: dict[str, Any], wandb_config: WandbConfig) -> Any:
        import wandb  # here, as training must also run where it is missing or broken

        is_resumed = self.wandb_run_id is not None
        self.wandb_run_id = self.wandb_run_id or secrets.token_hex(4)
        return wandb.init(
            project=wandb_config.project, mode=wandb_config.mode, dir=str(self.folder), name=self.folder.name, config=config,
            id=self.wandb_run_id, resume="allow" if is_resumed or wandb_config.mode == "online" else None,  # offline: for `wandb sync`
            settings=wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S),
        )

    def _tell_wandb(self, tell: Callable[[Any], None]) -> None:
        if self._wandb is not None:
            self._unless_broken(lambda: tell(self._wandb))

    def _unless_broken(self, use_wandb: Callable[[], Any]) -> Any:
        """What use_wandb returns. Whatever it raises, training continues without wandb."""
        try:
            return use_wandb()
        except Exception as error:
            self._wandb = None
            if isinstance(error, ConnectionError):  # its local process has died, and would raise again when this one exits
                with suppress(Exception):  # the warning below names the cause
                    import wandb

                    wandb.teardown()
            reason = " ".join(str(error).split())
            warnings.warn(f"wandb is off for the rest of this run ({reason}); scalars.csv has every figure", stacklevel=4)

    def scalars(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Write one row; a column without a figure stays empty."""
        self._last_step = step
        self._writer.writerow({"step": step, "seconds": f"{seconds:.2f}", **{k: f"{v:.6g}" for k, v in figures.items()}})
        self._file.flush()
        self._tell_wandb(lambda run: run.log(figures, step=step))

    def media(self, step: int, name: str, path: Path) -> None:
        """Show a picture or GIF in wandb; the file itself is already in the run's folder."""
        def show(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=step)

        self._last_step = step
        self._tell_wandb(show)

    def verdict(self, words: str) -> None:
        """Write the watchdog's verdict, unless it is empty, to verdict.txt and to wandb's summary of the run."""
        if words:
            (self.folder / "verdict.txt").write_text(words + "\n", encoding="utf-8")
            self._tell_wandb(lambda run: run.summary.update({"verdict": words}))

    def draw(self) -> None:
        """Draw the run's picture from the rows so far, and show it in wandb."""
        self._draw(self.folder / "scalars.csv", self._picture)
        if self._picture.exists():
            self.media(self._last_step, self._picture.stem, self._picture)

    def close(self) -> None:
        """Close the files, draw the picture and finish the wandb run. A full disk here is a warning: it hides no other error."""
        try:
            self._file.close()
            self.draw()
        except OSError as error:
            warnings.warn(f"the newest figures or their picture could not be written ({error})", stacklevel=2)
        self._tell_wandb(lambda run: run.finish())


class SilentLog:
    """The log of the processes that do not write."""

    wandb_run_id: str | None = None

    def scalars(self, step: int, seconds: float, figures: dict[str, float]) -> None: ...
    def media(self, step: int, name: str, path: Path) -> None: ...
    def draw(self) -> None: ...
    def verdict(self, words: str) -> None: ...
    def close(self) -> None: ...


def draw_curves(csv_path: Path, picture_path: Path) -> None:
    """One panel per scalar over the step, the raw values pale and a running median over them."""
    series = read_scalars(csv_path)
    if not series:
        return
    figure, axes = panel_grid(len(series), min(3, len(series)), 4.2, 2.8)
    for axis, (name, (steps, values)) in zip(axes, series.items(), strict=True):
        plot_series(axis, steps, values, "tab:blue")
        if spans_magnitudes(values):
            axis.set_yscale("log")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    figure.savefig(picture_path, dpi=110)


def read_scalars(csv_path: Path, with_seconds: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every column of a scalars.csv that has any; "seconds" only if asked for. Raises ValueError if the file is not
    a scalars.csv."""
    try:
        with open(csv_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        series = {}
        for name in rows[0] if rows else ():
            filled = [row for row in rows if row[name]]
            if filled and name != "step" and (with_seconds or name != "seconds"):
                series[name] = (np.array([int(row["step"]) for row in filled]), np.array([float(row[name]) for row in filled]))
        return series
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{csv_path} is no table of a run's figures by step: give the folder of a run of train.py") from error


def panel_grid(num: int, width: int, panel_width: float, panel_height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `num` panels of this size, in inches, in rows of `width`."""
    height = -(-num // width)
    figure = Figure(figsize=(panel_width * width, panel_height * height), layout="constrained")
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for axis in axes[num:]:
        axis.axis("off")
    for axis in axes[:num]:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    return figure, axes[:num]


def spans_magnitudes(values: np.ndarray) -> bool:
    """Does the plot need a logarithmic axis: are all finite values positive, and some far above their median?"""
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and finite.min() > 0 and finite.max() > 20 * np.median(finite)


def plot_series(axis: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """The values in a pale line, and their running median over it."""
    width = max(len(values) // 40, 1)
    median = [np.median(values[max(i - width, 0): i + width + 1]) for i in range(len(values))]
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, median, color=color, linewidth=1.5)
