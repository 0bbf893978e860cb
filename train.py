"""Train: `python train.py` for Self-Forcing (default), `python train.py training=pretrain` for the teacher.

Every key can be overridden, such as `training.num_steps=2000`; `python train.py --help` shows them all. Each run has its own folder
under `logs/training/`.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from judging.digit_judge import JUDGE_PATH, DigitJudge, load_judge, warn_of_foreign_digits
from judging.health import draw_run
from judging.metrics import facts_of_prompts, score_videos, summarise
from judging.prompts import JUDGED_COLUMNS, FixedPrompts
from machine.interruption import EXIT_INTERRUPTED, RunInterrupted, StopRequest
from machine.paths import CONFIGS
from machine.runtime import resolve_runtime
from machine.seeds import Purpose, seed_global_generators, torch_generator, video_seeds
from sampling.samplers import sample
from sampling.video_io import comparison_gif, comparison_sheet, to_display
from training.checkpoint import CheckpointError, checkpoint_config, save_checkpoint
from training.config import Config, build_config, check_choices, config_to_dict, explain_command_line, explain_refusal, register_schemas
from training.data import open_data, with_vocabulary
from training.distributed import ONE_PROCESS, Processes, losses_named, mean_figures, processes_of_environment
from training.few_step import FewStepStage
from training.resumable import Stage
from training.resume import RunClaim, RunFinished, choose_format, find_common_start, global_random_states, restore_global_random_states
from training.run_log import RunLog, SilentLog, draw_curves, make_run_folder, point_to_latest
from training.sharding import whole
from training.stages import PretrainStage, SelfForcingStage, rate_factor
from training.starting_networks import check_same_networks
from training.watchdog import Watchdog

NUM_SHOWN = 6  # prompts in the sample sheets
EVAL_BATCH = 32
RATE_LEAP = 1.5  # factor by which a resumed run's rates may rise without a message
MIN_JUDGED_FRAMES = 3  # of a track
REPORTED = {
    "frames_right": "frames right", "one_class": "one class throughout", "track_within_1px": "track within 1 px",
    "direction_obeyed": "direction obeyed",
}
STAGES = {"pretrain": PretrainStage, "dmd2": SelfForcingStage, "causal_ode": FewStepStage, "causal_consistency": FewStepStage}
BAR_FIGURES = ("loss_bidirectional", "loss_causal", "loss_generator", "loss_critic", "loss_few_step", "score_distance")
ALL_DONE = "all steps were done; samples and figures of the finished network are left out"


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight is not finite; the message says where, and which checkpoint is the last good one."""


class SimplifiedTrainer:
    """The loop of a run: counts steps, logs, samples and saves; the stage defines one training step.

    Raises TrainingDiverged, CheckpointError, ValueError and OSError, each with one line that says what to do; RunInterrupted after
    SIGTERM or Ctrl-C, with everything saved; RunFinished if training.resume=auto finds nothing left to do."""

    def __init__(self, config: Config, processes: Processes = ONE_PROCESS):
        # 1. The device, and what the run continues.
        self.config = config = with_vocabulary(config)
        training, self.processes = config.training, processes
        runtime = resolve_runtime(config.device, config.precision)
        runtime = replace(runtime, device=processes.own_device(runtime.device))
        processes.join(runtime.device)
        start = find_common_start(config, processes)
        dtype = processes.from_first(lambda: choose_format(runtime, start, config.precision))  # auto may differ between processors
        self.runtime = replace(runtime, dtype=dtype)
        self.claim = RunClaim()
        self._interval_checkpoints = self.claim.add_attempts(start) if start is not None and processes.is_first else []
        # 2. The networks and their state.
        seed_global_generators(config.seed)  # initial weights; everything later draws from `random`
        random = torch_generator(config.seed, Purpose.TRAINING)
        self.stage: Stage = STAGES[training.training_type](config, self.runtime, random, processes)
        self.watchdog, self.first_step = Watchdog(), 0
        self.last_checkpoint: Path | None = None
        if start is not None:
            self._resume(start.path, start.checkpoint)
        self.global_random_states = global_random_states()  # of the first step; what is built below may draw from them
        # 3. What the run samples, and who judges it.
        is_self_forcing = isinstance(self.stage, SelfForcingStage)
        self.health_interval = training.health_interval if is_self_forcing else 0
        self.samples_here = processes.is_first or training.sharding != "none"  # a sharded network runs in all processes or in none
        self.judge = self._load_judge()
        self.fixed_prompts: FixedPrompts | None = None
        if self.judge is not None and self.health_interval > 0:
            draw_videos = partial(sample, self.stage.live(), runtime=self.runtime)
            self.fixed_prompts = FixedPrompts(self.judge, config.dataset, training.max_num_frames, draw_videos)
        held_out = open_data(config.dataset, "test", purpose=Purpose.RUN_SAMPLE)
        self.shown = held_out.sample(0, range(NUM_SHOWN), training.max_num_frames)
        # 4. The folder and the log.
        self.folder = processes.from_first(lambda: make_run_folder(Path(config.log_dir), config.run_name))
        self.attempts = [*(folder.name for folder in (start.attempts if start else ())), self.folder.name]
        self.facts_of_runtime = {"device": self.runtime.device.type, "precision": self.runtime.precision}  # what auto was resolved to
        self.log: RunLog | SilentLog = SilentLog()
        if processes.is_first:
            self.claim.add(self.folder)
            columns = self.stage.columns if self.fixed_prompts is None else (*self.stage.columns, *JUDGED_COLUMNS)
            picture = ("health.png", draw_run) if is_self_forcing else ("curves.png", draw_curves)
            facts = {**config_to_dict(config), "runtime": self.facts_of_runtime}
            wandb_run_id = start.checkpoint.get("wandb_run_id") if start else None
            self.log = RunLog(self.folder, columns, facts, config.wandb, *picture, wandb_run_id)

    def _load_judge(self) -> DigitJudge | None:
        """The judge that ships; None, with a printed line, if it cannot read this run's videos."""
        training, dataset = self.config.training, self.config.dataset
        if not self.samples_here or training.eval_videos == 0 and self.health_interval == 0:
            return None
        reason = dataset.why_no_digits
        if reason is None:
            judge = load_judge(JUDGE_PATH, self.runtime.device)
            sizes = (judge.config.frame_size, judge.config.digit_size)
            if training.max_num_frames >= MIN_JUDGED_FRAMES and (dataset.num_digits, dataset.frame_size, dataset.digit_size) == (1, *sizes):
                warn_of_foreign_digits(judge, dataset)
                return judge
            reason = f"the judge reads one digit of {sizes[1]} px on {sizes[0]} px frames, in videos of at least {MIN_JUDGED_FRAMES} frames"
        self._say(f"no figures of digits ({', '.join(REPORTED.values())}, stroke mass): {reason}")
        return None

    def _resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        training = self.config.training
        if checkpoint["training_type"] != training.training_type:
            raise ValueError(f"training.resume={path} is of training type {checkpoint['training_type']}, this run is "
                             f"{training.training_type}: choose the same training= or another file")
        stored = checkpoint_config(path, checkpoint)
        check_same_networks(path, stored, self.config)
        try:
            self.stage.load_state_dict(checkpoint, str(path))
            self.first_step = int(checkpoint["step"])
            if "watchdog" in checkpoint:  # earlier versions had none
                self.watchdog = Watchdog.from_state(checkpoint["watchdog"])
            if "global_random_states" in checkpoint:  # earlier versions had none
                by_process = checkpoint.get("random_states_by_process", [])
                is_same_number = len(by_process) == self.processes.count
                restore_global_random_states(by_process[self.processes.rank] if is_same_number else checkpoint["global_random_states"])
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            reason = explain_refusal(error)
            raise CheckpointError(f"{path} does not hold what resuming needs ({reason}): give an untouched checkpoint of a run") from error
        if self.first_step >= training.num_steps:
            raise ValueError(f"{path} is already at step {self.first_step}: set training.num_steps above it to continue")
        self.last_checkpoint = path
        # The decay belongs to the end of a run: with more steps than before, rates that had fallen rise again.
        then_steps = stored.training.num_steps
        then, now = (rate_factor(replace(training, num_steps=steps), self.first_step - 1) for steps in (then_steps, training.num_steps))
        if now > RATE_LEAP * then:
            self._say(f"{path} is of a run of {then_steps} steps, whose rates had fallen to {then:.2g} of training.lr; with "
                      f"training.num_steps={training.num_steps} they continue from {now:.2g} of it: consider a lower training.lr")

    def train(self) -> Path:
        """Run all steps. Returns the run's folder."""
        training, start = self.config.training, time.perf_counter()
        several = f" in {self.processes.count} processes" if self.processes.count > 1 else ""
        self._say(f"{training.training_type}: {training.summary}; on {self.runtime}{several}, {training.num_steps} steps, "
                  f"run folder {self.folder}")
        restore_global_random_states(self.global_random_states)
        try:
            with losses_named(), StopRequest(is_silent=not self.processes.is_first) as stop:
                self._run_steps(stop, start)
                self._save(self.folder / "checkpoint_final.pt", training.num_steps)
                if self.processes.is_first:
                    point_to_latest(Path(self.config.log_dir) / "checkpoint_final.pt", self.folder / "checkpoint_final.pt")
            reason = self._agree({}, stop)[1]
            if reason is None and self.samples_here:
                self._show_samples(training.num_steps)
                self.log.verdict(self.watchdog.verdict())
        except OSError as error:
            raise OSError(f"{error}: stopped; {self._kept()}") from error
        finally:
            self.log.close()
            self.claim.release()
        if reason is not None:
            self._say(f"{reason}: {ALL_DONE}")
        elif self.samples_here:
            self._say(f"trained {training.num_steps - self.first_step} steps in {(time.perf_counter() - start) / 60:.1f} minutes")
            self._report_quality()
            if verdict := self.watchdog.verdict():
                self._say(verdict)
        return self.folder

    def _run_steps(self, stop: StopRequest, start: float) -> None:
        """The remaining steps, with what is due between them. start: `time.perf_counter` when the run began."""
        training = self.config.training
        shown: dict[str, float] = {}
        unlogged: dict[str, float] = {}  # the newest of each figure since the last row: some come only every few steps
        with tqdm(range(self.first_step, training.num_steps), initial=self.first_step, total=training.num_steps,
                  mininterval=1, dynamic_ncols=True, disable=not self.processes.is_first) as bar:
            for step in bar:
                figures, reason = self._agree(self.stage.train_step(step), stop)
                for name, value in figures.items():
                    if not math.isfinite(value):
                        raise self._diverged(f"{name} is {value} at step {step}")
                self._watch(step, figures)
                unlogged |= figures
                if (step + 1) % training.log_interval == 0 or step + 1 == training.num_steps or reason is not None:
                    self.log.scalars(step, time.perf_counter() - start, unlogged)
                    unlogged = {}
                shown |= {name: figures[name] for name in BAR_FIGURES if name in figures}
                bar.set_postfix({name.removeprefix("loss_"): f"{value:.3f}" for name, value in shown.items()})
                self._at_intervals(step + 1, reason)

    def _agree(self, figures: dict[str, float], stop: StopRequest) -> tuple[dict[str, float], str | None]:
        """The mean of the processes' figures, and why to stop if any of them is asked to; the same in all of them."""
        answers = self.processes.gather((figures, stop.reason))
        return mean_figures([figures for figures, _ in answers]), next((reason for _, reason in answers if reason is not None), None)

    def _say(self, words: str) -> None:
        if self.processes.is_first:
            print(words)

    def _watch(self, step: int, figures: dict[str, float]) -> None:
        """At the start, at intervals and at the end add to the figures what the judge reads in the live generator's videos of the fixed
        prompts. Print the watchdog's lines, and save the checkpoint of the best reading unless it is the last."""
        finished, interval, num_steps = step + 1, self.health_interval, self.config.training.num_steps
        is_due = interval > 0 and (finished == 1 or finished % interval == 0 or finished == num_steps)
        if is_due and self.fixed_prompts is not None:
            self._check_weights(finished)
            figures |= self.fixed_prompts.read()
        for line in self.watchdog.observe(step, figures):
            if self.processes.is_first:
                tqdm.write(line)
        if is_due and finished < num_steps and self.processes.from_first(lambda: "frames_right" in figures and self.watchdog.is_best):
            self._save(self.folder / "checkpoint_best.pt", finished)

    def _diverged(self, finding: str) -> TrainingDiverged:
        return TrainingDiverged(f"{finding}: stopped; {self._kept()}. Try a lower learning rate")

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint was due yet"

    def _at_intervals(self, step: int, stop_reason: str | None) -> None:
        """What is due after `step` finished steps, unless all are done: first a checkpoint. Raises RunInterrupted, once that is written, if
        the run is asked to stop."""
        training = self.config.training
        if step == training.num_steps:
            return
        if stop_reason is not None or (training.checkpoint_interval and step % training.checkpoint_interval == 0):
            path = self.folder / f"checkpoint_{step:07d}.pt"
            self._save(path, step)
            if self.processes.is_first:
                self._interval_checkpoints.append(path)
            while len(self._interval_checkpoints) > training.keep_last:
                self._interval_checkpoints.pop(0).unlink(missing_ok=True)
        if stop_reason is not None:
            raise RunInterrupted(f"{stop_reason}: stopped after {step} of {training.num_steps} steps, saved {self.last_checkpoint}")
        if training.sample_interval and step % training.sample_interval == 0 and self.samples_here:
            self._check_weights(step)
            self._show_samples(step)
            self.log.draw()

    def _check_weights(self, step: int) -> None:
        for name, module in self.stage.networks().items():  # the update of a finite loss can overflow
            if not all(whole(parameter.detach().isfinite().all()) for parameter in module.parameters()):
                raise self._diverged(f"a weight of the {name} is not finite after {step} steps")

    def _save(self, path: Path, step: int) -> None:
        self._check_weights(step)
        own_states = global_random_states()
        checkpoint = {
            "step": step, "training_type": self.config.training.training_type, "config": config_to_dict(self.config),
            **self.stage.state_dict(), "runtime": self.facts_of_runtime, "global_random_states": own_states,
            "wandb_run_id": self.log.wandb_run_id, "attempts": self.attempts, "watchdog": self.watchdog.state_dict(),
        }
        if self.processes.count > 1:
            checkpoint["random_states_by_process"] = self.processes.gather(own_states)
        if self.processes.is_first:
            save_checkpoint(path, checkpoint)
        self.processes.gather(None)  # none continues, or ends, before the file is whole
        self.last_checkpoint = path

    def _show_samples(self, step: int) -> None:
        """Real videos and each sampler's, for the same held-out prompts: a sheet and an animation."""
        seeds = video_seeds(0, range(NUM_SHOWN), Purpose.RUN_SAMPLE_NOISE)  # the same in every run, so that runs can be compared
        num_frames = self.config.training.max_num_frames
        samplers = self.stage.shown()
        samples = {name: sample(each, self.shown.captions, seeds, num_frames, self.runtime) for name, each in samplers.items()}
        if not self.processes.is_first:
            return
        groups = [("real", to_display(self.shown.video))] + [(name, to_display(video.cpu())) for name, video in samples.items()]
        sheet = self.folder / "samples" / f"step_{step:07d}.png"
        comparison_sheet(sheet, groups, self.shown.captions)
        comparison_gif(sheet.with_suffix(".gif"), groups, self.shown.captions)
        self.log.media(step, "samples", sheet)

    def _report_quality(self) -> None:
        """Print one line per sampler: what the judge reads in its videos of held-out prompts."""
        if self.judge is None or self.config.training.eval_videos == 0:
            return
        training, dataset = self.config.training, self.config.dataset
        held_out = open_data(dataset, "test", purpose=Purpose.RUN_FIGURES)
        prompts = held_out.captions(0, range(training.eval_videos))
        seeds = video_seeds(0, range(training.eval_videos), Purpose.RUN_FIGURES_NOISE)
        digits, directions = facts_of_prompts(prompts)
        parts = [slice(first, first + EVAL_BATCH) for first in range(0, len(prompts), EVAL_BATCH)]
        self._say(self.judge.describe())
        for name, sampler in self.stage.shown().items():
            videos = [sample(sampler, prompts[part], seeds[part], training.max_num_frames, self.runtime) for part in parts]
            summary = summarise(score_videos(self.judge, torch.cat(videos), digits, directions, dataset))
            figures = ", ".join(f"{title} {summary[key]:.3f}" for key, title in REPORTED.items() if key in summary)
            self._say(f"{name:>20}: {figures} ({len(prompts)} videos)")


register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(composed: DictConfig) -> None:
    processes, trainer = ONE_PROCESS, None
    try:
        processes = processes_of_environment()
        trainer = SimplifiedTrainer(build_config(composed), processes)
        trainer.train()
        processes.leave()
    except RunFinished as finished:
        if processes.is_first:
            print(finished)
        return
    except RunInterrupted as interrupted:
        if processes.may_speak():
            kept = [override for override in HydraConfig.get().overrides.task if not override.startswith("training.resume=")]
            print(f"{interrupted}; go on with: {shlex.join(['python', 'train.py', *kept, 'training.resume=auto'])}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (TrainingDiverged, ValueError, OSError, ImportError, OmegaConfBaseException) as error:
        reason = explain_command_line(error, sys.argv[1:]) if isinstance(error, OmegaConfBaseException) else error
        sys.exit(f"error: {reason}" if processes.may_speak() else 1)
    except KeyboardInterrupt:
        if trainer is not None and trainer.last_checkpoint == trainer.folder / "checkpoint_final.pt":
            if processes.may_speak():
                print(f"Ctrl-C: {ALL_DONE}")
            return
        print("interrupted; training.resume=auto goes on from the newest checkpoint, where there is one", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def run_command_line() -> None:
    """`main`, with one line also for what Hydra refuses."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its refusals, instead of printing a page and exiting
    moved = [argument for argument in sys.argv[1:] if argument == "experiment=table2" or argument.lstrip("+").startswith("experiment.")]
    if moved:
        options = [argument.removeprefix("experiment.") for argument in sys.argv[1:] if argument != "experiment=table2"]
        sys.exit(f"error: {moved[0]}: the comparison has moved: {shlex.join(['python', '-m', 'experiments.comparison', *options])}")
    try:
        check_choices(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException, OverflowError, ValueError) as error:  # Hydra lets bare ones of Python through
        sys.exit(f"error: {explain_command_line(error, sys.argv[1:])}")


if __name__ == "__main__":
    run_command_line()
