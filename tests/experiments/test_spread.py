"""Runs of one recipe are scored together, and their spread is shown; runs of two recipes are not mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import spread as spread_module
from experiments.spread import FIGURES, as_markdown, score_runs, spread
from training.checkpoint import save_checkpoint
from training.config import Config, SelfForcingConfig, config_to_dict

READ = {0: 0.98, 1: 0.95, 2: 0.97}  # frames right, by seed


def make_run(root: Path, seed: int, **changes: object) -> Path:
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True)
    config = Config(seed=seed, training=replace(SelfForcingConfig(), **changes))
    save_checkpoint(folder / "checkpoint_final.pt", {
        "step": 5, "training_type": "dmd2", "generator_state_dict": {}, "optimizer_state_dict": {}, "prompts_drawn": {},
        "text_encoder_state_dict": {}, "config": config_to_dict(config), "attempts": [folder.name],
        "runtime": {"device": "cpu", "precision": "float32"},
    })
    rows = ["step,seconds,frames_right,stroke_mass_ratio", "0,10,0.4,0.5", "2,60,,", "4,90,0.9,1.2"]
    (folder / "scalars.csv").write_text("\n".join(rows) + "\n")
    (folder / "verdict.txt").write_text("verdict: no collapse\n")
    return folder


@pytest.fixture
def judged(monkeypatch):
    """Every checkpoint reads as its seed says."""

    def evaluate(asked):
        rows = {"real": {key: 1.0 for key, _, _ in FIGURES.values()}}
        for path in asked.checkpoint:
            seed = int(Path(path).parent.name.removeprefix("seed"))
            figures = {key: READ[seed] for key, _, _ in FIGURES.values()}
            rows[path] = {**figures, "frames_right_ci": [0.9, 1.0], "checkpoint_sha256": "x", "precision": "float32", "code_sha256": "y"}
        return rows

    monkeypatch.setattr(spread_module, "evaluate", evaluate)
    monkeypatch.setattr(spread_module, "code_digest", lambda *names: "y")


def test_the_spread_is_median_worst_and_best_and_every_run_tells_its_story(judged, tmp_path):
    folders = [make_run(tmp_path / "runs", seed) for seed in READ]
    table = score_runs(folders, 8, 1, "cpu", "float32", tmp_path / "results")
    assert json.loads((tmp_path / "results" / "seeds.json").read_text()) == table
    assert [run["seed"] for run in table["runs"]] == [0, 1, 2]
    assert table["runs"][1] | {"minutes": 1.5, "verdict": "verdict: no collapse", "worst_reading_frames_right": 0.9} == table["runs"][1]
    assert spread(table, "frames_right") == (0.97, 0.95, 0.98)
    assert spread(table, "stroke_mass") == (0.97, 0.95, 0.98)  # nearest to 1 is best
    assert spread(table, "frechet") == (0.97, 0.98, 0.95)  # lower is better
    assert "| **worst** | 0.950 |" in as_markdown(table) and (tmp_path / "results" / "seeds.png").stat().st_size > 1000
    score_runs(folders, 8, 1, "cpu", "float32", tmp_path / "results")
    assert (tmp_path / "results" / "seeds_2.json").exists()  # nothing was overwritten


def test_other_recipes_and_unfinished_runs_are_refused(judged, tmp_path):
    folders = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, lr=1e-3)]
    with pytest.raises(ValueError, match=r"b/seed1 is of another recipe than .*training.lr 0.0003, now 0.001"):
        score_runs(folders, 8, 1, "cpu", "float32", tmp_path / "results")
    with pytest.raises(ValueError, match="named twice"):
        score_runs(folders[:1] * 2, 8, 1, "cpu", "float32", tmp_path / "results")
    with pytest.raises(ValueError, match="holds no checkpoint_final.pt: give the folders of finished runs"):
        score_runs([tmp_path], 8, 1, "cpu", "float32", tmp_path / "results")


def test_runs_join_those_of_an_earlier_table_if_nothing_but_their_seed_differs(judged, tmp_path):
    first, second, third = (make_run(tmp_path / "runs", seed) for seed in READ)
    table = score_runs([first, third], 8, 1, "cpu", "float32", tmp_path / "results")
    earlier = tmp_path / "results" / "seeds.json"
    both = score_runs([second], 8, 1, "cpu", "float32", tmp_path / "both", earlier)
    assert [run["seed"] for run in both["runs"]] == [0, 1, 2] and both["runs"][::2] == table["runs"]
    for folder, num_videos, refusal in (
        (third, 8, "holds seed 2 already"), (second, 16, "differs from these runs in num_videos"),
        (make_run(tmp_path / "other", 1, lr=1e-3), 8, "differs from these runs in recipe"),
    ):
        with pytest.raises(ValueError, match=refusal):
            score_runs([folder], num_videos, 1, "cpu", "float32", tmp_path / "both", earlier)
    earlier.write_text(json.dumps(table | {"runs": [run | {"code_sha256": "x"} for run in table["runs"]]}))
    with pytest.raises(ValueError, match="was scored by other code than this: score all its runs again"):
        score_runs([second], 8, 1, "cpu", "float32", tmp_path / "both", earlier)
    earlier.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a seeds.json"):
        score_runs([second], 8, 1, "cpu", "float32", tmp_path / "both", earlier)
