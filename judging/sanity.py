"""Which fault moves which figure: real videos of held-out digits, made worse in known ways, through the whole panel.

`python evaluate.py sanity=true` writes the matrix as sanity.md and sanity.json. A figure has moved if it changed by at least its
`SMALLEST_CHANGE` and its 95 % interval no longer meets that of the real videos.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from judging.corruptions import CORRUPTIONS, corrupt
from judging.digit_judge import read_videos
from judging.metrics import facts_of_prompts, opposite
from judging.panel import Panel
from machine.seeds import Purpose
from moving_mnist import NUM_CLASSES, DatasetConfig, MovingMNISTBatch, MovingMNISTGenerator

SMALLEST_CHANGE = {
    "frames_right": 0.05, "videos_right": 0.05, "one_class": 0.05, "moving": 0.05, "track_within_1px": 0.05, "mean_track_error": 0.3,
    "direction_obeyed": 0.05, "stroke_mass_ratio": 0.05, "sharpness_ratio": 0.05, "frechet_distance": 1.0, "density": 0.1,
    "coverage": 0.05, "glyph_diversity": 0.1, "glyph_frechet": 0.5, "frames_right_slope": 0.01, "stroke_mass_ratio_slope": 0.01,
}
MUST_MOVE = {  # +1 up, -1 down
    "wrong digits": {"frames_right": -1, "videos_right": -1},
    "wrong directions": {"direction_obeyed": -1},
    "switched": {"one_class": -1},
    "shuffled": {"track_within_1px": -1, "mean_track_error": 1, "frechet_distance": 1},
    "frozen": {"moving": -1, "frechet_distance": 1},
    "softened": {"sharpness_ratio": -1},
    "blurred": {"sharpness_ratio": -1, "frechet_distance": 1},
    "brightened": {"stroke_mass_ratio": 1},
    "faint": {"stroke_mass_ratio": -1},
    "collapsed": {"coverage": -1},
    "fading": {"stroke_mass_ratio_slope": -1},
    "flickering": {"one_class": -1, "stroke_mass_ratio": -1},
    "striped": {"sharpness_ratio": -1, "stroke_mass_ratio": 1, "frechet_distance": 1},
    "one digit a class": {"glyph_diversity": -1, "glyph_frechet": 1},
    "class means": {"glyph_diversity": -1, "glyph_frechet": 1},
}
GLYPH_FAULTS = {
    "one digit a class": "One held-out digit for every class, moving exactly.",
    "class means": "The mean digit of every class, moving exactly.",
}
IMITATION_KEEPS = ("glyph_diversity", "glyph_frechet", "frechet_distance", "coverage", "frames_right", "stroke_mass_ratio")
REAL_LIMITS = {  # what real videos of held-out digits must read, least and most
    "frames_right": (0.93, 1.0), "videos_right": (0.93, 1.0), "one_class": (0.85, 1.0), "moving": (1.0, 1.0),
    "track_within_1px": (0.99, 1.0), "mean_track_error": (0.0, 0.1), "direction_obeyed": (0.97, 1.0), "stroke_mass_ratio": (0.9, 1.1),
    "sharpness_ratio": (0.9, 1.1), "density": (0.8, 1.2), "coverage": (0.85, 1.0), "glyph_diversity": (0.85, 1.15),
    "frames_right_slope": (-0.01, 0.01), "stroke_mass_ratio_slope": (-0.01, 0.01),
}


def judge_faults(panel: Panel, batch: MovingMNISTBatch, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The figures of real videos under "real", of the same with every fault of `MUST_MOVE`, and of real videos of training digits under
    "imitation"."""
    video, held_out = batch.video, MovingMNISTGenerator(panel.config, "test")
    digits, directions = facts_of_prompts(batch.captions)
    readings = read_videos(panel.judge, video)
    wrong_prompts = {
        "wrong digits": ((digits + 1) % NUM_CLASSES, directions),
        "wrong directions": (digits, opposite(directions)),
    }
    of_class = [held_out.sprites[held_out.digit_set.labels == digit] for digit in range(NUM_CLASSES)]
    glyphs = {
        "one digit a class": torch.stack([sprites[0] for sprites in of_class]),
        "class means": torch.stack([sprites.mean(dim=0) for sprites in of_class]),
    }
    figures = {"real": panel.judge_readings(readings, digits, directions, seed)}
    for fault in MUST_MOVE:
        if fault in wrong_prompts:
            figures[fault] = panel.judge_readings(readings, *wrong_prompts[fault], seed)
        else:
            worse = held_out.render(glyphs[fault][batch.digits], batch.track) if fault in glyphs else corrupt(video, fault, seed)
            figures[fault] = panel.judge_readings(read_videos(panel.judge, worse), digits, directions, seed)
    seen = MovingMNISTGenerator(panel.config, "train", purpose=Purpose.IMITATION).sample(seed + 1, range(len(video)), video.shape[1])
    figures["imitation"] = panel.judge_readings(read_videos(panel.judge, seen.video), *facts_of_prompts(seen.captions), seed)
    return figures


def moved(figures: dict[str, Any], real: dict[str, Any], name: str) -> int:
    """+1 if the figure rose against the real videos', -1 if it fell, 0 if it stayed or is absent."""
    if name not in figures:
        return 0
    change = figures[name] - real[name]
    (low, high), (real_low, real_high) = figures[f"{name}_ci"], real[f"{name}_ci"]
    if abs(change) < SMALLEST_CHANGE[name] or (low <= real_high and real_low <= high):
        return 0
    return 1 if change > 0 else -1


def find_failures(figures: dict[str, dict[str, Any]]) -> list[str]:
    """One line for every figure of real videos outside `REAL_LIMITS`, and for every one that did not move as it must."""
    real = figures["real"]
    failures = [
        f"{name} is {real[name]:.3f} on real videos: expected {low} to {high}"
        for name, (low, high) in REAL_LIMITS.items() if not low <= real[name] <= high
    ]
    wanted = {1: "a rise", -1: "a fall", 0: "no change"}
    for fault, must in {**MUST_MOVE, "imitation": dict.fromkeys(IMITATION_KEEPS, 0)}.items():
        failures += [
            f"{name} is {figures[fault][name]:.3f} on {fault} videos, {real[name]:.3f} on real ones: expected {wanted[sign]}"
            for name, sign in must.items() if moved(figures[fault], real, name) != sign
        ]
    return failures


def as_markdown(figures: dict[str, dict[str, Any]], title: str) -> str:
    """The matrix: a row a fault, a column a figure; an arrow where it moved, bold where it had to."""
    lines = [
        f"# {title}", "", "An arrow: the figure moved (95 % intervals apart, and by enough). Bold: this fault must move it. "
        "`python evaluate.py sanity=true` makes this file; `sanity.py` says what is enough.", "",
        "| | " + " | ".join(name.replace("_", " ") for name in SMALLEST_CHANGE) + " |", "|---" * (len(SMALLEST_CHANGE) + 1) + "|",
    ]
    for fault, row in figures.items():
        cells = []
        for name in SMALLEST_CHANGE:
            arrow = {0: "", 1: " ↑", -1: " ↓"}[moved(row, figures["real"], name)]
            cell = f"{row[name]:.3f}{arrow}" if name in row else "-"
            cells.append(f"**{cell}**" if name in MUST_MOVE.get(fault, {}) else cell)
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    lines += ["", "The faults, of which the first two change the prompt and not the video:", ""]
    described = CORRUPTIONS | GLYPH_FAULTS
    lines += [f"- {fault}: {described[fault]}" for fault in MUST_MOVE if fault in described]
    lines += ["", "imitation: real videos of the networks' training digits. Perfect imitation must move none of "
              f"{', '.join(name.replace('_', ' ') for name in IMITATION_KEEPS)}."]
    return "\n".join(lines) + "\n"


def check_sanity(folder: Path, num_videos: int, num_frames: int, seed: int) -> None:
    """Print and write the matrix for videos of one digit. Then raises ValueError naming every figure that failed."""
    config = DatasetConfig()
    panel = Panel(config, num_videos, num_frames, seed)
    if panel.reference is None:
        raise ValueError(f"num_videos is {num_videos}: too few for a distribution, expected 256 or so")
    batch = MovingMNISTGenerator(config, "test", purpose=Purpose.EVALUATION).sample(seed, range(num_videos), num_frames)
    figures = judge_faults(panel, batch, seed)
    folder.mkdir(parents=True, exist_ok=True)
    videos = f"{num_videos} real videos of {num_frames} frames, held-out digits, seed {seed}"
    page = as_markdown(figures, f"Which fault moves which figure ({videos}; {panel.judge.describe()})")
    (folder / "sanity.md").write_text(page)
    print(page)
    kept = {fault: {name: value for name, value in row.items() if "_by_" not in name} for fault, row in figures.items()}
    (folder / "sanity.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(f"wrote sanity.md and sanity.json to {folder}")
    failures = find_failures(figures)
    if failures:
        raise ValueError("; ".join(failures))
    print(f"all {sum(len(must) for must in MUST_MOVE.values())} figures that had to move did, those that must not did not, and real videos "
          "are where they must be")
