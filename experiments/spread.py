"""How far do runs of one recipe lie apart? Scores every run on the same prompts and shows median, worst and best.

    python train.py -m seed=0,1,2,3                     # the runs, one after another, each in its own folder
    python -m experiments.spread logs/training/RUN [RUN ...]        # their scores: seeds.json, seeds.md and seeds.png in results/

With the figures of `evaluate.evaluate`: what a run cost and its watchdog's verdict. Runs that differ in more than their seed, machine or
number format are refused. With `--add_to results/seeds.json` these runs join those of that file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from machine.paths import user_path
from method.choices import DEVICES, PRECISIONS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score finished runs of one recipe on the same prompts: seeds.json, .md and .png.")
    parser.add_argument("run_folders", nargs="+", type=user_path, metavar="RUN_FOLDER", help="folders under logs/training")
    parser.add_argument("--num_videos", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1, help="of the held-out prompts and of the videos' noise")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--output_dir", type=user_path, default=Path("results"))
    parser.add_argument("--add_to", type=user_path, metavar="SEEDS_JSON", help="keep the runs of this earlier seeds.json too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments(None)  # --help, and what cannot be read, needs none of what is loaded next: torch takes seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402

from evaluate import EvaluateConfig, evaluate  # noqa: E402
from experiments.pages import as_table  # noqa: E402
from judging.prompts import JUDGED_CODE  # noqa: E402
from machine.files import free_paths, require_writable  # noqa: E402
from machine.interruption import refusals_in_one_line  # noqa: E402
from machine.runtime import code_digest, describe_machine  # noqa: E402
from training.checkpoint import checkpoint_config, load_checkpoint  # noqa: E402
from training.resume import FINAL, describe_difference, settings_without  # noqa: E402
from training.run_log import panel_grid, read_scalars  # noqa: E402

NOT_OF_THE_RECIPE = ("seed", "log_dir", "run_name", "wandb", "device", "precision", "training.resume")
FIGURES = {  # name in the file: key of `evaluate`, title, and whether higher is better; None: near 1 is
    "frames_right": ("frames_right", "frames right", True),
    "one_class": ("one_class", "one class", True),
    "track_within_1px": ("track_within_1px", "track within 1 px", True),
    "direction_obeyed": ("direction_obeyed", "direction obeyed", True),
    "stroke_mass": ("stroke_mass_ratio", "stroke mass", None),
    "frechet": ("frechet_distance", "Frechet", False),
    "diversity": ("glyph_diversity", "glyph diversity", True),
}
EARLY = 0.2  # share of a run: its first readings of the fixed prompts are no worst readings


def score_runs(
    run_folders: list[Path], num_videos: int, seed: int, device: str, precision: str, output_dir: Path, add_to: Path | None = None,
) -> dict[str, Any]:
    """Score every run, write the files, return the content of seeds.json. Raises ValueError and OSError."""
    paths = [folder / FINAL for folder in run_folders]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no {FINAL}: give the folders of finished runs of train.py")
    if len(set(map(Path.resolve, paths))) < len(paths):
        raise ValueError("a run is named twice: give every folder once")
    require_writable(output_dir)
    checkpoints = [load_checkpoint(path, is_mapped=True) for path in paths]
    configs = [checkpoint_config(path, checkpoint) for path, checkpoint in zip(paths, checkpoints, strict=True)]
    recipe = settings_without(configs[0], NOT_OF_THE_RECIPE)
    for folder, config in zip(run_folders, configs, strict=True):
        if difference := describe_difference(recipe, settings_without(config, NOT_OF_THE_RECIPE)):
            raise ValueError(f"{folder} is of another recipe than {run_folders[0]} ({difference}): score them apart")
    facts = {"num_videos": num_videos, "prompt_seed": seed, "recipe": json.loads(json.dumps(recipe))}
    earlier = [] if add_to is None else earlier_runs(add_to, facts, {config.seed for config in configs})
    asked = EvaluateConfig(
        checkpoint=[str(path) for path in paths], num_videos=num_videos, seed=seed, device=device, precision=precision,
        output_dir=str(output_dir / "seeds_figures"),
    )
    real, *rows = evaluate(asked).values()
    runs = [
        {"seed": config.seed, **figures_of(row), **figures_of(row, "_ci"),
         **story_of(folder, checkpoint), "training_format": checkpoint.get("runtime", {}),
         **{name: row[name] for name in ("checkpoint_sha256", "precision", "code_sha256")}}
        for folder, config, checkpoint, row in zip(run_folders, configs, checkpoints, rows, strict=True)
    ]
    runs = sorted(earlier + runs, key=lambda run: run["seed"])
    table = {**facts, "machine": describe_machine(torch.get_num_threads()), "real": figures_of(real), "runs": runs}
    figures, text, picture = free_paths(output_dir, ["seeds.json", "seeds.md", "seeds.png"])
    figures.write_text(json.dumps(table, indent=1) + "\n")
    text.write_text(as_markdown(table))
    draw(picture, table)
    print(f"wrote {figures.name}, {text.name} and {picture.name} to {output_dir}")
    return table


def figures_of(row: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    """A row of `evaluate` under the names of this file."""
    return {name + suffix: row[key + suffix] for name, (key, _, _) in FIGURES.items() if key + suffix in row}


def earlier_runs(path: Path, facts: dict[str, Any], new_seeds: set[int]) -> list[dict[str, Any]]:
    """The runs of an earlier seeds.json that the new ones may join. Raises ValueError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        runs, other = table["runs"], [name for name, value in facts.items() if table[name] != value]
        twice, codes = new_seeds & {run["seed"] for run in runs}, {run["code_sha256"] for run in runs}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a seeds.json of this command ({type(error).__name__})") from None
    if other:
        raise ValueError(f"{path} differs from these runs in {', '.join(other)}: score them apart")
    if codes - {code_digest(*JUDGED_CODE)}:
        raise ValueError(f"{path} was scored by other code than this: score all its runs again, without --add_to")
    if twice:
        raise ValueError(f"{path} holds seed {min(twice)} already: leave that run out")
    return runs


def story_of(folder: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The minutes of all attempts of a run, its worst readings of the fixed prompts, its verdict."""
    attempts = [folder.parent / name for name in checkpoint["attempts"]] if "attempts" in checkpoint else [folder]
    logs = [read_scalars(path / "scalars.csv", with_seconds=True) for path in attempts if (path / "scalars.csv").is_file()]
    story: dict[str, Any] = {"minutes": round(sum(series["seconds"][1][-1] for series in logs) / 60, 1)}
    series = {name: tuple(map(np.concatenate, zip(*(log[name] for log in logs if name in log), strict=True))) for name in logs[-1]}
    if "frames_right" in series:
        steps, shares = series["frames_right"]
        _, mass = series["stroke_mass_ratio"]
        is_late = steps >= EARLY * series["seconds"][0][-1]
        story |= {"worst_reading_frames_right": float(shares[is_late].min()), "worst_reading_stroke_mass": float(mass[is_late].max())}
    verdict = folder / "verdict.txt"
    return story | ({"verdict": verdict.read_text(encoding="utf-8").strip()} if verdict.is_file() else {})


def spread(table: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Median, worst and best of a figure over the runs."""
    values, is_better = [run[name] for run in table["runs"] if name in run], FIGURES[name][2]
    order = sorted(values, key=lambda value: abs(value - 1) if is_better is None else -value if is_better else value)
    return median(values), order[-1], order[0]


def as_markdown(table: dict[str, Any]) -> str:
    """The runs and their spread, as a table."""
    names = common_figures(table)
    rows = [[str(run["seed"]), *(f"{run[name]:.3f}" for name in names), str(run["minutes"])] for run in table["runs"]]
    for title, values in zip(("median", "worst", "best"), zip(*(spread(table, name) for name in names), strict=True), strict=True):
        rows.append([f"**{title}**", *(f"{value:.3f}" for value in values), ""])
    rows.append(["real videos", *(f"{table['real'][name]:.3f}" if name in table["real"] else "-" for name in names), ""])
    head = f"{table['num_videos']} videos of every run, held-out prompts of seed {table['prompt_seed']}.\n\n"
    return head + as_table(["seed", *(FIGURES[name][1] for name in names), "minutes"], rows)


def common_figures(table: dict[str, Any]) -> list[str]:
    """Those that every run has."""
    return [name for name in FIGURES if all(name in run for run in table["runs"])]


def draw(path: Path, table: dict[str, Any]) -> None:
    """A panel a figure: a dot a run with its interval, a line for the median, a dotted line for real video."""
    names = common_figures(table)
    figure, axes = panel_grid(len(names), len(names), 2.1, 3)
    for axis, name in zip(axes, names, strict=True):
        values = [run[name] for run in table["runs"]]
        for index, run in enumerate(table["runs"]):
            if f"{name}_ci" in run:
                axis.plot([index, index], run[f"{name}_ci"], color="tab:blue", alpha=0.4)
        axis.plot(range(len(values)), values, "o", color="tab:blue", markersize=4)
        axis.axhline(median(values), color="tab:orange", linewidth=1)
        if name in table["real"]:
            axis.axhline(table["real"][name], color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(values)), [str(run["seed"]) for run in table["runs"]], fontsize=7)
        axis.set_title(FIGURES[name][1], fontsize=9)
        axis.set_xlabel("seed", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments(None)
    with refusals_in_one_line():
        table = score_runs(**vars(arguments))
    print(as_markdown(table))


if __name__ == "__main__":
    main()
