"""What a run writes: its own folder, every figure in a CSV, curves, and wandb that never stops it."""

import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import wandb
from helpers.runs import rows_of

from training.config import WandbConfig
from training.run_log import RunLog, draw_curves, make_run_folder, point_to_latest

COLUMNS = ("loss", "loss_other")
DISABLED = WandbConfig(mode="disabled")
CURVES = ("curves.png", draw_curves)


class BrokenRun:
    """A wandb run whose network has gone."""

    def log(self, *arguments, **options):
        raise ConnectionError("wandb has gone")

    def finish(self, *arguments, **options):
        raise ConnectionError("wandb has gone")


def write_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.scalars(step, 0.5 * step, {"loss": 1 / (step + 1)} if step % 2 else {"loss": 2.0, "loss_other": -1e-12})


@pytest.mark.parametrize("has_links", [True, False])
def test_the_link_or_copy_is_the_latest_and_moves_with_the_folder(tmp_path, monkeypatch, has_links):
    def refuse(*_: object) -> None:
        raise OSError("no symbolic links here")

    if not has_links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    root, link = tmp_path / "logs", tmp_path / "logs" / "checkpoint_final.pt"
    for name in ("one", "two"):
        target = make_run_folder(root, name) / "checkpoint_final.pt"
        target.write_text(name)
        point_to_latest(link, target)
        assert link.read_text() == name and link.is_symlink() == has_links
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint_final.pt", "one", "two"]
    root.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "checkpoint_final.pt").read_text() == "two"


def test_the_csv_has_every_step_at_once_and_curves_are_drawn(tmp_path):
    log = RunLog(tmp_path, COLUMNS, {}, DISABLED, *CURVES)
    write_steps(log, range(5))
    rows = rows_of(tmp_path)  # before the file is closed: a killed run loses nothing
    assert [int(row["step"]) for row in rows] == list(range(5))
    assert [row["loss_other"] for row in rows] == ["-1e-12", "", "-1e-12", "", "-1e-12"]
    assert float(rows[3]["loss"]) == 0.25 and rows[3]["seconds"] == "1.50"
    log.close()
    picture = imageio.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 100 and picture.shape[1] > 400 and picture.std() > 5
    assert not (tmp_path / "wandb").exists()
    with pytest.raises(ValueError, match="surprise"):
        log.scalars(0, 0.0, {"surprise": 1.0})


@pytest.mark.parametrize(("content", "is_drawn"), [
    ("", False), ("step,seconds,loss\n", False), ("step,seconds,loss\n0,0.1,\n", False),
    ("step,seconds,loss,other\n0,0.1,1.0,nan\n1,0.1,900.0,nan\n2,0.1,inf,nan\n3,0.1,0.9,nan\n", True),
])
def test_nothing_to_draw_and_spikes_and_values_that_are_not_finite_are_no_error(tmp_path, content, is_drawn):
    (tmp_path / "scalars.csv").write_text(content)
    draw_curves(tmp_path / "scalars.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() == is_drawn


def test_wandb_that_is_not_installed_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ModuleNotFoundError
    with pytest.warns(UserWarning, match="wandb is off") as caught:
        log = RunLog(tmp_path, COLUMNS, {}, WandbConfig(), *CURVES)
        write_steps(log, range(3))
        log.close()
    assert len(caught) == 1 and len(rows_of(tmp_path)) == 3


@pytest.mark.parametrize("moment", ["scalars", "media", "close"])
def test_wandb_that_breaks_mid_run_is_one_warning(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(wandb, "init", lambda **options: BrokenRun())
    log = RunLog(tmp_path, COLUMNS, {}, WandbConfig(), *CURVES)
    with pytest.warns(UserWarning, match="wandb is off") as caught:
        if moment == "media":
            log.media(0, "samples", tmp_path / "none.png")
        if moment != "close":
            write_steps(log, range(3))
        log.close()
    assert len(caught) == 1
    assert len(rows_of(tmp_path)) == (0 if moment == "close" else 3)


def test_wandb_is_told_the_figures_and_the_pictures(tmp_path, monkeypatch):
    told = []

    class Run(BrokenRun):
        def log(self, figures, step):
            told.append((step, figures))

        def finish(self):
            told.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    monkeypatch.setattr(wandb, "Image", str)
    log = RunLog(tmp_path, COLUMNS, {}, WandbConfig(), *CURVES)
    log.scalars(3, 0.1, {"loss": 2.0})
    log.media(4, "samples", tmp_path / "picture.png")
    log.close()
    pictures = [(4, {"samples": str(tmp_path / "picture.png")}), (4, {"curves": str(tmp_path / "curves.png")})]  # steps never go back
    assert told == [(3, {"loss": 2.0}), *pictures, "finished"]
