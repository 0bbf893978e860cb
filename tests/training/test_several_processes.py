"""Runs on two real processes: stopped, killed and gone on with, sharded or not, they are the run that was never stopped."""

import os
import random
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers.networks import save_untrained
from helpers.processes import environment, free_port, join_one_of_two
from helpers.runs import OF_THE_ATTEMPT, TRAINING, pretraining, resumed, self_forcing, start_training, stopping_after
from helpers.stages import assert_same
from torch.testing import assert_close

import train
from machine.interruption import RunInterrupted
from train import SimplifiedTrainer
from training.checkpoint import load_checkpoint
from training.config import Config
from training.distributed import ONE_PROCESS, Processes

PICTURES = ("draw_run", "draw_curves", "comparison_sheet", "comparison_gif")  # they take longer than the steps
KINDS = ("pretrain", "self_forcing")
BY_COUNT = {"random_states_by_process"}  # which one process has no use for


def run(config: Config, processes: Processes = ONE_PROCESS, last_step: int | None = None) -> tuple[Path, list[float]]:
    """Train, each process drawing as often from every global generator as its rank says; asked to stop in last_step, in the last process.

    Returns the checkpoint that is left, and the draws.
    """
    draws: list[float] = []
    trainer = SimplifiedTrainer(config, processes)
    stopping_after(trainer, last_step if processes.rank == processes.count - 1 else None, draws, num_draws=processes.rank + 1)
    try:
        return trainer.train() / "checkpoint_final.pt", draws
    except RunInterrupted as stopped:
        return Path(str(stopped).partition("saved ")[2]), draws


def configs(folder: Path, teacher: Path, sharding: str) -> dict[str, Config]:
    return {
        "pretrain": pretraining(folder, sharding=sharding, keep_last=9),
        "self_forcing": self_forcing(folder, teacher, sharding=sharding, keep_last=9, health_interval=0),
    }


def worker(rank: int, port: int, folder: Path, teacher: Path, sharding: str) -> None:
    for name in PICTURES:
        vars(train)[name] = lambda *_: None
    processes = join_one_of_two(rank, port)
    results = {}
    for kind in KINDS:
        def config(name: str, kind: str = kind) -> Config:
            return configs(folder / kind / name, teacher, sharding)[kind]

        whole, draws = run(config("whole"), processes)
        stopped, first_draws = run(config("parts"), processes, last_step=2)
        torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
        gone_on, last_draws = run(resumed(config("parts")), processes)
        of_one, _ = run(resumed(config("of_one"), folder / "single" / kind / "run" / "checkpoint_0000003.pt"), processes)
        results[kind] = {
            "whole": str(whole), "stopped": str(stopped), "gone_on": str(gone_on), "of_one": str(of_one),
            "draws": (draws, first_draws + last_draws),
        }
    processes.leave()
    torch.save(results, folder / f"{rank}.pt")


def assert_near(one: dict, other: dict, where: str) -> None:
    """Networks and averages equal up to rounding, and every number that counts the same."""
    assert one.keys() - BY_COUNT == other.keys() - BY_COUNT, where
    for key in one.keys() - OF_THE_ATTEMPT - BY_COUNT - {"optimizer_state_dict", "global_random_states"}:
        if key == "watchdog":
            assert_close(one[key]["norms"], other[key]["norms"], rtol=2e-2, atol=2e-4)
        elif key.endswith("state_dict"):
            assert_close(one[key], other[key], rtol=2e-2, atol=2e-4, msg=lambda text, key=key: f"{where}: {key}: {text}")
        else:
            assert_same(one[key], other[key], f"{where}: {key}")
    shapes = [[value.shape for value in torch.utils._pytree.tree_leaves(c["optimizer_state_dict"]) if isinstance(value, torch.Tensor)]
              for c in (one, other)]
    assert shapes[0] == shapes[1], where


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("teacher") / "teacher.pt", pretraining(Path("none")))


@pytest.fixture(scope="module", params=[pytest.param(sharding, marks=pytest.mark.slow) for sharding in ("none", "fsdp2")])
def runs(request, teacher, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Both kinds of training, sharded or not, in two processes; and in one, for comparison."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(train, name, lambda *_: None)
        for kind, config in configs(folder, teacher, "none").items():
            run(replace(config, log_dir=str(folder / "single" / kind)), last_step=2)
            run(replace(config, log_dir=str(folder / "single_whole" / kind)))
    multiprocessing.spawn(worker, (free_port(), folder, teacher, request.param), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_stopped_and_gone_on_equal_two_never_stopped(runs, kind):
    first, second = (result[kind] for result in runs[1])
    assert "checkpoint_0000003" in first["stopped"]
    assert all(first[name] == second[name] for name in ("whole", "stopped", "gone_on"))
    whole, gone_on = (load_checkpoint(Path(first[name])) for name in ("whole", "gone_on"))
    assert whole.keys() == gone_on.keys() and whole["step"] == TRAINING["num_steps"]
    for result in (first, second):  # each process draws on from where it stood itself
        unbroken, broken = result["draws"]
        assert unbroken == broken and len(unbroken) > 0
    assert len(second["draws"][0]) == 2 * len(first["draws"][0]), "both stood at the same place: nothing was tested"
    for key in whole.keys() - OF_THE_ATTEMPT - BY_COUNT:
        assert_same(whole[key], gone_on[key], key)
    for own, other in zip(whole["random_states_by_process"], gone_on["random_states_by_process"], strict=True):
        assert_same(own, other, "random_states_by_process")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_one_go_on_with_each_other(runs, teacher, kind, monkeypatch):
    folder, (first, _) = runs
    for name in PICTURES:
        monkeypatch.setattr(train, name, lambda *_: None)
    alone = load_checkpoint(folder / "single_whole" / kind / "run" / "checkpoint_final.pt")
    assert_near(load_checkpoint(Path(first[kind]["whole"])), alone, "two throughout")
    assert_near(load_checkpoint(Path(first[kind]["of_one"])), alone, "one, then two")
    to_one, _ = run(resumed(configs(folder / kind / "to_one", teacher, "none")[kind], first[kind]["stopped"]))
    assert_near(load_checkpoint(to_one), alone, "two, then one")


def test_sharding_is_refused_in_one_process(tmp_path):
    with pytest.raises(ValueError, match="training.sharding is fsdp2 in a single process: start several with torchrun"):
        SimplifiedTrainer(pretraining(tmp_path, sharding="fsdp2"))


@pytest.mark.slow
@pytest.mark.parametrize("killed, sharding", [(0, "none"), (1, "none"), (1, "fsdp2")])
def test_a_process_killed_in_mid_step_ends_the_other_in_one_line_and_auto_goes_on(killed, sharding, tmp_path):
    def start(rank: int, port: int, *more: str) -> subprocess.Popen:
        clean = {**os.environ, "OMP_NUM_THREADS": "1"}
        return start_training(tmp_path, f"training.sharding={sharding}", *more, env={**clean, **environment(rank, port)})

    port = free_port()
    pair = [start(rank, port, "training.num_steps=100000") for rank in range(2)]
    while len(list(tmp_path.glob("run/checkpoint_*.pt"))) < 2:  # at the first file the other may not know yet that it is saved
        assert all(process.poll() is None for process in pair), [process.communicate() for process in pair]
        time.sleep(0.05)
    pair[killed].kill()
    began = time.monotonic()
    errors = pair[1 - killed].communicate(timeout=60)[1]
    assert time.monotonic() - began < 10 and pair[1 - killed].returncode == 1, errors
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert "another process of this run has ended" in lines[0] and "the last good checkpoint is" in lines[0]
    pair[killed].communicate()
    kept = sorted(tmp_path.glob("run/checkpoint_*.pt"))
    step = load_checkpoint(kept[-1])["step"]
    port = free_port()
    pair = [start(rank, port, f"training.num_steps={step + 5}", "training.resume=auto") for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert f"goes on from {kept[-1]}, step {step}" in outputs[0][0]
    assert load_checkpoint(tmp_path / "checkpoint_final.pt")["step"] == step + 5
