"""A run that is stopped, killed or cut short goes on as if nothing had happened: from the right checkpoint, to the same bits."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from helpers.networks import save_untrained
from helpers.runs import OF_THE_ATTEMPT, TINY, command_line, pretraining, resumed, self_forcing, start_training, stopping_after
from helpers.stages import assert_same

import train
from experiments.comparison_jobs import stop as stop_processes
from machine.interruption import EXIT_INTERRUPTED, RunInterrupted
from machine.paths import REPOSITORY as ROOT
from train import SimplifiedTrainer
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.config import Config, WandbConfig
from training.resume import RunClaim, RunFinished, find_start


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the steps, and other tests look at them."""
    for name in ("draw_run", "draw_curves"):
        monkeypatch.setattr(train, name, lambda csv_path, picture_path: None)
    monkeypatch.setattr(SimplifiedTrainer, "_show_samples", lambda trainer, step: None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("teacher") / "teacher.pt", pretraining(Path("none")))


def cut_short(config: Config, after: int) -> Path:
    """Run the first steps, be stopped in the last of them; returns the checkpoint that was saved."""
    with pytest.raises(RunInterrupted) as caught:
        stopping_after(SimplifiedTrainer(config), after - 1, []).train()
    return Path(str(caught.value).partition("saved ")[2])


@pytest.mark.parametrize("kind, number", [("pretrain", signal.SIGTERM), ("self_forcing", signal.SIGINT), ("long", signal.SIGTERM)])
def test_stopped_and_gone_on_equals_never_stopped(kind, number, teacher, tmp_path, capfd):
    def config(name: str) -> Config:
        start = {"generator_checkpoint": str(teacher)}  # which the checkpoint brings itself when the run goes on
        start |= {"window_frames": 6, "rollout_frames": 15, "switch_probability": 0.5} if kind == "long" else {}
        return pretraining(tmp_path / name) if kind == "pretrain" else self_forcing(tmp_path / name, teacher, **start)

    unbroken, broken = [], []
    whole = load_checkpoint(stopping_after(SimplifiedTrainer(config("whole")), None, unbroken).train() / "checkpoint_final.pt")
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RunInterrupted, match=r"(SIGTERM|Ctrl-C): stopped after 3 of 6 steps, saved .*run.checkpoint_0000003.pt"):
        stopping_after(SimplifiedTrainer(config("parts")), 2, broken, number).train()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers  # as they were
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    folder = stopping_after(SimplifiedTrainer(resumed(config("parts"))), None, broken).train()
    result = load_checkpoint(folder / "checkpoint_final.pt")
    assert folder.name == "run-2" and result["attempts"] == ["run", "run-2"] and broken == unbroken
    assert whole.keys() == result.keys()
    for key in whole.keys() - OF_THE_ATTEMPT:
        assert_same(whole[key], result[key], key)
    output = capfd.readouterr()
    assert "goes on from" in output.out and "finishes this step, saves and stops; Ctrl-C leaves at once" in output.err


def test_a_checkpoint_of_before_goes_on_to_the_same_bits(tmp_path):
    whole = load_checkpoint(SimplifiedTrainer(pretraining(tmp_path / "whole")).train() / "checkpoint_final.pt")
    path = cut_short(pretraining(tmp_path / "parts"), 3)
    old = load_checkpoint(path)
    del old["global_random_states"], old["wandb_run_id"], old["attempts"]
    old["config"]["training"]["resume"] = None
    save_checkpoint(path, old)
    result = load_checkpoint(SimplifiedTrainer(resumed(pretraining(tmp_path / "parts"))).train() / "checkpoint_final.pt")
    for key in whole.keys() - OF_THE_ATTEMPT - {"global_random_states"}:
        assert_same(whole[key], result[key], key)


# --- what auto goes on from -------------------------------------------------------------------------------------------


def test_a_truncated_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys):
    config = pretraining(tmp_path)
    newest = cut_short(config, 4)
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="passed over: .*checkpoint_0000004.pt cannot be read as a checkpoint: truncated"):
        start = find_start(resumed(config))
    assert start.path.name == "checkpoint_0000003.pt" and start.checkpoint["step"] == 3
    assert f"goes on from {tmp_path}/run/checkpoint_0000003.pt, step 3 of 6" in capsys.readouterr().out
    start.path.write_bytes(b"half")
    newest.with_name("checkpoint_0000002.pt").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="passed over: "):
        assert find_start(resumed(config)) is None
    assert "starts from the beginning" in capsys.readouterr().out


def test_only_whole_checkpoints_by_name_count(tmp_path):
    config = pretraining(tmp_path)
    path = cut_short(config, 1)
    for other in (".checkpoint_0000001.77.part.pt", "checkpoint_9.pt.bak", "checkpoint_best.pt", "notes.pt"):
        path.with_name(other).write_bytes(path.read_bytes())
    (tmp_path / "run-other").mkdir()
    path.with_name("x").write_text("")
    (tmp_path / "run-other" / "checkpoint_0000005.pt").write_bytes(path.read_bytes())  # another name than run-NUMBER
    assert find_start(resumed(config)).path == path
    SimplifiedTrainer(resumed(config)).claim.release()
    assert not list(path.parent.glob(".*.part*")), "what a killed save left is cleared away"


@pytest.mark.parametrize("name", ["run", None])
def test_other_settings_are_another_run(name, tmp_path, capsys):
    cut_short(replace(pretraining(tmp_path), run_name=name), 1)
    other = replace(pretraining(tmp_path, lr=1e-3), run_name=name)
    assert find_start(resumed(other)) is None
    assert "training.lr 0.0015, now 0.001" in capsys.readouterr().out
    same = {"checkpoint_interval": 3, "keep_last": 5, "log_interval": 2, "sample_interval": 2}
    assert find_start(resumed(replace(pretraining(tmp_path, **same), run_name=name))) is not None
    assert find_start(resumed(replace(pretraining(tmp_path), run_name="mine"))) is None
    assert find_start(resumed(replace(pretraining(tmp_path), run_name=name, seed=1))) is None


def test_without_a_name_the_folder_last_written_to_counts(tmp_path):
    paths = [cut_short(replace(pretraining(tmp_path), run_name=name), after) for name, after in (("b", 3), ("a", 1), ("c", 2))]
    assert find_start(resumed(replace(pretraining(tmp_path), run_name=None))).path == paths[2]
    os.utime(paths[1], ns=(2**62, 2**62))
    assert find_start(resumed(replace(pretraining(tmp_path), run_name=None))).path == paths[1]


def test_never_and_an_empty_folder_start_anew(tmp_path, capsys):
    assert find_start(pretraining(tmp_path)) is None and capsys.readouterr().out == ""
    assert find_start(resumed(pretraining(tmp_path / "none"))) is None
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "starts from the beginning" in line and not (tmp_path / "none").exists()
    cut_short(pretraining(tmp_path), 1)
    capsys.readouterr()
    assert find_start(pretraining(tmp_path)) is None and capsys.readouterr().out == ""
    with pytest.raises(CheckpointError, match="no checkpoint at none.pt"):
        find_start(resumed(pretraining(tmp_path), "none.pt"))


def test_a_finished_run_says_so_and_grows_with_more_steps(tmp_path, monkeypatch, capsys):
    config = pretraining(tmp_path, num_steps=2)
    folder = stopping_after(SimplifiedTrainer(config), 1, []).train()  # asked to stop in its last step, it is finished
    assert "all steps were done" in capsys.readouterr().out
    with pytest.raises(RunFinished, match="run is finished: checkpoint_final.pt is at step 2 of 2; a larger training.num_steps"):
        SimplifiedTrainer(resumed(config))
    longer = find_start(resumed(pretraining(tmp_path, num_steps=4)))
    assert longer.path == folder / "checkpoint_final.pt" and "it was to end at 2" in capsys.readouterr().out
    command_line(monkeypatch, "training=pretrain", *TINY, f"log_dir={tmp_path}/line", "run_name=mine")
    command_line(monkeypatch, "training=pretrain", *TINY, f"log_dir={tmp_path}/line", "run_name=mine", "training.resume=auto")
    assert "mine is finished" in capsys.readouterr().out and [path.name for path in (tmp_path / "line").glob("mine*")] == ["mine"]


# --- checkpoints of earlier attempts ----------------------------------------------------------------------------------


def test_checkpoints_of_earlier_attempts_count_towards_keep_last_and_strangers_stay(tmp_path):
    config = pretraining(tmp_path)
    stranger = cut_short(replace(config, run_name="run-7", seed=1), 2)  # by its name an attempt, by its settings not

    def kept() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("run*/*.pt") if path.parent != stranger.parent)

    cut_short(config, 3)
    assert kept() == ["run/checkpoint_0000002.pt", "run/checkpoint_0000003.pt"]
    cut_short(resumed(config), 4)
    assert kept() == ["run-2/checkpoint_0000004.pt", "run/checkpoint_0000003.pt"]
    newest = tmp_path / "run-2" / "checkpoint_0000004.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="passed over"):
        cut_short(resumed(config), 4)  # from 3, whose folder is that of the first attempt
    assert "run/checkpoint_0000003.pt" in kept() and "run-3/checkpoint_0000004.pt" in kept()
    SimplifiedTrainer(resumed(config)).train()
    assert len([name for name in kept() if "final" not in name and "run-2/" not in name]) == 2
    assert stranger.exists()


def test_a_path_may_be_another_runs_and_nothing_of_it_is_replaced(tmp_path):
    path = cut_short(pretraining(tmp_path), 3)
    before = sorted(path.parent.glob("*.pt"))
    SimplifiedTrainer(resumed(pretraining(tmp_path, keep_last=1), path)).train()
    assert sorted(path.parent.glob("*.pt")) == before and len(before) == 2


def test_a_run_that_is_still_at_work_is_not_gone_on_with(tmp_path):
    path = cut_short(pretraining(tmp_path), 2)
    part = path.with_name(f".{path.stem}.1.part.pt")
    part.write_bytes(b"half")
    other = RunClaim()
    assert other.add(path.parent)
    with pytest.raises(ValueError, match=f"another process is still training in {path.parent}: wait for it or stop it"):
        SimplifiedTrainer(resumed(pretraining(tmp_path)))
    assert part.exists() and [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["run"]
    other.release()
    SimplifiedTrainer(resumed(pretraining(tmp_path))).claim.release()
    assert not part.exists()


@pytest.mark.parametrize("mode, at_first", [("offline", None), ("online", "allow")])
def test_resuming_goes_on_with_the_same_wandb_run(tmp_path, monkeypatch, mode, at_first):
    asked = []

    class Run:
        def log(self, figures, step): ...
        def finish(self): ...

    monkeypatch.setattr(wandb, "init", lambda **options: asked.append((options["id"], options["resume"])) or Run())
    config = replace(pretraining(tmp_path), wandb=WandbConfig(mode=mode))
    cut_short(config, 1)
    cut_short(replace(resumed(config), wandb=WandbConfig(mode="disabled")), 2)  # one attempt without it does not break the chain
    cut_short(resumed(config), 3)
    cut_short(replace(config, run_name="other"), 1)
    (first, how), (second, again), (other, how_other) = asked
    assert first == second != other and (how, again, how_other) == (at_first, "allow", at_first) and re.fullmatch("[0-9a-f]{8}", first)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_the_command_line_exits_with_its_own_code_and_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    real = train.SimplifiedTrainer
    monkeypatch.setattr(train, "SimplifiedTrainer", lambda config, processes: stopping_after(real(config), 0, []))
    arguments = ["training=pretrain", *TINY, "training.num_steps=3", f"log_dir={tmp_path}/my logs", "training.resume=never"]
    with pytest.raises(SystemExit) as caught:
        command_line(monkeypatch, *arguments)
    assert caught.value.code == EXIT_INTERRUPTED == 75
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("SIGTERM: stopped after 1 of 3 steps, saved ")
    program, script, *command = shlex.split(line.partition("; go on with: ")[2])
    assert (program, script, command[-1]) == ("python", "train.py", "training.resume=auto")
    monkeypatch.setattr(train, "SimplifiedTrainer", real)
    command_line(monkeypatch, *command)
    assert "step 1 of 3" in capsys.readouterr().out and load_checkpoint(tmp_path / "my logs" / "checkpoint_final.pt")["step"] == 3


@pytest.mark.parametrize("room", ["_show_samples", "_report_quality"])
def test_ctrl_c_after_the_last_step_ends_a_complete_run(room, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SimplifiedTrainer, room, interrupt)
    command_line(monkeypatch, "training=pretrain", *TINY, "training.num_steps=2", f"log_dir={tmp_path}")  # no SystemExit
    assert load_checkpoint(tmp_path / "checkpoint_final.pt")["step"] == 2
    said = capsys.readouterr()
    assert "Ctrl-C: all steps were done" in said.out and "training.resume" not in said.err


ASKED_TWICE = """
import os, signal, sys, time
sys.path.insert(0, ROOT)
from machine.interruption import StopRequest
with StopRequest() as stop:
    for number in NUMBERS:
        os.kill(os.getpid(), number)
    print("still here after", stop.reason, flush=True)
"""


@pytest.mark.parametrize("numbers, code", [
    ([2, 2], -2), ([15, 2], -2), ([15, 15], 0), ([2, 15, 15], 0), ([2], 0),
])
def test_a_second_ctrl_c_leaves_at_once_and_repeated_sigterms_do_not(numbers, code):
    script = ASKED_TWICE.replace("ROOT", repr(str(ROOT))).replace("NUMBERS", repr(numbers))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ("still here" in ended.stdout) == (code == 0), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_goes_on_to_the_same_bits(number, tmp_path):
    """Real processes, as the comparison starts and stops them: one unbroken, one stopped mid-run and started again with `auto`."""

    whole, parts = (start_training(tmp_path / name, "training.num_steps=150") for name in ("whole", "parts"))
    while not list(tmp_path.glob("parts/run/checkpoint_*.pt")):
        assert parts.poll() is None, parts.stderr.read()
    if number == signal.SIGTERM:
        stop_processes([parts])
    else:
        parts.send_signal(number)
    errors = parts.communicate()[1]
    assert parts.returncode == (-9 if number == signal.SIGKILL else EXIT_INTERRUPTED), errors
    again = start_training(tmp_path / "parts", "training.num_steps=150", "training.resume=auto")
    output, errors = again.communicate()
    assert again.returncode == 0 and "goes on from" in output, errors
    assert whole.wait() == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoint_final.pt") for name in ("whole", "parts"))
    for key in one.keys() - OF_THE_ATTEMPT:
        assert_same(one[key], other[key], key)
