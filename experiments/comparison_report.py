"""The table of a comparison as json, Markdown and a picture, with a dash for what is missing.

`table` is that of `comparison.Comparison.table`; its "rows" have figures by row, block size and seed, both "0" where a row is not trained.
"""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from experiments.comparison_settings import REAL, ROWS
from experiments.pages import as_table
from judging.report import format_cell

COLUMNS = {
    "frames_right": "frames right", "videos_right": "videos right", "one_class": "one class", "track_within_1px": "track within 1 px",
    "direction_obeyed": "direction", "stroke_mass_ratio": "stroke mass", "sharpness_ratio": "sharpness",
    "frechet_distance": "Frechet (our net)", "density": "density", "coverage": "coverage",
    "frames_right_slope": "drift of frames right, a block", "frames_per_second": "frames/s",
}
DRAWN = ("frames_right", "frechet_distance", "track_within_1px", "frames_per_second")
ON_LOG_SCALE = ("frechet_distance", "frames_per_second")


def write_table(folder: Path, name: str, table: dict[str, Any]) -> None:
    """NAME.json, NAME.md and NAME.png in `folder`; replaces those of an earlier call, see `put_by`."""
    (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")
    (folder / f"{name}.md").write_text(as_markdown(table))
    draw_table(folder / f"{name}.png", table)


def read_table(folder: Path, name: str) -> dict[str, Any] | None:
    """The table in `folder`, if there is one. Raises ValueError for a file that holds anything else."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text())
        scored = all(type(row) is dict and "sampler" in row for place, row in results_of(table).items() if place[0] != REAL)
        if not scored or not all(type(training["settings"]) is dict for training in table["trainings"]):
            raise ValueError("options or settings of another kind")
        return table
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of a comparison ({error!r}): move it away or choose another name") from error


def results_of(table: dict[str, Any] | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The figures of a table by row, block size and seed."""
    rows = {} if table is None else table["rows"]
    return {(row, block, seed): figures for row, blocks in rows.items() for block, seeds in blocks.items()
            for seed, figures in seeds.items()}


def put_by(folder: Path, name: str, earlier: dict[str, Any] | None, shown: set[tuple[str, str, str]]) -> None:
    """Copy the earlier table of `folder` if it has results that the next one will not show. shown: row, block size and seed of those that
    it will."""
    lost = [place for place in results_of(earlier) if place[0] != REAL and place not in shown]
    if not lost:
        return
    kept = next(f"{name}-{number}" for number in count(1) if not (folder / f"{name}-{number}.json").exists())
    for path in (folder / f"{name}.{suffix}" for suffix in ("md", "png", "json")):
        if path.exists():
            shutil.copy(path, path.with_stem(kept))
    print(f"the earlier table has {len(lost)} results that this one will not show: it stays as {kept}.json", flush=True)


def seeds_of(table: dict[str, Any], row: str, block: int) -> list[dict[str, Any]]:
    """The figures of every scored seed of a row: of trainings at this block size, or of a row that is not trained."""
    return list(table["rows"][row].get(str(block) if ROWS[row].paradigm else "0", {}).values())


def over_seeds(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one seed as they are; of several the mean, with the range in place of the interval."""
    if len(seeds) == 1:
        return seeds[0]
    figures: dict[str, Any] = {}
    for key in COLUMNS:
        if values := [seed[key] for seed in seeds if key in seed]:
            figures |= {key: mean(values), f"{key}_ci": [min(values), max(values)]}
    return figures


def as_markdown(table: dict[str, Any]) -> str:
    """The tables by block size, the trainings, and their settings."""
    settings = table["settings"]
    num_seeds, cells = len(settings["seeds"]), [(row, block) for block in settings["blocks"] for row in table["rows"]]
    found = sum(len(seeds_of(table, row, block)) for row, block in cells)
    expected = sum(num_seeds if ROWS[row].paradigm else 1 for row, _ in cells)
    interval = "95 % interval over the videos" if num_seeds == 1 else f"the range over {num_seeds} trainings"
    lines = [f"# Comparison of paradigms: {settings['name']}", ""]
    if found != expected:
        lines += [f"**Not complete**: {found} of {expected} results are there; a dash is a missing one.", ""]
    lines += [f"- {label} failed: {reason}" for label, reason in table["failed"].items()] + [""] * bool(table["failed"])
    for block in settings["blocks"]:
        title = "Frame-wise: blocks of 1 frame" if block == 1 else f"Chunk-wise: blocks of {block} frames"
        lines += [f"## {title}", "", _figures_table(table, block)]
    chosen = dict.fromkeys(f"{each['paradigm']}, block {each['block']}: {each['chosen'] or 'as it is'}" for each in table["trainings"])
    how_chosen = (
        f"Every training chose among as many candidates, on seed {settings['selection_seed']} and prompts that are not scored here "
        f"({settings['name']}_candidates.json): {'; '.join(chosen)}."
    )
    if not any(settings["candidates"].values()):
        how_chosen = "Settings are those of configs/training/ and of the comparison; nothing was chosen."
    lines += [
        f"{settings['num_videos']} videos of {settings['num_frames']} frames, held-out prompts, seed {settings['score_seed']}; in "
        f"brackets the {interval}. Frames/s: of sampling alone, in batches of {settings['batch_size']}, with {settings['processes']} jobs "
        f"at a time, on {'; '.join(table['machines']) or 'no machine yet'}; device {settings['device']}, precision "
        f"{settings['precision']}. Evaluations a block: of the network, while denoising + to write the cache. What the figures mean: "
        "docs/results.md. Drift: change of frames right per 3 frames, whatever the blocks.",
        "", "## Trainings", "",
        f"All start from `{Path(settings['teacher']).name}` (sha256 {settings['teacher_sha256']}) and spend the FLOPs of "
        f"{settings['budget']} steps of Self-Forcing with DMD at their block size, counted over whole cycles of generator and critic "
        "updates (matrix products and attention; the critic's warm-up costs less and counts as the other steps). Minutes are of the "
        f"training steps; learning rate and guidance are the training's. {how_chosen}", "",
        _trainings_table(table),
    ]
    return "\n".join(lines)


def _figures_table(table: dict[str, Any], block: int) -> str:
    lines = []
    for row in table["rows"]:
        seeds, num_seeds = seeds_of(table, row, block), len(table["settings"]["seeds"])
        first = seeds[0] if seeds else {}
        partial = f" ({len(seeds)} of {num_seeds} seeds)" if ROWS[row].paradigm and 0 < len(seeds) < num_seeds else ""
        lines.append([
            ROWS[row].title + partial, first.get("sampler", "-"), format_cell(first, "evaluations_a_block"),
            *(format_cell(over_seeds(seeds), key) for key in COLUMNS),
        ])
    return as_table(["", "sampled in", "evaluations a block", *COLUMNS.values()], lines)


def _trainings_table(table: dict[str, Any]) -> str:
    titles = ["training", "block", "seed", "GFLOP a step", "steps", "TFLOP", "minutes", "batch", "learning rate", "guidance", "asked for"]
    return as_table(titles, [
        [
            each["paradigm"], str(each["block"]), str(each["seed"]), f"{each['gflops_per_step']:.1f}", str(each["num_steps"]),
            f"{each['total_tflops']:.2f}", f"{each['minutes']:.1f}" if each["is_done"] else "-", str(each["batch_size"]),
            f"{each['lr']:g}", f"{each['guidance']:g}", f"`{' '.join(each['overrides'])}`",
        ]
        for each in table["trainings"]
    ])


def draw_table(path: Path, table: dict[str, Any]) -> None:
    """One panel per figure of DRAWN: a line a row, a point with its interval for each block size."""
    rows = list(table["rows"])
    figure = Figure(figsize=(4 * len(DRAWN), 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(DRAWN), sharey=True)
    blocks = table["settings"]["blocks"]
    for axis, key in zip(axes, DRAWN, strict=True):
        for number, block in enumerate(blocks):
            offset = 0.3 * (number - (len(blocks) - 1) / 2)
            for place, row in enumerate(rows):
                figures, is_trained = over_seeds(seeds_of(table, row, block)), ROWS[row].paradigm is not None
                if key not in figures or not (is_trained or number == 0):
                    continue
                value = figures[key]
                low, high = figures.get(f"{key}_ci", (value, value))
                axis.errorbar(
                    value, place + (offset if is_trained else 0), xerr=[[max(value - low, 0)], [max(high - value, 0)]],
                    fmt="o" if is_trained else "D", color=f"C{number}" if is_trained else "0.3", capsize=2, markersize=5,
                )
        axis.set_title(COLUMNS[key], fontsize=10)
        axis.set_yticks(range(len(rows)), [ROWS[row].title for row in rows], fontsize=9)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(alpha=0.3)
        if key in ON_LOG_SCALE and axis.has_data():
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
        elif key not in ON_LOG_SCALE:
            axis.set_xlim(-0.03, 1.03)
    for number, block in enumerate(blocks):
        axes[0].plot([], [], "o", color=f"C{number}", label=f"{'frame-wise' if block == 1 else 'chunk-wise'} ({block})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(blocks), fontsize=9)
    figure.savefig(path, dpi=110)
