"""The health panel: health.png, drawn from a Self-Forcing run's scalars.csv. docs/health.md says how to read it.

    python -m judging.health RUN_FOLDER [RUN_FOLDER ...] --output PATH    draw one run, or several over each other
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from judging.prompts import JUDGED_COLUMNS
from machine.interruption import refusals_in_one_line
from machine.paths import user_path
from method.diagnostics import NOISE_LEVELS
from training.run_log import panel_grid, plot_series, read_scalars, spans_magnitudes

PANELS = {  # title, and what a healthy run looks like
    "loss_generator": ("generator's loss", "no measure of quality: may rise or fall"),
    "loss_critic": ("critic's loss", "no steady rise"),
    "critic_lag": ("critic lag", "around 0"),
    "dmd_gradient_norm": ("norm of the DMD gradient", "same order throughout"),
    "logit_distance": ("real minus fake logit", "above 0, bounded"),
    **{
        f"score_distance_{name}": (f"real to fake score, {name} noise", f"t in {low:.2f} to {high:.2f}: bounded")
        for name, (low, high) in NOISE_LEVELS.items()
    },
    "gradient_norm_generator": ("generator's gradient norm", "no spikes"),
    "frames_right": ("frames right", "rises"),
    "one_class": ("one class throughout", "rises, late"),
    "track_within_1px": ("track within 1 px", "stays up"),
    "stroke_mass_ratio": ("stroke mass over real", "near 1"),
    "frames_right_last_block": ("frames right, last block", "as in all frames"),
    "stroke_mass_ratio_last_block": ("stroke mass over real, last block", "as in all frames"),
}
SHARES = ("frames_right", "one_class", "track_within_1px", "frames_right_last_block")  # drawn from 0 to 1
EXIT = "loss_exit_"  # and a timestep: the columns of the exit steps


def ordered_columns(found: set[str]) -> list[str]:
    """The columns that are drawn, in the order of `PANELS`, exit steps before the judge's."""
    exits = sorted((name for name in found if name.startswith(EXIT)), key=lambda name: -int(name.removeprefix(EXIT)))
    known = [name for name in PANELS if name in found]
    return sorted([*known, *exits], key=lambda name: (name in JUDGED_COLUMNS, name in exits))


def draw_health(path: Path, runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """One axis per column that any of the runs has, a colour a run: values pale, running median over them. Without any such column, no
    picture. runs: by name, the series of `run_log.read_scalars`."""
    columns = ordered_columns({column for series in runs.values() for column in series})
    if not columns:
        return
    figure, axes = panel_grid(len(columns), 4, 3.4, 2.6)
    colors = {name: f"C{index % 10}" for index, name in enumerate(runs)}
    for axis, column in zip(axes, columns, strict=True):
        shown = {name: series[column] for name, series in runs.items() if column in series}
        for name, (steps, values) in shown.items():
            plot_series(axis, steps, values, colors[name])
        if column in SHARES:
            axis.set_ylim(-0.03, 1.03)
        elif spans_magnitudes(np.concatenate([values for _, values in shown.values()])):
            axis.set_yscale("log")
        elif column == "critic_lag":
            axis.axhline(0, color="black", linewidth=0.6)
        title, caption = PANELS.get(column, (f"loss, exit at {column.removeprefix(EXIT)}", "steps alike, none apart"))
        axis.set_title(f"{title}\n", fontsize=9, fontweight="bold")
        axis.text(0.5, 1.02, caption, transform=axis.transAxes, ha="center", va="bottom", fontsize=7.5, color="dimgray")
    if len(runs) > 1:
        lines = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(runs), 5), fontsize=9)
    figure.savefig(path, dpi=75)


def draw_run(csv_path: Path, picture_path: Path) -> None:
    """health.png of one run."""
    draw_health(picture_path, {csv_path.parent.name: read_scalars(csv_path)})


def compare_runs(folders: list[Path], output: Path) -> None:
    """Draw the runs of these folders over each other. Raises ValueError or OSError for what does not fit; overwrites nothing."""
    if output.suffix != ".png":
        raise ValueError(f"--output is {output}: expected the name of a new .png file")
    if output.exists():
        raise FileExistsError(f"{output} exists already: give --output the name of a new file, or delete it first")
    runs = {}
    for folder in folders:
        csv_path = folder / "scalars.csv"
        if not csv_path.is_file():
            raise FileNotFoundError(f"{folder} holds no scalars.csv: give the folder of a run of train.py")
        series = read_scalars(csv_path)
        if not ordered_columns(set(series)):
            raise ValueError(f"{csv_path} has none of the panel's columns: give the folder of a Self-Forcing run that has made a step")
        runs[str(folder) if folder.resolve().name in runs else folder.resolve().name] = series
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_health(output, runs)


def main() -> None:
    """Draw the health panel of one finished or running run, or of several over each other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_folders", nargs="+", type=user_path, metavar="RUN_FOLDER", help="folders under logs/training")
    parser.add_argument("--output", required=True, type=user_path, metavar="PATH", help="the picture, a new .png file")
    arguments = parser.parse_args()
    with refusals_in_one_line():
        compare_runs(arguments.run_folders, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
