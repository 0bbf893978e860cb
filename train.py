"""Train: `python train.py` for Self-Forcing (default), `python train.py training=pretrain` for the teacher.

Every key can be overridden on the command line, such as `training.num_steps=2000 training.lr=1e-4`; `python train.py
--help` shows them all. Each run has a folder of its own under `logs/training/`.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from config import Config, build_config, config_to_dict, explain_refusal, register_schemas
from metrics import JUDGE_PATH, facts_of_prompts, load_judge, score_videos, summarise
from moving_mnist import MovingMNISTGenerator
from run_log import RunLog, make_run_folder, point_to_latest
from runtime import resolve_runtime
from stages import PretrainStage, SelfForcingStage, Stage
from video_io import comparison_gif, comparison_sheet, to_display

NUM_SHOWN = 6  # prompts in the sample sheets
SAMPLE_SEED = 2**31  # seeds of samples stand far from the indices that training draws
STAGES = {"pretrain": PretrainStage, "dmd2": SelfForcingStage}
BAR_FIGURES = ("loss_bidirectional", "loss_causal", "loss_generator", "loss_critic", "score_distance")


class TrainingDiverged(RuntimeError):
    """A loss or gradient was no longer finite; the message says where, and which checkpoint is the last good one."""


class SimplifiedTrainer:
    """The loop of a run: counts steps, logs, samples and saves; what a step is, its stage knows.

    `train()` returns the folder of the run. Raises TrainingDiverged, CheckpointError, ValueError and OSError, each with
    one line that says what to do.
    """

    def __init__(self, config: Config):
        self.config = config
        self.runtime = resolve_runtime(config.device, config.precision)
        torch.manual_seed(config.seed)  # initial weights; everything later draws from `random`
        random = torch.Generator().manual_seed(config.seed)
        self.stage: Stage = STAGES[config.training.training_type](config, self.runtime, random)
        self.first_step = 0
        self.last_checkpoint: Path | None = None
        if config.training.resume is not None:
            self._resume(Path(config.training.resume))
        held_out = MovingMNISTGenerator(config.dataset, "test")
        self.shown = held_out.sample(SAMPLE_SEED, range(NUM_SHOWN), config.training.max_num_frames)
        self.folder = make_run_folder(Path(config.log_dir), config.run_name)
        self.log = RunLog(self.folder, self.stage.columns, config_to_dict(config), config.wandb)
        self._interval_checkpoints: list[Path] = []

    def _resume(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        if checkpoint["training_type"] != self.config.training.training_type:
            raise ValueError(
                f"training.resume={path} is of training type {checkpoint['training_type']}, this run is "
                f"{self.config.training.training_type}: choose the same training= or another file"
            )
        try:
            self.stage.load_state_dict(checkpoint, str(path))
            self.first_step = int(checkpoint["step"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = explain_refusal(error)
            raise CheckpointError(f"{path} does not hold what resuming needs ({reason}): give an untouched checkpoint of a run") from error
        if self.first_step >= self.config.training.num_steps:
            raise ValueError(f"{path} stands at step {self.first_step}: set training.num_steps above it to go on")
        self.last_checkpoint = path

    def train(self) -> Path:
        """Run all steps. Returns the run's folder."""
        training, start = self.config.training, time.perf_counter()
        print(f"{training.training_type} on {self.runtime}, {training.num_steps} steps, run folder {self.folder}")
        try:
            with tqdm(range(self.first_step, training.num_steps), initial=self.first_step, total=training.num_steps,
                      mininterval=1, dynamic_ncols=True) as bar:
                shown: dict[str, float] = {}
                for step in bar:
                    figures = self.stage.train_step(step)
                    self._check_finite(step, figures)
                    if step % training.log_interval == 0:
                        self.log.scalars(step, time.perf_counter() - start, figures)
                    shown |= {name: figures[name] for name in BAR_FIGURES if name in figures}
                    bar.set_postfix({name.removeprefix("loss_"): f"{value:.3f}" for name, value in shown.items()})
                    self._at_intervals(step + 1)
            self._save(self.folder / "checkpoint_final.pt", training.num_steps)
            point_to_latest(Path(self.config.log_dir) / "checkpoint_final.pt", self.folder / "checkpoint_final.pt")
        finally:
            self.log.close()
        print(f"trained {training.num_steps - self.first_step} steps in {(time.perf_counter() - start) / 60:.1f} minutes")
        self._report_quality()
        return self.folder

    def _check_finite(self, step: int, figures: dict[str, float]) -> None:
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(f"{bad[0]} is {figures[bad[0]]} at step {step}")

    def _diverged(self, finding: str) -> TrainingDiverged:
        kept = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint was due yet"
        return TrainingDiverged(f"{finding}: stopped; {kept}. Try a lower learning rate")

    def _at_intervals(self, step: int) -> None:
        """What is due after `step` finished steps; at the last step the end of the run takes over the checkpoint."""
        training = self.config.training
        if training.sample_interval and step % training.sample_interval == 0 or step == training.num_steps:
            self._show_samples(step)
        if training.checkpoint_interval and step % training.checkpoint_interval == 0 and step < training.num_steps:
            path = self.folder / f"checkpoint_{step:07d}.pt"
            self._save(path, step)
            self._interval_checkpoints.append(path)
            while len(self._interval_checkpoints) > training.keep_last:
                self._interval_checkpoints.pop(0).unlink(missing_ok=True)

    def _save(self, path: Path, step: int) -> None:
        for name, module in self.stage.networks().items():  # a finite loss can end in an update that is not
            if not all(parameter.isfinite().all() for parameter in module.parameters()):
                raise self._diverged(f"a weight of the {name} is not finite after {step} steps")
        checkpoint = {
            "step": step, "training_type": self.config.training.training_type, "config": config_to_dict(self.config),
            **self.stage.state_dict(),
        }
        save_checkpoint(path, checkpoint)
        self.last_checkpoint = path

    def _show_samples(self, step: int) -> None:
        """Real videos and each sampler's, for the same held-out prompts: a sheet and an animation."""
        seeds = [SAMPLE_SEED + index for index in range(NUM_SHOWN)]
        samples = self.stage.sample(self.shown.captions, seeds, self.config.training.max_num_frames)
        groups = [("real", to_display(self.shown.video))] + [(name, to_display(video.cpu())) for name, video in samples.items()]
        folder = self.folder / "samples"
        comparison_sheet(folder / f"step_{step:07d}.png", groups, self.shown.captions)
        comparison_gif(folder / f"step_{step:07d}.gif", groups, self.shown.captions)
        self.log.media(step, "samples", folder / f"step_{step:07d}.png")

    def _report_quality(self) -> None:
        """Let the judge read fresh samples on held-out prompts and print one line per sampler."""
        training, dataset = self.config.training, self.config.dataset
        if training.eval_videos == 0 or dataset.num_digits != 1 or dataset.frame_size != 32:
            return  # the judge that ships reads one digit on 32-pixel frames
        judge = load_judge(JUDGE_PATH, self.runtime.device)
        prompts = MovingMNISTGenerator(dataset, "test").captions(SAMPLE_SEED + 1, range(training.eval_videos))
        digits, directions = facts_of_prompts(prompts)
        videos: dict[str, list[torch.Tensor]] = {}
        for first in range(0, len(prompts), 32):
            seeds = [SAMPLE_SEED + 1000 + index for index in range(first, min(first + 32, len(prompts)))]
            for name, video in self.stage.sample(prompts[first: first + 32], seeds, training.max_num_frames).items():
                videos.setdefault(name, []).append(video)
        for name, parts in videos.items():
            summary = summarise(score_videos(judge, torch.cat(parts), digits, directions, dataset))
            print(
                f"{name:>20}: frames right {summary['frames_right']:.3f}, one class throughout {summary['one_class']:.3f}, "
                f"track within 1 px {summary['track_within_1px']:.3f}, direction obeyed {summary['direction_obeyed']:.3f} "
                f"({len(prompts)} videos)"
            )


register_schemas()


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "configs"), config_name="train")
def main(composed: DictConfig) -> None:
    try:
        SimplifiedTrainer(build_config(composed)).train()
    except (TrainingDiverged, ValueError, OSError, ImportError, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain_refusal(error) if isinstance(error, OmegaConfBaseException) else error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the run's folder keeps its interval checkpoints")


def run_command_line() -> None:
    """`main`, where what Hydra refuses is one line too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its refusals, instead of printing a page and exiting
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain_refusal(error)}")


if __name__ == "__main__":
    run_command_line()
