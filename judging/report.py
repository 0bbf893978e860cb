"""Figures to read: tables for a terminal of 184 columns, and curves by frame. Figures are those of `panel.Panel`, under NAME and NAME_ci,
and those of `COST_FIGURES`, which sampled rows have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.run_log import panel_grid

NAME_WIDTH, CELL_WIDTH = 37, 21
SLOPE_WIDTH = 24  # with signs
PROMPT_FIGURES = {
    "frames_right": "frames right", "videos_right": "videos right", "one_class": "one class in all",
    "track_within_1px": "track within 1 px", "direction_obeyed": "direction obeyed", "mean_track_error": "off track, px",
}
LOOK_FIGURES = {
    "stroke_mass_ratio": "stroke mass", "sharpness_ratio": "sharpness", "frechet_distance": "Frechet (our net)",
    "coverage": "coverage", "glyph_diversity": "glyph diversity", "glyph_frechet": "glyph Frechet",
}
COUNT_FIGURES = {
    "count_right": "count right", "videos_right": "videos right", "frames_right": "frames right", "frames_readable": "frames readable",
    "stroke_mass_ratio": "stroke mass", "sharpness_ratio": "sharpness",
}
DRIFT_FIGURES = {
    "frames_right_slope": "frames right", "class_kept_slope": "class kept", "frames_within_1px_slope": "within 1 px",
    "mean_track_error_slope": "off track, px", "stroke_mass_ratio_slope": "stroke mass", "sharpness_ratio_slope": "sharpness",
}
COST_FIGURES = {"evaluations_a_block": "evaluations", "frames_per_second": "frames/s"}  # the first as denoising + cache
COST_WIDTHS = {"evaluations_a_block": 12, "frames_per_second": 9}
CURVES = {
    "frames_right": "frames right", "frames_readable": "frames readable", "class_kept": "frames of the video's class",
    "frames_within_1px": "frames within 1 px of the track", "mean_track_error": "distance from the track, pixels",
    "stroke_mass_ratio": "stroke mass over real", "sharpness_ratio": "sharpness over real", "motion": "motion over real",
}


def format_line(name: str, cells: dict[str, str]) -> str:
    """One line of a table, such as its titles by the figure's key."""
    widths = {key: COST_WIDTHS.get(key, SLOPE_WIDTH if key.endswith("_slope") else CELL_WIDTH) for key in cells}
    return f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:>{widths[key]}}" for key, cell in cells.items())


def format_row(name: str, figures: dict[str, Any], titles: dict[str, str]) -> str:
    """One line of figures under these titles."""
    return format_line(name, {key: format_cell(figures, key) for key in titles})


def format_cell(figures: dict[str, Any], key: str) -> str:
    """A figure, with its interval if it has one; a dash if it is missing, such as the direction where no prompt names one."""
    if key not in figures:
        return "-"
    if key == "evaluations_a_block":
        return f"{figures[key]} + {figures['cache_evaluations_a_block']}"
    if f"{key}_ci" not in figures:
        return _short(figures[key])
    low, high = figures[f"{key}_ci"]
    return f"{_short(figures[key])} [{_short(low)}, {_short(high)}]"


def _short(value: float) -> str:
    """Three decimals, fewer where the number is long: at most 6 characters up to 9999."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def format_table(first: str, rows: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """A table of the rows that have any of these figures, cost aside; empty if none has."""
    wanted = titles.keys() - COST_FIGURES.keys()
    lines = [format_row(name, figures, titles) for name, figures in rows.items() if wanted & figures.keys()]
    return "\n".join([format_line(first, titles), *lines]) if lines else ""


def draw_curves(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """One panel per measure that exists by frame, over the frame's index: a line a row, its 95 % interval as a band."""
    names = [name for name in CURVES if any(f"{name}_by_frame" in figures for figures in rows.values())]
    figure, axes = panel_grid(len(names), 3, 4.6, 3)
    for axis, name in zip(axes, names, strict=True):
        for number, (row, figures) in enumerate(rows.items()):
            if f"{name}_by_frame" in figures:
                values, color = figures[f"{name}_by_frame"], f"C{number % 10}"
                axis.plot(values, color=color, linewidth=1.4, marker="." if len(values) < 4 else None, label=row)
                axis.fill_between(range(len(values)), *zip(*figures[f"{name}_by_frame_ci"], strict=True), color=color, alpha=0.2)
        axis.set_title(CURVES[name], fontsize=9)
        axis.set_xlabel("frame", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
