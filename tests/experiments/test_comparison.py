"""A comparison trains with equal compute, scores, continues where it stopped, reuses nothing of other settings, says what is missing."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import save_untrained
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import comparison, comparison_report
from experiments.comparison import Comparison, compare
from experiments.comparison_jobs import Training, quote, row_difference
from experiments.comparison_report import COLUMNS, as_markdown
from experiments.comparison_settings import ComparisonConfig
from experiments.compute import CPU, _count_step, flops_per_step
from machine.paths import CONFIGS
from tiny_causal_wan import ModelConfig
from train import run_command_line
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import Config, PretrainConfig, compose_run, register_schemas
from training.stages import PretrainStage, SelfForcingStage

TINY = ["model.width=24", "model.num_layers=1", "model.num_heads=2", "training.batch_size=2"]
COSTS = {"tf": 3.0, "df": 1.0, "sf_dmd": 2.0, "sf_gan": 4.0}  # FLOPs a step, pretended
FAKE_TRAIN = """
import os, signal, sys, time
from pathlib import Path
asked = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(asked["log_dir"].strip("'"))
run = folder / f"run-{len(list(folder.glob('run*')))}"
run.mkdir()
run.joinpath("checkpoint_0000001.pt").touch()
run.joinpath("scalars.csv").write_text("step,seconds\\n0,30\\n1,60\\n")
run.joinpath("asked.txt").write_text("\\n".join([*sys.argv[1:], "threads=" + os.environ["OMP_NUM_THREADS"]]))
if os.environ.get("BREAKS") == asked["training"]:
    sys.exit("error: it broke")
if "INTERRUPTS" in os.environ:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
folder.joinpath("checkpoint_final.pt").write_text(os.environ.get("RESOLVES_TO", ""))
"""
FAKE_EVALUATE = """
import hashlib, json, os, sys
from pathlib import Path
asked = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(asked["output_dir"].strip("'"))
folder.mkdir()
planned = json.loads(folder.with_name("settings.json").read_text())["settings"]
folder = folder.parent
value = 0.5 if "seed1" in folder.name else 0.25
checkpoint = Path(asked["checkpoint"].strip("'").replace(chr(92), ""))
if "seed1000" in folder.name:  # of a selection: the best rate is the one nearest to 2e-4
    value = 1 - 1000 * abs(planned["network"]["training.lr"] - 2e-4)
figures = {"frames_right": value, "frames_right_ci": [0.2, 0.6], "frames_right_by_frame": [0.1], "frames_per_second": 30.0}
figures |= {"checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
figures |= {"evaluations_a_block": 8, "cache_evaluations_a_block": 2}
sampler = "unguided" if "denoising_steps" in asked else "guided" if "num_steps" in asked else "own"
sampler += " block by block" if "causal" in asked else ""
figures |= {key: value for key, value in planned.items() if key != "network"} | json.loads(os.environ.get("SCORES_WITH", "{}"))
rows = {"real": {**figures, "frames_right": 0.875}, f"x, {sampler}, guidance 2": figures}
folder.joinpath("figures", "evaluation.json").write_text(json.dumps(rows))
"""
register_schemas()


def composed(*overrides: str) -> ComparisonConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_object(compose("comparison", ["device=cpu", "precision=float32", *overrides]))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    model = ModelConfig(width=24, num_layers=1, num_heads=2)
    return save_untrained(tmp_path_factory.mktemp("it's a teacher") / "teacher.pt", Config(model=model, training=PretrainConfig()))


@pytest.fixture
def ask(teacher: Path, tmp_path: Path):
    """A small comparison in a folder of this test, with these settings besides."""

    def config(*overrides: str) -> ComparisonConfig:
        asked = composed("num_frames=6", "blocks=[3]", "num_videos=4", "budget=6", *overrides)
        asked.teacher, asked.folder = str(teacher), str(tmp_path / "logs")
        asked.output_dir = str(tmp_path / "results")
        asked.overrides["all"] = TINY
        return asked

    return config


@pytest.fixture
def fake(teacher: Path, tmp_path: Path, monkeypatch) -> Path:
    """Scripts that leave the files of a training and of a score at once, and pretended costs."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    (tmp_path / "evaluate.py").write_text(FAKE_EVALUATE)
    monkeypatch.setattr(comparison, "SCRIPTS", tmp_path)
    monkeypatch.setattr(Training, "difference", lambda self: self.checkpoint.read_text())  # nothing, where it is as planned

    def cost(config: Config) -> float:
        training = config.training
        if isinstance(training, PretrainConfig):
            return COSTS["tf" if training.objective == "teacher_forcing" else "df"]
        assert training.generator_inputs == "self_rollout"
        return COSTS[f"sf_{training.loss}"]

    monkeypatch.setattr(comparison, "flops_per_step", cost)
    monkeypatch.setattr(comparison_report, "draw_table", lambda path, table: None)  # takes longer than all else; drawn end to end
    return tmp_path


def markdown(folder: Path) -> str:
    return (folder / "results" / "table2.md").read_text()


def trainings(folder: Path) -> list[Path]:
    return sorted((folder / "logs" / "trainings").iterdir())


def cells(text: str, title: str) -> list[list[str]]:
    """The cells of every line of a table that starts with this title."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {title} |")]


# ---------------------------------------------------------------------------------------------------------- equal compute


@pytest.fixture(scope="module")
def runs(teacher: Path) -> dict[str, Config]:
    start = f"training.pretrained_checkpoint={quote(teacher)}"
    common = [*TINY, "training.min_num_frames=6", "training.max_num_frames=6", start]
    return {name: compose_run([*comparison.PARADIGMS[name], *common]) for name in ("tf", "df", "sf_dmd")}


def test_flops_of_forcing_count_the_optimizer_once(runs: dict[str, Config]):
    runs["tf"].training.batch_size = 5
    stage = PretrainStage(runs["tf"], CPU, torch.Generator().manual_seed(0))
    assert flops_per_step(runs["tf"]) == pytest.approx(_count_step(stage, 0)[0], rel=1e-12)


def test_flops_of_self_forcing_count_muon_once(runs: dict[str, Config]):
    training = replace(runs["sf_dmd"].training, optimizer="muon", finish_blocks=True, dfake_gen_update_ratio=1, critic_warmup_steps=0)
    config = replace(runs["sf_dmd"], training=replace(training, batch_size=5))
    stage = SelfForcingStage(config, CPU, torch.Generator().manual_seed(0))
    assert flops_per_step(config) == pytest.approx(_count_step(stage, 0)[0], rel=1e-12)
    runs["df"].training.min_num_frames = 3
    with pytest.raises(ValueError, match="training.min_num_frames is 3: expected training.max_num_frames=6"):
        flops_per_step(runs["df"])


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_comparison_end_to_end_and_a_second_time_nothing(ask, tmp_path, monkeypatch, capsys):
    config = ask("rows=[real,sf_dmd]", "budget=2", "checkpoint_interval=1")
    assert compare(config) == 0
    (training,) = trainings(tmp_path)
    stored = load_checkpoint(training / "checkpoint_final.pt")
    assert stored["step"] == 2 and stored["config"]["training"]["num_frames_per_block"] == 3
    assert not list(training.glob("run*/checkpoint_0*.pt"))
    table = json.loads((tmp_path / "results" / "table2.json").read_text())
    scored, real = table["rows"]["sf_dmd"]["3"]["0"], table["rows"]["real"]["0"]["0"]
    assert scored["sampler"] == "4 steps" and scored["frames_per_second"] > 0 and real["frames_right"] > scored["frames_right"]
    assert table["trainings"][0]["num_steps"] == 2 and table["trainings"][0]["gflops_per_step"] > 0
    assert "Not complete" not in markdown(tmp_path) and (tmp_path / "results" / "table2.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "results" / "table2_flops.json").read_text())) == 1
    capsys.readouterr()
    monkeypatch.setattr(comparison.subprocess, "Popen", None)
    monkeypatch.setattr(comparison, "flops_per_step", None)
    assert compare(config) == 0 and "2 jobs, 2 done before" in capsys.readouterr().out
    (planned,) = Comparison(config).trainings
    assert planned.difference() == ""
    save_checkpoint(planned.checkpoint, {**stored, "step": 1, "config": {**stored["config"], "seed": 7}})
    assert planned.difference() == "seed 7, now 0, step 1, now 2"
    planned.checkpoint.write_bytes(b"no checkpoint")
    assert "cannot be read as a checkpoint" in planned.difference()


def test_rows_are_sampled_as_they_are_called(ask, fake):
    asked = "real,teacher,start,start_few,start_half,start_unguided,tf,tf_few,tf_unguided,sf_gan"
    assert compare(ask(f"rows=[{asked}]", "guidance=1.5")) == 0
    text = markdown(fake)
    samplers = {title: cells(text, title)[0][1].removesuffix(", guidance 2") for title in (
        "bidirectional teacher", "start, no training", "start, guided", "start, guided, half the steps", "start, no guidance", "TF",
        "TF, guided", "TF, no guidance", "Self-Forcing, GAN")}
    many = "guided block by block"
    assert list(samplers.values()) == ["guided", many, many, many, "unguided", many, many, "unguided", "own"]
    real = cells(text, "real video")[0]
    assert real[1] == "-" and real[3] == "0.875 [0.200, 0.600]" and cells(text, "TF")[0][2] == "8 + 2"
    plans = {path.parent.name.partition("-")[0]: json.loads(path.read_text())["settings"]["plan"]
             for path in (fake / "logs" / "scores").glob("*/settings.json")}
    assert len(plans["start"]["times"]) == 50 and plans["start_few"]["times"] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert plans["start_half"]["times"] == pytest.approx([1, 0.75]) and not plans["start_half"]["fresh_noise"]
    assert plans["start_unguided"]["fresh_noise"] and plans["start_unguided"]["guidance"] == 1
    assert len(trainings(fake)) == 2  # one training serves both rows of TF
    (asked,) = (fake / "logs" / "trainings").glob("tf-*/run-0/asked.txt")
    lines = asked.read_text().splitlines()
    assert {"training=teacher_forcing", "training.num_steps=4", "training.max_num_frames=6", "wandb.mode=disabled"} <= set(lines)
    assert f"threads={os.cpu_count()}" in lines  # budget 6 x 2.0 over 3.0 a step is 4 steps
    assert [plans[name]["guidance"] for name in ("teacher", "start_few", "tf", "tf_few", "tf_unguided")] == [1.5, 1.5, 1.5, 1.5, 1]


def test_other_settings_are_not_reused(ask, fake, monkeypatch, capsys):
    assert compare(ask("rows=[sf_dmd]")) == 0
    assert compare(ask("rows=[sf_dmd]", "budget=3")) == 0
    assert "which has training.num_steps 6, now 3" in capsys.readouterr().out
    assert compare(ask("rows=[sf_dmd]", "budget=3", "num_videos=5")) == 0
    assert "not taken from the earlier table: num_videos 4, now 5" in capsys.readouterr().out
    path = fake / "results" / "table2.json"
    path.write_text(path.read_text().replace('"checkpoint_sha256": "', '"checkpoint_sha256": "0'))
    assert compare(ask("rows=[sf_dmd]", "budget=3", "num_videos=5")) == 0
    output = capsys.readouterr().out
    assert "not taken from the earlier table: another " in output and "2 jobs, 1 done before" in output
    assert len(trainings(fake)) == 2
    monkeypatch.setattr(comparison.subprocess, "Popen", None)
    assert compare(ask("rows=[sf_dmd]", "budget=3", "num_videos=5", "checkpoint_interval=7")) == 0  # changes no weight


def test_what_the_table_holds_is_done_where_its_folders_are_gone(ask, fake, monkeypatch, capsys):
    assert compare(ask("rows=[real,sf_dmd]")) == 0
    capsys.readouterr()
    before = markdown(fake)
    made_with = json.loads((fake / "results" / "table2.json").read_text())["rows"]["sf_dmd"]["3"]["0"]["made_with"]
    assert {"code_sha256", "plan"} < made_with.keys() and {"code_sha256", "teacher"} < made_with["network"].keys()
    shutil.rmtree(fake / "logs")
    assert compare(ask("rows=[real,tf,tf_unguided,sf_dmd]")) == 0
    output = capsys.readouterr().out
    assert [output.count(f"scoring {row}, blocks of 3, seed 0: starts") for row in ("sf_dmd", "tf", "tf_unguided")] == [0, 1, 1]
    for title in ("real video", "Self-Forcing, DMD", "sf_dmd"):
        assert cells(markdown(fake), title) == cells(before, title) != []
    assert cells(markdown(fake), "TF, no guidance")[0][3] != "-" and "Not complete" not in markdown(fake)
    assert not list((fake / "results").glob("table2-*.json"))  # nothing of the earlier table is missing in the new one
    shutil.rmtree(fake / "logs")
    monkeypatch.setattr(comparison.subprocess, "Popen", None)
    assert compare(ask("rows=[real,tf,tf_unguided,sf_dmd]")) == 0


@pytest.mark.parametrize(("change", "words"), [
    ({"code_sha256": "0"}, "code_sha256 0, now 1"), ({"plan": {"guidance": 9.0}}, "plan.guidance 9.0, now 1.0"),
    ({"network": {"code_sha256": "0"}}, "network.code_sha256 0, now 2"), ({}, ""), (None, "what made it is not recorded"),
])
def test_a_row_of_an_earlier_table_counts_only_if_all_that_made_it_is_the_same(change: dict | None, words: str):
    """Options that read the same may resolve to other settings: the teacher's were 2.5 once and 4 later."""
    planned = {"code_sha256": "1", "plan": {"guidance": 1.0}, "network": {"code_sha256": "2"}}
    row = {} if change is None else {"made_with": planned | change}
    assert row_difference(row, planned, Path("absent.pt")) == words


def test_a_finished_training_that_is_not_as_planned_is_set_aside_and_made_again(ask, fake, capsys):
    assert compare(ask("rows=[sf_dmd]")) == 0
    (training,) = trainings(fake)
    (training / "checkpoint_final.pt").write_text("seed 7, now 0")
    (fake / "results" / "table2.json").unlink()
    assert compare(ask("rows=[sf_dmd]")) == 0
    assert f"not what was planned (seed 7, now 0): set aside as {training.name}.stale" in capsys.readouterr().out
    assert {path.name for path in training.parent.iterdir()} == {training.name, f"{training.name}.stale"}


@pytest.mark.parametrize(("name", "value", "words", "num_failed"), [
    ("RESOLVES_TO", "seed 7, now 0", "seed 7, now 0", 2), ("SCORES_WITH", '{"checkpoint_sha256": "0"}', "another ", 1),
    ("SCORES_WITH", '{"precision": "bfloat16"}', "precision bfloat16, now float32", 1),
])
def test_a_job_that_did_something_else_than_planned_has_failed(ask, fake, monkeypatch, capsys, name, value, words, num_failed):
    monkeypatch.setenv(name, value)
    assert compare(ask("rows=[sf_dmd]")) == num_failed
    assert f"not what was planned: {words}" in capsys.readouterr().out
    assert cells(markdown(fake), "Self-Forcing, DMD")[0][1:] == ["-"] * (len(COLUMNS) + 2)


def test_every_paradigm_is_offered_the_same_candidates_on_a_seed_that_the_table_does_not_use(ask, fake):
    half, own = "training.lr=*0.5 training.muon_lr=*0.5", "training.dfake_gen_update_ratio=2"
    config = ask(
        "rows=[tf,sf_dmd]", f"candidates.tf=['','{half}']",
        f"candidates.sf_dmd=['{own} training.lr=*1.2','']",
    )
    assert compare(config) == 0
    chosen = json.loads((fake / "results" / "table2_candidates.json").read_text())
    assert chosen["seed"] == 1000
    assert {(each["paradigm"], each["block"]): list(each["frames_right"]) for each in chosen["places"]} == {
        ("tf", 3): ["", half], ("sf_dmd", 3): [f"{own} training.lr=*1.2", ""],
    }
    table = json.loads((fake / "results" / "table2.json").read_text())
    rates = {each["paradigm"]: (each["lr"], each["seed"], each["chosen"]) for each in table["trainings"]}
    assert rates == {"tf": (1.5e-4, 0, half), "sf_dmd": (1.8e-4, 0, f"{own} training.lr=*1.2")}  # those nearest to 2e-4
    settings = {each["paradigm"]: each["settings"] for each in table["trainings"]}
    assert settings["tf"]["training.muon_lr"] == 3e-4 and settings["sf_dmd"]["training.dfake_gen_update_ratio"] == 2
    assert f"sf_dmd, block 3: {own} training.lr=*1.2" in markdown(fake)
    with pytest.raises(ValueError, match="training.loss=\\*2: expected the factor of a number"):
        compare(ask("rows=[sf_dmd]", "candidates.all=['','training.loss=*2']"))


def test_flops_are_counted_once_for_the_same_steps(ask, fake, monkeypatch):
    assert compare(ask("rows=[sf_dmd]")) == 0
    monkeypatch.setattr(comparison, "flops_per_step", lambda config: 7.0)
    for more in ([], ["seeds=[3]"], ["budget=40"]):  # neither seed nor length is one of a step
        assert [training.flops_per_step for training in Comparison(ask("rows=[sf_dmd]", *more)).trainings] == [COSTS["sf_dmd"]]
    (training,) = Comparison(ask("rows=[sf_dmd]", 'overrides.sf_dmd=["training.batch_size=3"]')).trainings
    assert training.flops_per_step == 7.0
    config = ask()
    config.teacher = "absent.pt"
    with pytest.raises(ValueError, match="teacher is absent.pt: no such checkpoint"):
        Comparison(config)


def test_a_table_that_would_lose_results_stays(ask, fake, capsys):
    assert compare(ask("rows=[tf,sf_dmd]")) == 0
    before = (fake / "results" / "table2.json").read_text()
    assert compare(ask("rows=[sf_dmd]")) == 0
    assert "has 1 results that this one will not show: it stays as table2-1.json" in capsys.readouterr().out
    assert (fake / "results" / "table2-1.json").read_text() == before
    assert compare(ask("rows=[sf_dmd]", "budget=3")) == 0
    assert "stays as table2-2.json" in capsys.readouterr().out and (fake / "results" / "table2-1.json").read_text() == before


@pytest.mark.parametrize("text", ["not json", '{"rows": {"tf": {"3": {"0": {"frames_right": 1.0}}}}, "trainings": []}'])
def test_a_file_that_is_no_table_is_not_written_over(ask, fake, text: str):
    (fake / "results").mkdir()
    (fake / "results" / "table2.json").write_text(text)
    with pytest.raises(ValueError, match="table2.json is no table of a comparison .*choose another name"):
        compare(ask("rows=[sf_dmd]"))
    assert (fake / "results" / "table2.json").read_text() == text


def test_a_failed_training_is_one_line_the_others_run_and_the_next_call_resumes_it(ask, fake, monkeypatch, capsys):
    config = ask("rows=[tf,tf_unguided,sf_dmd]", "processes=2")
    monkeypatch.setenv("BREAKS", "teacher_forcing")
    assert compare(config) == 3  # and its scores
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(lines) == 1 and "error: it broke; log " in lines[0] and Path(lines[0].rpartition("log ")[2]).is_file()
    text = markdown(fake)
    assert "**Not complete**: 1 of 3 results" in text and "training tf, blocks of 3, seed 0, 4 steps failed: error: it broke" in text
    assert cells(text, "TF")[0][1:] == ["-"] * (len(COLUMNS) + 2) and cells(text, "Self-Forcing, DMD")[0][3] == "0.250 [0.200, 0.600]"
    monkeypatch.delenv("BREAKS")
    assert compare(config) == 0
    (training,) = (fake / "logs" / "trainings").glob("tf-*")
    asked = (training / "run-1" / "asked.txt").read_text().splitlines()
    assert {"training.resume=auto", f"log_dir='{training}'", "run_name=run"} <= set(asked)
    assert not list(training.glob("run*/checkpoint_0*.pt"))
    assert cells(markdown(fake), "tf")[0][6] == "2.0"  # minutes of both attempts


def test_an_interruption_stops_the_children_and_says_how_to_go_on(ask, fake, monkeypatch):
    monkeypatch.setenv("INTERRUPTS", "yes")
    children = []
    opened = comparison.subprocess.Popen
    monkeypatch.setattr(comparison.subprocess, "Popen", lambda *given, **named: children.append(opened(*given, **named)) or children[-1])
    with pytest.raises(KeyboardInterrupt, match="interrupted: the same command continues"):
        compare(ask("rows=[sf_dmd]"))
    assert [child.poll() for child in children] == [-signal.SIGTERM]


def test_several_seeds_are_a_mean_and_a_range_and_a_partial_one_says_so(ask, fake):
    config = ask("rows=[df]", "seeds=[0,1]")
    assert compare(config) == 0
    assert cells(markdown(fake), "DF")[0][3] == "0.375 [0.250, 0.500]" and "the range over 2 trainings" in markdown(fake)
    planned = Comparison(config)
    assert planned.reuse() == []
    table = planned.table()
    del table["rows"]["df"]["3"]["0"]
    assert cells(as_markdown(table), "DF (1 of 2 seeds)")[0][3] == "0.500 [0.200, 0.600]"


@pytest.mark.parametrize(("given", "words"), [
    ({"rows": ["sf_dmd", "sf"]}, "rows is sf: expected any of real, teacher, start, "),
    ({"rows": ["real"]}, "rows is .*another row too"), ({"blocks": [3, 2]}, "blocks is 2: expected blocks that divide num_frames=21"),
    ({"budget": 0}, "budget is 0: expected at least 1"), ({"seeds": [1, 1]}, "seeds is .*each one once"),
    ({"overrides": {"all": ["training.num_steps=3"]}}, "overrides.all is training.num_steps=3: expected KEY=VALUE"),
    ({"selection_seed": 0}, "selection_seed is 0: expected another seed"),
    ({"candidates": {"all": ["", "training.lr=*2"], "tf": ["", "training.lr=*2", "training.lr=*4"]}}, "as many for every paradigm"),
])
def test_what_cannot_be_compared_is_refused(given: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        ComparisonConfig(**given)


def test_the_old_call_answers_with_the_new_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=table2", "experiment.budget=3", "device=cpu"])
    with pytest.raises(SystemExit, match="the comparison has moved: python -m experiments.comparison budget=3 device=cpu$"):
        run_command_line()
