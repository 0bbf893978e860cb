"""Faults on purpose: what must survive does, and what is said is one line. Real kills, real limits of the kernel where there are any."""

import errno
import gc
import inspect
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import wandb
from helpers.networks import save_untrained
from helpers.runs import SHARED, pretraining, resumed, self_forcing, tiny_config

import train
from machine.files import require_writable
from machine.paths import REPOSITORY as ROOT
from train import SimplifiedTrainer, TrainingDiverged
from training import run_log
from training.checkpoint import CheckpointError, checkpoint_config, load_checkpoint, save_checkpoint
from training.config import PretrainConfig, WandbConfig, config_to_dict
from training.resume import find_start
from training.run_log import RunLog, make_run_folder


def small_checkpoint(step: int = 1, size: int = 100) -> dict:
    return {
        "generator_state_dict": {"weight": torch.full((size,), float(step))}, "optimizer_state_dict": {}, "text_encoder_state_dict": {},
        "step": step, "training_type": "pretrain", "config": {"training": {"training_type": "pretrain"}}, "prompts_drawn": {0: step},
    }


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED_SAVER = """
import os, random, signal, sys, time
sys.path.insert(0, ROOT)
from pathlib import Path
import torch
from machine.files import remove_leftovers
from training.checkpoint import save_checkpoint
from training.resume import interval_checkpoints, newest_readable

FUNCTION
folder, moments, num_hit = Path(FOLDER), random.Random(0), 0
for kill in range(50):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        paths = interval_checkpoints(folder)
        for step in range(1000 * kill + 1, 1000 * kill + 900):
            save_checkpoint(folder / f"checkpoint_{step:07d}.pt", small_checkpoint(step, SIZE))
            os.write(tell, step.to_bytes(4, "big"))  # from now on it must not be lost
            paths.append(folder / f"checkpoint_{step:07d}.pt")
            while len(paths) > 2:
                paths.pop(0).unlink()
        os._exit(0)
    os.close(tell)
    os.read(told, 4)  # the first save is done
    time.sleep(moments.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = 1000 * kill + 1
    while word := os.read(told, 4):
        acknowledged = int.from_bytes(word, "big")
    os.close(told)
    files = interval_checkpoints(folder)
    for path in files:  # every file of that name is whole, not the newest alone
        found = newest_readable([path])
        assert found is not None, path
        step, weight = found[1]["step"], found[1]["generator_state_dict"]["weight"]
        assert int(path.stem[-7:]) == step and len(weight) == SIZE and bool((weight == step).all()), path
    assert step in (acknowledged, acknowledged + 1) and len(files) <= 3, (step, acknowledged, files)
    num_hit += bool(list(folder.glob(".*.part.pt")))
    remove_leftovers(folder)
    assert sorted(folder.iterdir()) == sorted(files)
print("in the middle of a save:", num_hit)
"""


def test_fifty_kills_at_random_moments_of_saving_lose_nothing(tmp_path):
    script = KILLED_SAVER.replace("ROOT", repr(str(ROOT))).replace("FOLDER", repr(str(tmp_path))).replace("SIZE", "50_000")
    script = script.replace("FUNCTION", inspect.getsource(small_checkpoint))
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    num_hit = int(ended.stdout.rpartition(":")[2])
    print(ended.stdout)
    assert num_hit >= 20, f"only {num_hit} of 50 kills met a save: nothing was tested"


# --- disk full, folders that cannot be written --------------------------------------------------------------------------


def test_the_kernels_refusal_of_a_larger_file_is_one_line_and_loses_nothing(tmp_path):
    """RLIMIT_FSIZE: the write itself fails, below Python and torch, at sizes all over the file."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, small_checkpoint(1, 10_000))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in range(0, len(before) - 1, len(before) // 50):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="cannot write .*checkpoint.pt .*File too large.*; free some space") as caught:
                save_checkpoint(path, small_checkpoint(2, 10_000))
            assert one_line(caught) and path.read_bytes() == before and os.listdir(tmp_path) == [path.name], size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_checkpoint(path, small_checkpoint(2))
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.parametrize("full", ["checkpoint", "figures"])
def test_a_run_on_a_full_disk_stops_in_one_line_and_continues_when_there_is_room(tmp_path, monkeypatch, full):
    config = tiny_config(tmp_path, PretrainConfig(**{**SHARED, "checkpoint_interval": 2}))
    trainer = SimplifiedTrainer(config)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_disk(step: int) -> dict[str, float]:
        if step == 3:
            monkeypatch.setattr(trainer.log, "_draw", refuse)  # the picture does not fit either, and must not hide the cause
            monkeypatch.setattr(*((torch, "save") if full == "checkpoint" else (trainer.log._writer, "writerow")), refuse)
        return sound_step(step)

    sound_step, trainer.stage.train_step = trainer.stage.train_step, fill_disk
    words = r"No space left on device.*: stopped; the last good checkpoint is .*checkpoint_0000002.pt$"
    with pytest.raises(OSError, match=words) as caught, pytest.warns(UserWarning, match="picture could not be written"):
        trainer.train()
    assert one_line(caught) and [path.name for path in tmp_path.rglob("*.pt")] == ["checkpoint_0000002.pt"]
    assert not list(tmp_path.rglob("*.part*"))
    monkeypatch.undo()
    assert find_start(resumed(config)).checkpoint["step"] == 2


@pytest.mark.parametrize("use", [
    lambda folder: save_checkpoint(folder / "checkpoint.pt", small_checkpoint()), lambda folder: make_run_folder(folder, "run"),
    require_writable,
], ids=["save_checkpoint", "make_run_folder", "generate"])
def test_a_folder_that_cannot_be_written_is_named_in_one_line(use, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write (in)?to the folder .*folder") as caught:
        use(tmp_path / "file" / "folder")
    assert one_line(caught)


# --- broken and hostile checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_checkpoint_cut_at_any_byte_is_refused(tmp_path, is_mapped):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, small_checkpoint(1, 10))
    content = path.read_bytes()
    for length in range(0, len(content), 7 if is_mapped else 3):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="checkpoint.pt"):
            load_checkpoint(path, is_mapped)


class Hostile:
    """Unpickled by a careless reader, it would make a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["config", "optimizer_state_dict", "global_random_states", "attempts", "old format", "bare pickle"])
def test_a_hostile_file_is_refused_by_loading_and_resuming_and_runs_nothing(tmp_path, form):
    config, trace = tiny_config(tmp_path, PretrainConfig(**SHARED, resume="auto")), tmp_path / "trace"
    path = tmp_path / "run" / "checkpoint_0000001.pt"
    path.parent.mkdir()
    hostile = Hostile(trace)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        content = {**small_checkpoint(), "config": config_to_dict(config), "step" if form == "old format" else form: {0: hostile}}
        torch.save(content, path, _use_new_zipfile_serialization=form != "old format")
    with pytest.raises(CheckpointError, match="refused, since reading it could run code"):
        load_checkpoint(path)
    with pytest.warns(UserWarning, match="passed over: .*refused"):
        assert find_start(config) is None
    assert not trace.exists()
    (pickle.loads(path.read_bytes()) if form == "bare pickle" else torch.load(path, weights_only=False))
    assert trace.exists(), "the file is harmless: nothing was tested"


@pytest.mark.parametrize("attempts", [3, ["../../elsewhere", "/", "", 7, None], {"a": 1}, ["run", ".."]])
def test_folders_that_a_checkpoint_names_lead_nowhere_else(tmp_path, attempts):
    config = tiny_config(tmp_path / "logs", PretrainConfig(**SHARED, resume="auto"))
    (tmp_path / "logs" / "run").mkdir(parents=True)
    save_checkpoint(tmp_path / "logs" / "run" / "checkpoint_0000001.pt", {
        **small_checkpoint(), "config": config_to_dict(config), "attempts": attempts})
    assert find_start(config).attempts == (tmp_path / "logs" / "run",)


def test_a_checkpoint_with_changed_bytes_loads_or_is_refused_and_runs_nothing(tmp_path):
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    config = tiny_config(tmp_path, PretrainConfig(**SHARED))
    save_checkpoint(path, {**small_checkpoint(1, 10), "config": config_to_dict(config)})
    content, num_refused = path.read_bytes(), 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 20))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert checkpoint_config(path, load_checkpoint(path))
        except CheckpointError as error:
            assert "checkpoint.pt" in str(error)
            num_refused += 1
    assert 0 < num_refused < 300 and [item.name for item in tmp_path.iterdir()] == ["checkpoint.pt"]


# --- numbers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "critic", "generator"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_none_stops_the_run_with_a_sound_checkpoint(tmp_path, where, value, monkeypatch):
    """In the loss itself, so that the weights of that step are spoilt as well."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr(train, "draw_run", lambda *_: None)
    config = pretraining(tmp_path / "run")
    if where != "loss":
        config = self_forcing(tmp_path / "run", save_untrained(tmp_path / "teacher.pt", config), denoising_steps=[1000])
    trainer = SimplifiedTrainer(config)
    owner, name = (trainer.stage, "_loss") if where == "loss" else (trainer.stage.engine, f"{where}_loss")
    sound, calls = vars(type(owner))[name], []

    def spoil(*arguments: object) -> object:
        calls.append(1)
        result = sound(owner, *arguments)
        if len(calls) < 3:
            return result
        if where == "loss":
            return result[0], result[1] * value
        return result * value if where == "critic" else (result[0] * value, result[1])

    monkeypatch.setattr(owner, name, spoil)
    with pytest.raises(TrainingDiverged, match="is (nan|inf) at step [0-9]: stopped; the last good checkpoint is .* Try") as caught:
        trainer.train()
    kept = Path(one_line(caught).partition("checkpoint is ")[2].partition(". Try")[0])
    step = int(one_line(caught).partition("at step ")[2][0])
    whole = load_checkpoint(kept)
    assert whole["step"] == step
    for state in ("generator_state_dict", "generator_ema_state_dict", "critic_state_dict"):
        assert all(tensor.isfinite().all() for tensor in whole.get(state, {}).values())
    assert find_start(resumed(config)).path == kept


# --- wandb ----------------------------------------------------------------------------------------------------------------

WANDB_KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, ROOT)
from training.config import WandbConfig
from training.run_log import RunLog
log = RunLog(Path(FOLDER), ("loss",), {}, WandbConfig(), "none.png", lambda *_: None)
log.scalars(0, 0.0, {"loss": 1.0})
listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
own = [line.split() for line in listed if int(line.split()[1]) == os.getpid() and "wandb" in line]
assert own, "wandb has no process of its own: nothing is tested"
for line in own:
    os.kill(int(line[0]), signal.SIGKILL)
for step in range(1, 200):
    log.scalars(step, 0.0, {"loss": 1.0})
log.close()
"""


def test_wandb_killed_mid_run_is_one_warning_and_every_figure_is_there(tmp_path):
    script = WANDB_KILLED.replace("ROOT", repr(str(ROOT))).replace("FOLDER", repr(str(tmp_path)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, env={**clean, "HOME": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr  # as the process ends, wandb may print an error of its own
    assert ended.stderr.count("wandb is off for the rest of this run") == 1
    assert len((tmp_path / "scalars.csv").read_text().splitlines()) == 201


def test_wandb_that_cannot_be_reached_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(run_log, "WANDB_TIMEOUT_S", 1.0)
    with pytest.warns(UserWarning, match="wandb is off for the rest of this run .*scalars.csv has every figure") as caught:
        RunLog(tmp_path, ("loss",), {}, WandbConfig(mode="online"), "none.png", lambda *_: None).close()
    assert "\n" not in str(caught[0].message) and len(caught) == 1
    wandb.teardown()


# --- many at once, and many times ------------------------------------------------------------------------------------------


def test_many_runs_started_at_once_have_a_folder_each(tmp_path):
    folders: list[Path] = []
    barrier = threading.Barrier(16)

    def start(name: str | None) -> None:
        barrier.wait()
        for _ in range(5):
            folders.append(make_run_folder(tmp_path, name))

    threads = [threading.Thread(target=start, args=(name,)) for name in ["run", None] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == len(folders) == 80 and all(folder.is_dir() for folder in folders)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_thousand_saves_and_loads_leave_no_memory_file_or_descriptor_behind(tmp_path, monkeypatch):
    if not Path("/proc/self/statm").is_file():
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # most of the time, and nothing of a leak
    path, before = tmp_path / "checkpoint.pt", (0, 0)
    for cycle in range(1100):
        save_checkpoint(path, small_checkpoint(cycle, 10_000))
        assert load_checkpoint(path, is_mapped=cycle % 2 == 0)["step"] == cycle
        if cycle == 99:  # warm by now
            gc.collect()
            before = (resident_bytes(), len(os.listdir("/proc/self/fd")))
    gc.collect()
    assert resident_bytes() - before[0] < 8e6, "40 MB went through"
    assert len(os.listdir("/proc/self/fd")) == before[1] and os.listdir(tmp_path) == [path.name]
