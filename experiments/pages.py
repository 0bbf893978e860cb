"""The tables of README.md and docs/, made from the files in results/: `python -m experiments.pages`. A page marks the place of a table by
`<!-- table: NAME -->` and `<!-- end -->`; a test fails if a page and its file differ."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from judging.report import format_cell
from machine.paths import REPOSITORY
from method.choices import SWITCHES

MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROW_TITLES = {  # in results/evaluation.json: in the pages
    "real": "real, held-out digits", "guided Euler, 4 steps, guidance 2.5": "start, guided, 4 steps",
    "guided Euler, 2 steps, guidance 2.5": "start, guided, 2 steps", "no guidance, 4 steps": "start, no guidance, 4 steps",
    "student, 4 steps": "**student, 4 steps**",
}
COST = {"evaluations_a_block": "evaluations a block"}
FIGURES = {
    "frames_right": "frames right", "one_class": "one class in all 21", "track_within_1px": "track within 1 px",
    "direction_obeyed": "direction", "stroke_mass_ratio": "stroke mass", "frechet_distance": "Frechet (our net)",
    "glyph_diversity": "glyph diversity", "glyph_frechet": "glyph Frechet",
}
FEW_FIGURES = {
    **{name: FIGURES[name] for name in ("frames_right", "one_class", "track_within_1px", "direction_obeyed", "stroke_mass_ratio")},
    "coverage": "coverage",
}
OWN_FIGURES = {"frechet_distance": "Frechet (pixels)", "coverage": "coverage", "diversity": "diversity", "motion": "motion over real"}
SEED_FIGURES = {  # of results/seeds.json
    "frames_right": "frames right", "one_class": "one class", "track_within_1px": "track", "direction_obeyed": "direction",
    "stroke_mass": "stroke mass", "frechet": "Frechet", "diversity": "glyph diversity", "worst_reading_frames_right": "worst reading",
}


def read(results: Path, name: str) -> Any:
    return json.loads((results / name).read_text(encoding="utf-8"))


def as_table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)) + "\n"


def cells(row: dict[str, Any], *keys: str, with_intervals: bool = False) -> list[str]:
    """Three decimals below 10, fewer above; a dash for a figure that the row lacks."""
    shown = row if with_intervals else {key: value for key, value in row.items() if not key.endswith("_ci")}
    return [format_cell(shown, key) for key in keys]


def figure_table(first: str, rows: dict[str, dict[str, Any]], figures: dict[str, str], with_intervals: bool = False) -> str:
    """A line a row; figures: the title of each column by its key in the rows."""
    lines = [[name, *cells(row, *figures, with_intervals=with_intervals)] for name, row in rows.items()]
    return as_table([first, *figures.values()], lines)


def drift(results: Path) -> str:
    """Streams of 630 frames: the first 21 frames beside all of them."""
    rows = []
    for name, row in read(results, "drift_630/drift.json").items():
        first, whole = row["first_21"], row["segments"][0]
        rows.append([
            name, *cells(row, *COST), *cells(first, "frames_right"), *cells(whole, "frames_right"), f"{first['stroke_mass_ratio']:.2f}",
            f"{whole['stroke_mass_ratio']:.2f}", *cells(whole, "moving", "track_within_1px"), f"{whole['mean_speed']:.2f}",
        ])
    return as_table(["", *COST.values(), "frames right, 1 to 21", "frames right, 1 to 630", "stroke mass, 1 to 21", "1 to 630",
                     "windows that move", "track within 1 px", "pixels a frame"], rows)


def continuation(results: Path) -> str:
    """How videos that continue real ones keep digit and style."""
    found = read(results, "long_video/continue.json")
    rows = {name: (str(row.get("given_frames", 3)), row["continued"]) for name, row in found.items()}
    lines = []
    for name, (given, row) in (rows | {"real video": ("-", list(found.values())[-1]["real"])}).items():
        fifths = row["stroke_mass_by_fifth"]
        error = f"{row['first_error_median']:.3f} px" if "first_error_median" in row else "-"  # earlier rows lack it
        lines.append([
            name, given, *cells(row, "kept", with_intervals=True),
            *cells(row, "right_in_most_frames", "right_in_every_frame", "stroke_mass_kept"),
            *(f"{fifth:.2f}" for fifth in (fifths[0], fifths[len(fifths) // 2], fifths[-1])),
            *cells(row, "track_within_1px", "direction_obeyed"), error,
        ])
    return as_table(["continued by", "frames given", "digit and style", "digit", "digit in every frame", "style", "least", "middle", "most",
                     "track within 1 px", "direction", "first centre off by"], lines)


def switch(results: Path) -> str:
    """Prompt switches in a stream: how soon the new digit shows, and whether the motion continues."""
    rows = []
    for name, found in read(results, "long_video/switch.json").items():
        for how in SWITCHES:
            one = found[how]
            shown = "never" if one["frames_until_shown"] is None else str(one["frames_until_shown"])
            rows.append([name, how, shown, *cells(one, "share_of_new_at_end"), f"{one['path_error_median']:.2f} px",
                         *cells(one, "path_error_smooth_share")])
        one = found["recache"]
        rows.append([name, "no switch", "-", "-", f"{one['path_error_without_median']:.2f} px",
                     *cells(one, "path_error_without_smooth_share")])
    return as_table(["network", "switch", "frames until 90 % show the new digit", "new digit 21 frames later",
                     "first centre, distance from the continued path, median", "within 3 px"], rows)


def public_code(results: Path) -> str:
    """Frames/s beside the public code, and the ratio to it."""
    rows = []
    for part in read(results, "public_code.json")["public"]:
        speeds = part["frames_per_second"]
        base = speeds["public code"]
        others = [f"{speeds[key]:.1f} ({speeds[key] / base:.2f} x)" for key in ("public code, compiled", "student", "compiled")]
        size = f"patches of {part['patch_size']} pixels ({part['parameters']['student'] / 1e6:.2f} M parameters)"
        rows.append([size, f"{base:.1f}", *others])
    return as_table(["frames/s, medians", "public code", "the same, compiled", "ours", "ours, compiled"], rows)


def seeds(results: Path) -> str:
    """Default runs that differ in their seed alone: each, then median and worst."""
    runs = read(results, "seeds.json")["runs"]
    columns = {name: [run[name] for run in runs] for name in SEED_FIGURES if all(name in run for run in runs)}
    badness = {"stroke_mass": lambda value: abs(value - 1), "frechet": lambda value: value}
    rows = {
        **{str(run["seed"]): run for run in runs}, "**median**": {name: median(values) for name, values in columns.items()},
        "**worst**": {name: max(values, key=badness.get(name, lambda value: -value)) for name, values in columns.items()},
    }
    return figure_table("seed", rows, {name: SEED_FIGURES[name] for name in columns})


def few_steps(results: Path) -> str:
    """The student in its four steps, in two and in one."""
    rows = {"real": read(results, "faq/frames_21.json")["real"]}
    for name in ("frames_21", "steps_2", "steps_1"):
        rows |= {title: row for title, row in read(results, f"faq/{name}.json").items() if title.startswith("student")}
    names = {**FEW_FIGURES, "glyph_diversity": "glyph diversity"}
    lines = [[title, str(row.get("num_videos", "-")), *cells(row, *names)] for title, row in rows.items()]
    return as_table(["21 frames", "videos", *names.values()], lines)


def evaluation(results: Path) -> dict[str, dict[str, Any]]:
    return {ROW_TITLES.get(name, name): row for name, row in read(results, "evaluation.json").items()}


def context_noise(results: Path) -> dict[str, dict[str, Any]]:
    """The student, trained with clean context, where finished blocks enter the cache at other timesteps."""
    found = read(results, "faq/frames_21.json")
    return {noise: found[f"{name}, 4 steps"] for name, noise in (("student", "0"), ("noise_50", "50"), ("noise_200", "200"))}


TABLES: dict[str, Callable[[Path], str]] = {
    "evaluation": lambda results: figure_table("sampler", evaluation(results), COST | FIGURES),
    "evaluation_with_intervals": lambda results: figure_table("sampler", evaluation(results), COST | FIGURES, with_intervals=True),
    "frames_84": lambda results: figure_table(
        "64 videos of 84 frames", read(results, "faq/frames_84.json"), FEW_FIGURES | {"one_class": "one class in all 84"}
    ),
    "context_noise": lambda results: figure_table("context_noise", context_noise(results), FEW_FIGURES),
    "own_videos": lambda results: figure_table(
        "192 videos of 9 frames", read(results, "own_videos.json"), COST | OWN_FIGURES, with_intervals=True
    ),
    "seeds": seeds, "drift": drift, "continuation": continuation, "switch": switch, "public_code": public_code, "few_steps": few_steps,
}


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def filled(text: str, results: Path) -> str:
    """A page's text with every marked table made again. Raises ValueError for a name that is no table."""

    def make(match: re.Match[str]) -> str:
        if match.group(2) not in TABLES:
            raise ValueError(f"a page asks for the table {match.group(2)}: expected one of {', '.join(TABLES)}")
        return match.group(1) + TABLES[match.group(2)](results) + match.group(3)

    return MARK.sub(make, text)


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text, REPOSITORY / "results")
        except (ValueError, OSError, KeyError) as error:
            sys.exit(f"error: {page.name}: {error}")
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
