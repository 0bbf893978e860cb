"""Training end to end on tiny networks: both stages, exact resuming, and every refusal as one line with nothing lost."""

from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch
from helpers.runs import SHARED, TINY, command_line, pretraining, resumed, rows_of, self_forcing

import train
from train import SimplifiedTrainer, TrainingDiverged
from training.checkpoint import CheckpointError, load_checkpoint, load_networks, save_checkpoint
from training.config import Config, config_from_dict


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The run folder of a tiny teacher."""
    return SimplifiedTrainer(pretraining(tmp_path_factory.mktemp("pretrain"), **SHARED, warmup_steps=2)).train()


@pytest.fixture(scope="module")
def student(pretrained, tmp_path_factory) -> Path:
    return SimplifiedTrainer(self_forcing(tmp_path_factory.mktemp("student"), pretrained / "checkpoint_final.pt", **SHARED)).train()


@pytest.mark.parametrize("stage, training_type, picture", [("pretrained", "pretrain", "curves.png"), ("student", "dmd2", "health.png")])
def test_a_run_leaves_checkpoints_samples_figures_and_curves(request, stage, training_type, picture):
    folder = request.getfixturevalue(stage)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "checkpoint_0000004.pt", "checkpoint_final.pt", picture, "scalars.csv", "samples/step_0000006.png", "samples/step_0000006.gif",
    }
    checkpoint = load_checkpoint(folder / "checkpoint_final.pt")
    assert checkpoint["step"] == 6 and checkpoint["training_type"] == training_type and checkpoint["optimizer_state_dict"]
    assert config_from_dict(checkpoint["config"]).training.training_type == training_type
    assert (folder.parent / "checkpoint_final.pt").resolve() == (folder / "checkpoint_final.pt").resolve()
    assert [int(row["step"]) for row in rows_of(folder)] == list(range(6))
    generator = load_networks(folder / "checkpoint_final.pt", torch.device("cpu")).generator
    assert all(parameter.isfinite().all() for parameter in generator.parameters())


def test_a_resumed_run_keeps_its_number_format_and_says_where_it_changes(pretrained, tmp_path, capsys, monkeypatch):
    """precision=auto is decided by timing: twice the same machine may choose differently."""
    half = load_checkpoint(pretrained / "checkpoint_0000004.pt")
    assert half["runtime"] == {"device": "cpu", "precision": "float32"}
    monkeypatch.setattr("machine.runtime._bfloat16_pays", lambda device: True)
    config = resumed(pretraining(tmp_path, **SHARED, warmup_steps=2), pretrained / "checkpoint_0000004.pt")
    kept = SimplifiedTrainer(replace(config, precision="auto"))
    assert kept.runtime.precision == "float32"
    assert "resumes in float32, the format of " in capsys.readouterr().out
    changed = SimplifiedTrainer(replace(config, precision="bfloat16"))
    assert changed.runtime.precision == "bfloat16"
    assert "resumes in bfloat16, as asked, where " in capsys.readouterr().out
    assert SimplifiedTrainer(config).runtime.precision == "float32" and "resumes in" not in capsys.readouterr().out
    del half["runtime"]  # as earlier versions stored it
    save_checkpoint(tmp_path / "old.pt", half)
    assert SimplifiedTrainer(resumed(replace(config, precision="auto"), tmp_path / "old.pt")).runtime.precision == "bfloat16"
    half["runtime"] = {"device": "cpu", "precision": "float8"}
    save_checkpoint(tmp_path / "odd.pt", half)
    with pytest.raises(CheckpointError, match="runtime is .*float8.*expected a device and a precision of float32, bfloat16"):
        load_checkpoint(tmp_path / "odd.pt")


def test_a_finished_run_with_more_steps_says_that_its_rates_rise_again(pretrained, tmp_path, capsys):
    SimplifiedTrainer(resumed(pretraining(tmp_path, num_steps=12), pretrained / "checkpoint_final.pt"))
    assert "whose rates had fallen to 0.56 of training.lr" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = SimplifiedTrainer(pretraining(tmp_path, checkpoint_interval=4))
    sound_step = trainer.stage.train_step

    def break_weights_silently(step: int) -> dict[str, float]:
        figures = sound_step(step)
        if step == 3:
            with torch.no_grad():
                next(trainer.stage.model.parameters()).fill_(nan)
        return figures

    trainer.stage.train_step = break_weights_silently
    with pytest.raises(TrainingDiverged, match="weight of the generator is not finite after 4 steps"):
        trainer.train()
    assert not list(tmp_path.rglob("*.pt"))


def test_a_resumed_run_that_diverges_names_the_checkpoint_it_came_from(pretrained, tmp_path):
    trainer = SimplifiedTrainer(resumed(pretraining(tmp_path), pretrained / "checkpoint_0000004.pt"))
    trainer.stage.train_step = lambda step: {"loss_causal": nan}
    with pytest.raises(TrainingDiverged, match="at step 4: stopped; the last good checkpoint is .*checkpoint_0000004.pt"):
        trainer.train()


def test_resuming_from_what_does_not_fit_is_refused(pretrained, tmp_path):
    config = pretraining(tmp_path / "logs")
    with pytest.raises(ValueError, match="training type pretrain, this run is dmd2"):
        other = self_forcing(tmp_path / "logs", pretrained / "checkpoint_final.pt")
        SimplifiedTrainer(resumed(other, pretrained / "checkpoint_0000004.pt"))
    with pytest.raises(ValueError, match="is already at step 6: set training.num_steps above it"):
        SimplifiedTrainer(resumed(config, pretrained / "checkpoint_final.pt"))
    whole = load_checkpoint(pretrained / "checkpoint_0000004.pt")
    for changes, words in (
        ({"optimizer_state_dict": {}}, "does not hold what resuming needs"), ({"random_state": 3}, "does not hold what resuming needs"),
        ({"global_random_states": {}}, "does not hold what resuming needs"), ({"step": "four"}, "expected whole numbers"),
        ({"generator_state_dict": {}}, "missing"),
    ):
        save_checkpoint(tmp_path / "bad.pt", {**whole, **changes})
        with pytest.raises(ValueError, match=words) as caught:
            SimplifiedTrainer(resumed(config, tmp_path / "bad.pt"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("arguments, words", [
    (["training.num_step=3"], "unknown key training.num_step.*training.num_steps"),  # more of these in test_config.py
    (["training.pretrained_checkpoint=none.pt", "device=cpu"], "no checkpoint at none.pt"),
    (["training=pretrain", *TINY, "log_dir=TMP/file/logs"], "cannot write to the folder .*file/logs"),
    (["training=pretrain", *TINY, "dataset.mnist_root=TMP/mnist"], "train-images-idx3-ubyte is not a sound MNIST file"),
    (["training=pretrain", "training.training_type=dmd2"], "training.training_type is dmd2: expected pretrain"),
])
def test_the_command_line_refuses_in_one_line(arguments, words, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "mnist").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "mnist" / name).write_bytes(b"corrupt")
    before = sorted(tmp_path.rglob("*"))
    overrides = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    if not any(override.startswith("log_dir") for override in overrides):
        overrides.append(f"log_dir={tmp_path}/logs")
    with pytest.raises(SystemExit, match=f"^error: .*{words}") as caught:
        command_line(monkeypatch, *overrides)
    assert "\n" not in caught.value.code  # sys.exit prints it to stderr, and the exit status is 1
    assert capfd.readouterr().err == ""  # and nothing else stands there
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_trains_and_shows_help_and_the_composed_job(tmp_path, monkeypatch, capsys):
    command_line(monkeypatch, "training=pretrain", *TINY, f"log_dir={tmp_path}", "run_name=mine")
    assert load_checkpoint(tmp_path / "checkpoint_final.pt")["step"] == 1
    assert "trained 1 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        command_line(monkeypatch, "--help")
    assert caught.value.code in (0, None) and "dfake_gen_update_ratio: " in capsys.readouterr().out
    command_line(monkeypatch, "--cfg", "job", "training.num_steps=7")
    assert "num_steps: 7" in capsys.readouterr().out


def test_multirun_runs_every_choice(tmp_path, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, config: Config, processes=None):
            self.config = config

        def train(self) -> None:
            seen.append((self.config.seed, self.config.training.training_type))

    monkeypatch.setattr(train, "SimplifiedTrainer", Recorder)
    command_line(monkeypatch, "-m", "seed=3,4", "training=pretrain,self_forcing", f"hydra.sweep.dir={tmp_path}")
    assert seen == [(3, "pretrain"), (3, "dmd2"), (4, "pretrain"), (4, "dmd2")]
