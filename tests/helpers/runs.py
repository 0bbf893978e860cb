"""Configurations of tiny runs of train.py."""

import csv
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from helpers.stages import run_config

import train
from machine.paths import REPOSITORY
from train import SimplifiedTrainer
from training.config import Config, PretrainConfig, SelfForcingConfig, WandbConfig

SHARED = {
    "num_steps": 6, "batch_size": 2, "min_num_frames": 6, "max_num_frames": 9, "sample_interval": 0, "checkpoint_interval": 4,
    "eval_videos": 0, "teacher_steps": 2,
}
TRAINING = {**SHARED, "max_num_frames": 6, "checkpoint_interval": 1}  # 6 steps
OF_THE_ATTEMPT = {"config", "attempts", "wandb_run_id"}  # keys that two attempts at one run do not share
TINY = [
    "device=cpu", "wandb.mode=disabled", "model.frame_size=16", "model.width=24", "model.num_layers=1", "model.num_heads=2",
    "model.patch_size=[1,8,8]", "dataset.frame_size=16", "dataset.digit_size=8", "training.num_steps=1", "training.batch_size=2",
    "training.min_num_frames=3", "training.max_num_frames=3", "training.teacher_steps=1",
]


def tiny_config(log_dir: Path, training: PretrainConfig | SelfForcingConfig) -> Config:
    here = {"device": "cpu", "precision": "float32", "log_dir": str(log_dir), "run_name": "run"}
    return replace(run_config(training), **here, wandb=WandbConfig(mode="disabled"))


def pretraining(log_dir: Path, **changes: object) -> Config:
    return tiny_config(log_dir, PretrainConfig(**{**TRAINING, **changes}))


def self_forcing(log_dir: Path, teacher: Path, **changes: object) -> Config:
    common = {"denoising_steps": [1000, 500], "gradient_frames": 6, "dfake_gen_update_ratio": 2, "critic_warmup_steps": 1}
    return tiny_config(log_dir, SelfForcingConfig(**{**TRAINING, "pretrained_checkpoint": str(teacher), **common, **changes}))


def resumed(config: Config, how: str | Path = "auto") -> Config:
    return replace(config, training=replace(config.training, resume=str(how)))


def stopping_after(
    trainer: SimplifiedTrainer, last_step: int | None, draws: list[float], number: int = signal.SIGTERM, num_draws: int = 1
) -> SimplifiedTrainer:
    """Let the trainer draw from every global generator in each step, and ask it to stop in the middle of one."""
    sound_step = trainer.stage.train_step

    def step_and_draw(step: int) -> dict[str, float]:
        figures = sound_step(step)
        for _ in range(num_draws):
            draws.append(float(torch.rand(())) + np.random.rand() + random.random() + random.gauss(0, 1) + np.random.randn())
        if step == last_step:
            os.kill(os.getpid(), number)
        return figures

    trainer.stage.train_step = step_and_draw
    return trainer


def command_line(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    train.run_command_line()


def start_training(log_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """A process of train.py on a tiny pretraining, as a user starts it."""
    common = ["training=pretrain", *TINY, "training.checkpoint_interval=20", "training.eval_videos=0", "training.sample_interval=0",
              f"log_dir={log_dir}", "run_name=run"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *common, *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The figures that a run wrote, step by step."""
    with open(folder / "scalars.csv", newline="") as file:
        return list(csv.DictReader(file))
