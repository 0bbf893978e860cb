"""Is a Self-Forcing run healthy? The figures that say so, and their picture, health.png.

Dimensions: B batch, F frames, C channels, H height, W width.

Everything here looks and nothing trains: the figures of a generator's turn are made of what its loss has computed anyway,
and the generator's videos of fixed prompts come from seeds of their own. README, "Is my run healthy?", says how to read it.

    python health.py RUN_FOLDER [RUN_FOLDER ...] --output PATH    draw one run, or several over each other
"""

from __future__ import annotations

import threads  # noqa: F401, I001  before torch, which reads its settings once

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from torch import Tensor  # noqa: E402

from digit_judge import DigitJudge  # noqa: E402
from distribution_losses import Verdict  # noqa: E402
from metrics import facts_of_prompts, score_videos, summarise  # noqa: E402
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig  # noqa: E402
from run_log import plot_series, read_scalars  # noqa: E402
from seeds import Purpose, video_seeds  # noqa: E402
from text_encoder import DIRECTION_PHRASES  # noqa: E402

NOISE_LEVELS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.0)}  # of t; the lower bound is inside
LEAST_PUSH = 1e-12  # mean square of x_0_fake - x_0_real below which a critic that equals the teacher has no lag
NUM_PROMPTS = 16
PROMPTS = tuple(f"a {index % NUM_CLASSES} moving {DIRECTION_PHRASES[index % NUM_OCTANTS][0]}" for index in range(NUM_PROMPTS))
SEEDS = tuple(video_seeds(0, range(NUM_PROMPTS), Purpose.FIXED_PROMPTS))
JUDGED_COLUMNS = ("frames_right", "one_class", "track_within_1px", "stroke_mass_ratio")  # of `metrics.summarise`
STEP_COLUMNS = ("critic_lag", *(f"score_distance_{name}" for name in NOISE_LEVELS))


# ------------------------------------------------------------------------------------------------------ a generator's turn


def mean_by_noise_level(values: Tensor, t: Tensor) -> dict[str, float]:
    """Mean of values (B,) over the videos whose time t (B,) lies in each of `NOISE_LEVELS`; a level without a video is left out."""
    level = sum((t >= low).long() for low, _ in NOISE_LEVELS.values()) - 1  # (B,)
    return {name: values[level == index].mean().item() for index, name in enumerate(NOISE_LEVELS) if (level == index).any()}


def exit_columns(denoising_steps: list[int]) -> tuple[str, ...]:
    """The column of the loss at each exit step, by its timestep: loss_exit_750."""
    return tuple(f"loss_exit_{step}" for step in denoising_steps)


def mean_by_exit_step(terms: Tensor, frame_exits: Tensor, denoising_steps: list[int]) -> dict[str, float]:
    """Mean of a loss's terms over the frames that left their walk at each denoising step; a step that none took is left out.

    terms: (B, F, ...), or (B,) of a loss that judges whole videos, which says nothing of one step where a video's blocks
    have different ones: then the result is empty. frame_exits: (B, F), indices into denoising_steps, -1 of frames that were given.
    """
    frame_exits = frame_exits.to(terms.device)
    if terms.ndim == 1:
        of_videos = frame_exits.amax(dim=1)
        if ((frame_exits != of_videos[:, None]) & (frame_exits >= 0)).any():
            return {}
        frame_exits = of_videos
    columns = exit_columns(denoising_steps)
    return {columns[index]: terms[frame_exits == index].mean().item() for index in frame_exits.unique().tolist() if index >= 0}


def critic_lag(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> float:
    """The share of the generator's push that is the critic's own error: sum (x_0_fake - x_0) d / sum d^2, d = x_0_fake - x_0_real.

    All (B, ...): videos that the generator makes now and the critic has not learned from yet, and what critic and guided
    teacher make of them, noised. A critic that keeps up knows E[x_0 | x_t], whose error x_0_fake - x_0 is orthogonal to every
    function of x_t, d among them: its lag is 0 but for the noise of a finite batch. One that still believes in an earlier
    generator, part of whose way to the teacher is done, pushes on as if it were not: with Gaussians that differ in their
    mean its lag is the share of the way that it has missed, 1 once the generator has arrived and more when it goes past.
    """
    push = x_0_fake.float() - x_0_real.float()
    energy = push.square().mean().item()
    return ((x_0_fake.float() - x_0.float()) * push).mean().item() / energy if energy > LEAST_PUSH else 0.0


def generator_figures(verdict: Verdict, frame_exits: Tensor, denoising_steps: list[int]) -> dict[str, float]:
    """What a generator's turn says of the run's health. Without scores (GAN) there is no score distance and no critic lag."""
    figures = verdict.figures | mean_by_exit_step(verdict.terms, frame_exits, denoising_steps)
    if verdict.x_0 is None or verdict.x_0_fake is None or verdict.x_0_real is None:
        return figures
    distance = (verdict.x_0_fake - verdict.x_0_real).abs().flatten(1).mean(1)  # (B,)
    figures |= {f"score_distance_{name}": value for name, value in mean_by_noise_level(distance, verdict.t).items()}
    return figures | {"critic_lag": critic_lag(verdict.x_0, verdict.x_0_fake, verdict.x_0_real)}


# --------------------------------------------------------------------------------------------------------- fixed prompts


@dataclass(frozen=True)
class FixedPrompts:
    """`PROMPTS`, every digit and every direction, from `SEEDS`: the same videos are asked for at every reading.

    sample: makes of prompts, seeds and a number of frames videos (B, F, C, H, W), and draws from the seeds alone.
    """

    judge: DigitJudge
    dataset: DatasetConfig
    num_frames: int
    sample: Callable[[list[str], list[int], int], Tensor]

    def read(self) -> dict[str, float]:
        """`JUDGED_COLUMNS` of what is made now."""
        video = self.sample(list(PROMPTS), list(SEEDS), self.num_frames)
        summary = summarise(score_videos(self.judge, video, *facts_of_prompts(list(PROMPTS)), self.dataset))
        return {name: summary[name] for name in JUDGED_COLUMNS}


# ------------------------------------------------------------------------------------------------------------ the picture


@dataclass(frozen=True)
class PanelStyle:
    """One axis of the picture. caption: what a healthy run looks like. limits: of the vertical axis, None for the data's."""

    title: str
    caption: str
    limits: tuple[float, float] | None = None


PANELS = {
    "loss_generator": PanelStyle("generator's loss", "no measure of quality: may rise or fall"),
    "loss_critic": PanelStyle("critic's loss", "no steady rise"),
    "critic_lag": PanelStyle("critic lag", "around 0"),
    "dmd_gradient_norm": PanelStyle("norm of the DMD gradient", "same order throughout"),
    "logit_distance": PanelStyle("real minus fake logit", "above 0, bounded"),
    **{
        f"score_distance_{name}": PanelStyle(f"real to fake score, {name} noise", f"t in {low:.2f} to {high:.2f}: bounded")
        for name, (low, high) in NOISE_LEVELS.items()
    },
    "gradient_norm_generator": PanelStyle("generator's gradient norm", "no spikes"),
    "frames_right": PanelStyle("frames right", "rises", (-0.03, 1.03)),
    "one_class": PanelStyle("one class throughout", "rises, late", (-0.03, 1.03)),
    "track_within_1px": PanelStyle("track within 1 px", "stays up", (-0.03, 1.03)),
    "stroke_mass_ratio": PanelStyle("stroke mass over real", "near 1"),
}
EXIT_CAPTION = "steps alike, none apart"


def panel_of(column: str) -> PanelStyle | None:
    """How a column of scalars.csv is drawn; None for one that is not."""
    if column.startswith("loss_exit_"):
        return PanelStyle(f"loss, exit at {column.removeprefix('loss_exit_')}", EXIT_CAPTION)
    return PANELS.get(column)


def ordered_columns(found: set[str]) -> list[str]:
    """The columns that are drawn, in the order of `PANELS`, exit steps before the judge's."""
    exits = sorted((name for name in found if name.startswith("loss_exit_")), key=lambda name: -int(name.removeprefix("loss_exit_")))
    known = [name for name in PANELS if name in found]
    first = [name for name in known if name not in JUDGED_COLUMNS]
    return [*first, *exits, *(name for name in known if name in JUDGED_COLUMNS)]


def draw_health(path: Path, runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], width: int = 4) -> None:
    """One axis per column that any of the runs has, a colour a run: values pale, running median over them.

    runs: by name, the series of `run_log.read_scalars`. Draws nothing where there is nothing to draw.
    """
    columns = ordered_columns({column for series in runs.values() for column in series})
    if not columns:
        return
    height = -(-len(columns) // width)
    figure, axes = plt.subplots(height, width, figsize=(3.4 * width, 2.5 * height + 0.4), squeeze=False, layout="constrained")
    for axis in axes.flat[len(columns):]:
        axis.axis("off")
    for axis, column in zip(axes.flat, columns, strict=False):
        _draw_panel(axis, column, {name: series[column] for name, series in runs.items() if column in series}, list(runs))
    if len(runs) > 1:
        lines = [plt.Line2D([], [], color=f"C{index % 10}", label=name) for index, name in enumerate(runs)]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(runs), 5), fontsize=9)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _draw_panel(axis: Axes, column: str, series: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str]) -> None:
    panel = panel_of(column)
    for name, (steps, values) in series.items():
        plot_series(axis, steps, values, f"C{names.index(name) % 10}")
    everything = np.concatenate([values for _, values in series.values()])
    everything = everything[np.isfinite(everything)]
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    elif len(everything) and everything.min() > 0 and everything.max() > 20 * np.median(everything):
        axis.set_yscale("log")
    elif column == "critic_lag":
        axis.axhline(0, color="black", linewidth=0.6)
    axis.set_title(f"{panel.title}\n", fontsize=9, fontweight="bold")
    axis.text(0.5, 1.02, panel.caption, transform=axis.transAxes, ha="center", va="bottom", fontsize=7.5, color="dimgray")
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def draw_run(csv_path: Path, picture_path: Path) -> None:
    """health.png of one run."""
    draw_health(picture_path, {csv_path.parent.name: read_scalars(csv_path)})


# ----------------------------------------------------------------------------------------------------------- command line


def compare_runs(folders: list[Path], output: Path) -> None:
    """Draw the runs of these folders over each other. Raises ValueError or OSError naming what does not fit; overwrites nothing."""
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
    parser.add_argument("run_folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders under logs/training")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="the picture, a new .png file")
    arguments = parser.parse_args()
    try:
        compare_runs(arguments.run_folders, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
