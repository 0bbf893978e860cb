"""Many trainings with equal compute, their scores, and one table: `python -m experiments.comparison`.

    python -m experiments.comparison budget=320 num_videos=64 'blocks=[3]' 'rows=[tf,sf_dmd]'

Trainings and scorings are jobs: child processes of train.py and evaluate.py, `processes` at a time, each with a folder of its
own under `folder` whose name ends in a fingerprint of all its settings. So what is done is known by its files, other settings
never meet, and the same command goes on where an earlier one stopped. The table is written again after every job; what stands
in it with the same settings is done too, also where its folder is gone, so a published table can be added to.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.comparison_settings import PARADIGMS, REAL, ROWS, YARDSTICK, ComparisonConfig, Sampler
from machine.paths import CONFIGS, REPOSITORY
from training.command_line import answer_help, run_in_one_line

if __name__ == "__main__":
    answer_help("comparison", __doc__, ComparisonConfig)  # before torch, which takes seconds, is loaded

from experiments.comparison_jobs import UNFINISHED, Job, Score, Training, fingerprint, quote, stop  # noqa: E402
from experiments.comparison_report import put_by, read_table, results_of, write_table  # noqa: E402
from experiments.compute import flops_per_step  # noqa: E402
from judging.held_out import JUDGED_CODE  # noqa: E402
from machine.interruption import EXIT_INTERRUPTED  # noqa: E402
from machine.runtime import code_digest, describe_machine, file_digest, resolve_runtime  # noqa: E402
from sampling.samplers import SamplerSettings  # noqa: E402
from training.checkpoint import checkpoint_config, load_checkpoint  # noqa: E402
from training.config import Config, build_config, register_schemas  # noqa: E402
from training.resume import describe_difference, settings_without  # noqa: E402

SCRIPTS = REPOSITORY  # where train.py and evaluate.py stand
SECONDS_BETWEEN_LOOKS = 0.2
NOT_OF_THE_RESULT = ("log_dir", "run_name", "wandb", "training.pretrained_checkpoint", "training.checkpoint_interval",
                     "training.keep_last", "training.log_interval", "training.resume")  # keys of a run that change no weight
NOT_OF_A_STEP = (  # settings of a training that change no FLOP of its steps
    "teacher", "seed", "training.num_steps", "training.lr", "training.muon_lr", "device", "precision",
)
TRAINED_CODE = ("training.stages", "training.few_step_stage")  # what makes a training's weights, with all that these import


class Comparison:
    """The jobs of one configuration and the table of what they have found so far. Raises ValueError and OSError.

    chosen: further overrides of train.py, by paradigm and block size (`choose_settings`); none where none are given.
    """

    def __init__(self, config: ComparisonConfig, chosen: dict[tuple[str, int], str] | None = None):
        runtime = resolve_runtime(config.device, config.precision)  # once, for all jobs: auto is decided by timing
        self.config = replace(config, device=runtime.device.type, precision=runtime.precision)
        self.chosen = chosen or {}
        self.folder, self.output_dir = Path(self.config.folder), Path(self.config.output_dir)
        self.teacher = Path(self.config.teacher)
        if not self.teacher.is_absolute() and not self.teacher.exists():
            self.teacher = REPOSITORY / self.teacher
        if not self.teacher.is_file():
            raise ValueError(f"teacher is {self.config.teacher}: no such checkpoint; expected a pretrained network")
        self.teacher_digest = file_digest(self.teacher)
        self.teacher_training = checkpoint_config(self.teacher, load_checkpoint(self.teacher, is_mapped=True)).training
        self.code = {"training": code_digest(*TRAINED_CODE), "score": code_digest(*JUDGED_CODE), "flops": code_digest("experiments.compute")}
        self.num_threads = max((os.cpu_count() or 1) // self.config.processes, 1)
        self.machine = describe_machine(self.num_threads)
        for folder in (self.folder, self.output_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.earlier = read_table(self.output_dir, self.config.name)
        self.trainings = self._plan_trainings()
        self.scores = [self._plan_score(row, None) for row in self.config.rows if row != REAL and ROWS[row].paradigm is None]
        self.scores += [self._plan_score(row, training) for row in self.config.rows for training in self.trainings
                        if training.paradigm == ROWS[row].paradigm]
        self.jobs = self._in_order()
        self.failed: dict[str, str] = {}  # one line each, by label

    # --- planning -----------------------------------------------------------------------------------------------------

    def _plan_trainings(self) -> list[Training]:
        trainings = []
        for block in self.config.blocks:
            budget = self.config.budget * self._flops(YARDSTICK, block, "")  # of the yardstick as it is, whatever is chosen for it
            for paradigm in self.config.paradigms:
                flops = self._flops(paradigm, block, self._chosen(paradigm, block))
                trainings += [self._plan_training(paradigm, block, seed, flops, budget) for seed in self.config.seeds]
        return trainings

    def _plan_training(self, paradigm: str, block: int, seed: int, flops: float, budget: float) -> Training:
        overrides = [*self._overrides(paradigm, block, self._chosen(paradigm, block)), f"training.num_steps={num_steps(budget, flops)}", f"seed={seed}"]
        config = compose_run(overrides)
        settings = {"teacher": self.teacher_digest, "code_sha256": self.code["training"], **settings_of_result(config)}
        return Training(
            f"training {paradigm}, {blocks_of(block)}, seed {seed}, {config.training.num_steps} steps", paradigm, block, seed, config,
            overrides, self.config.checkpoint_interval, self._own_folder("trainings", f"{paradigm}-block{block}-seed{seed}", settings),
            settings, flops,
        )

    def _chosen(self, paradigm: str, block: int) -> str:
        return self.chosen[paradigm, block] if (paradigm, block) in self.chosen else ""

    def _overrides(self, paradigm: str, block: int, candidate: str) -> list[str]:
        """Of train.py, all but the seed and the number of steps; later ones win."""
        config = self.config
        overrides = [
            *PARADIGMS[paradigm], *config.overrides["all"], *config.overrides[paradigm],
            f"training.num_frames_per_block={block}", f"training.min_num_frames={config.num_frames}",
            f"training.max_num_frames={config.num_frames}", f"training.pretrained_checkpoint={quote(self.teacher)}",
            "training.sample_interval=0", "training.eval_videos=0", f"device={config.device}", f"precision={config.precision}",
        ]
        return overrides + multiplied(candidate.split(), overrides)

    def _flops(self, paradigm: str, block: int, candidate: str) -> float:
        """Of a training step: as an earlier table has it, or else counted once and kept beside the table."""
        path = self.output_dir / f"{self.config.name}_flops.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        config = compose_run(self._overrides(paradigm, block, candidate))
        settings = {"code_sha256": self.code["flops"], **settings_of_result(config)}
        for key in NOT_OF_A_STEP:
            settings.pop(key, None)
        for each in [] if self.earlier is None else self.earlier["trainings"]:
            stored = {key: value for key, value in each["settings"].items() if key not in NOT_OF_A_STEP}
            is_same_code = "flops_code_sha256" in each and each["flops_code_sha256"] == self.code["flops"]
            if (each["paradigm"], each["block"]) == (paradigm, block) and is_same_code and stored | {"code_sha256": self.code["flops"]} == settings:
                return each["gflops_per_step"] * 1e9
        name = f"{paradigm}-block{block}-{fingerprint(settings)}"
        if name not in kept:
            start = time.perf_counter()
            kept[name] = flops_per_step(config)
            print(f"counted {kept[name] / 1e9:.1f} GFLOP a step of {paradigm}, {blocks_of(block)} "
                  f"({time.perf_counter() - start:.0f} seconds)", flush=True)
            path.write_text(json.dumps(kept, indent=1) + "\n")
        return kept[name]

    def _plan_score(self, row: str, training: Training | None) -> Score:
        config = self.config
        asked = settings_of_sampler(ROWS[row].sampler, config)
        options = [f"num_videos={config.num_videos}", f"num_frames={config.num_frames}", f"seed={config.score_seed}",
                   f"batch_size={config.batch_size}", f"device={config.device}", f"precision={config.precision}"]
        options += [f"{key}={value}".replace(" ", "") for key, value in options_of_sampler(asked).items()]
        settings = {
            "plan": plain(asdict(asked.make_plan(self.teacher_training if training is None else training.config.training))),
            "num_videos": config.num_videos, "num_frames": config.num_frames, "seed": config.score_seed, "batch_size": config.batch_size,
            "device": config.device, "precision": config.precision, "code_sha256": self.code["score"],
            "network": self.teacher_digest if training is None else training.settings,
        }
        if training is None:
            folder = self._own_folder("scores", row, settings)
            set_aside_if_stale(folder, self.teacher)
            return Score(f"scoring {row}", row, 0, 0, self.teacher, options, folder, settings, self._kept(row, None, settings))
        name = f"{row}-block{training.block}-seed{training.seed}"
        folder = self._own_folder("scores", name, settings)
        set_aside_if_stale(folder, training.checkpoint)
        return Score(
            f"scoring {row}, {blocks_of(training.block)}, seed {training.seed}", row, training.block, training.seed, training.checkpoint,
            options, folder, settings, self._kept(row, training, settings), needs=training,
        )

    def _kept(self, row: str, training: Training | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """The figures in the earlier table, if they were made with these settings, of this very network; else one line says why not."""
        results, place, real = results_of(self.earlier), place_of(row, training), (REAL, "0", "0")
        if place not in results or (REAL in self.config.rows and real not in results):
            return None
        stored = results[place]
        difference = describe_difference(stored["made_with"], settings) if "made_with" in stored else "what made it is not recorded"
        checkpoint = self.teacher if training is None else training.checkpoint
        if not difference and checkpoint.exists() and stored["checkpoint_sha256"] != file_digest(checkpoint):
            difference = f"another {checkpoint}"
        if difference:
            print(f"{row}, {'the file itself' if training is None else blocks_of(training.block)}: not taken from the earlier table: "
                  f"{difference[:200]}", flush=True)
            return None
        return {"network": stored, **({REAL: results[real]} if real in results else {})}

    def _own_folder(self, kind: str, name: str, settings: dict[str, Any]) -> Path:
        return self.folder / kind / f"{name}-{fingerprint(settings)}"

    def _in_order(self) -> list[Job]:
        """Every training with its scores behind it, so that a table cut short has whole rows."""
        jobs: list[Job] = [score for score in self.scores if score.needs is None]
        for training in self.trainings:
            jobs += [training, *(score for score in self.scores if score.needs is training)]
        return jobs

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Do what is not done yet; returns the number of jobs that failed. Raises KeyboardInterrupt with a line on how to go on."""
        waiting = [job for job in self.jobs if not (job.is_done() or self._is_needless(job))]
        shown = {place_of(score.row, score.needs) for score in self.scores if score.kept is not None}
        put_by(self.output_dir, self.config.name, self.earlier, shown)
        print(f"{len(self.jobs)} jobs, {len(self.jobs) - len(waiting)} done before; {self.config.processes} at a time with "
              f"{self.num_threads} threads; folder {self.folder}", flush=True)
        self.write()
        running: list[tuple[Job, subprocess.Popen[bytes], float]] = []
        terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the children would outlive this process
        try:
            while waiting or running:
                while len(running) < self.config.processes and (job := self._next(waiting)) is not None:
                    waiting.remove(job)
                    running.append((job, self._start(job), time.perf_counter()))
                for item in [item for item in running if item[1].poll() is not None]:
                    running.remove(item)
                    self._end(item[0], item[1].returncode, time.perf_counter() - item[2])
                waiting = self._drop_hopeless(waiting)
                if running:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            num_done = sum(job.is_done() for job in self.jobs)
            raise KeyboardInterrupt(f"interrupted: {num_done} of {len(self.jobs)} jobs are done; the same command goes on") from None
        finally:
            signal.signal(signal.SIGTERM, terminated)
            stop([process for _, process, _ in running])
        print(f"wrote {self.config.name}.json, .md and .png to {self.output_dir}")
        return len(self.failed)

    def _is_needless(self, job: Job) -> bool:
        """Whether it is a training whose scores are all there."""
        return isinstance(job, Training) and all(score.is_done() for score in self.scores if score.needs is job)

    def _next(self, waiting: list[Job]) -> Job | None:
        return next((job for job in waiting if job.needs is None or job.needs.is_done()), None)

    def _drop_hopeless(self, waiting: list[Job]) -> list[Job]:
        """Of the jobs that wait, those whose training has not failed."""
        kept = [job for job in waiting if job.needs is None or job.needs.label not in self.failed]
        for job in waiting:
            if job not in kept:
                self.failed[job.label] = "its training failed"
                self._say(job, "not done: its training failed")
        if len(kept) < len(waiting):
            self.write()
        return kept

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        for other in sorted(job.folder.parent.glob(f"{job.folder.name.rpartition('-')[0]}-*")):
            is_other = other.name != job.folder.name and other.suffix != UNFINISHED
            if is_other and (other / "settings.json").exists():
                stored = json.loads((other / "settings.json").read_text())["settings"]
                self._say(job, f"not taken from {other.name}, which has {describe_difference(stored, job.settings)}")
        home = job.unfinished if isinstance(job, Score) else job.folder
        if isinstance(job, Score):
            shutil.rmtree(home, ignore_errors=True)  # of an attempt that was stopped
        home.mkdir(parents=True, exist_ok=True)
        arguments = job.arguments()
        (home / "settings.json").write_text(json.dumps(
            {"settings": job.settings, "machine": self.machine, "arguments": arguments}, indent=1) + "\n")
        resumed = job.resumed_from() if isinstance(job, Training) else None
        self._say(job, "starts" if resumed is None else f"goes on from {resumed.name}")
        log = self._log(job)
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as file:
            return subprocess.Popen(
                [sys.executable, str(SCRIPTS / job.script), *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(self.num_threads)},
            )

    def _log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.folder.name}.txt"

    def _end(self, job: Job, code: int, seconds: float) -> None:
        if code == 0:
            job.finish()
        if job.is_done():
            self._say(job, f"done in {seconds / 60:.1f} minutes")
        else:
            lines = self._log(job).read_text(errors="replace").replace("\r", "\n").split("\n")
            reason = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            self.failed[job.label] = reason
            self._say(job, f"FAILED after {seconds / 60:.1f} minutes (exit code {code}): {reason}; log {self._log(job)}")
        self.write()

    def _say(self, job: Job, words: str) -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.label}: {words}", flush=True)

    # --- what was found -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """The table as json, md and png."""
        write_table(self.output_dir, self.config.name, self.table())

    def table(self) -> dict[str, Any]:
        """Everything: settings, trainings, and by row and block size the figures of every seed that is scored."""
        rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = {row: {} for row in self.config.rows}
        for score in self.scores:
            if score.is_done():
                figures = score.figures()
                rows[score.row].setdefault(str(score.block), {})[str(score.seed)] = figures["network"]
                if REAL in rows:  # the same videos beside every score
                    rows[REAL] = {"0": {"0": figures[REAL]}}
        machines = {figures["machine"] for blocks in rows.values() for seeds in blocks.values() for figures in seeds.values()
                    if "machine" in figures}
        settings = {key: value for key, value in asdict(self.config).items() if key != "folder"}
        return {
            "settings": {**settings, "code_sha256": self.code,
                         "teacher_sha256": self.teacher_digest},
            "machines": sorted(machines), "failed": self.failed, "rows": rows,
            "trainings": [self._describe(training) for training in self.trainings],
        }

    def _describe(self, training: Training) -> dict[str, Any]:
        config = training.config.training
        if self.earlier is not None and not training.is_done() and self._is_needless(training):
            return next(each for each in self.earlier["trainings"] if is_of(training, each))
        return {
            "paradigm": training.paradigm, "block": training.block, "seed": training.seed, "is_done": training.is_done(),
            "num_steps": config.num_steps, "gflops_per_step": training.flops_per_step / 1e9,
            "total_tflops": config.num_steps * training.flops_per_step / 1e12, "minutes": training.minutes(),
            "batch_size": config.batch_size, "lr": config.lr, "guidance": config.guidance, "precision": training.config.precision,
            "overrides": [*PARADIGMS[training.paradigm], *self.config.overrides["all"], *self.config.overrides[training.paradigm]],
            "chosen": self._chosen(training.paradigm, training.block),
            "settings": training.settings, "flops_code_sha256": self.code["flops"],
        }


def compare(config: ComparisonConfig) -> int:
    """The whole comparison; returns the number of jobs that failed. Raises as `Comparison` does."""
    if not any(map(config.candidates_of, config.paradigms)):
        return Comparison(config).run()
    chosen, num_failed = choose_settings(config)
    return num_failed + Comparison(config, chosen).run()


def choose_settings(config: ComparisonConfig) -> tuple[dict[tuple[str, int], str], int]:
    """Of its candidates the one whose row reads most frames right, by paradigm and block size, and the number of jobs that failed.

    All paradigms are offered as many, on a seed and prompts that the table does not use. NAME_candidates.json keeps every figure.
    """
    rows = {paradigm: next(row for row in ROWS if ROWS[row].paradigm == paradigm) for paradigm in config.paradigms}
    found: dict[tuple[str, int], dict[str, float]] = {}
    num_failed = 0
    for index in range(max(len(config.candidates_of(paradigm)) for paradigm in rows)):
        candidates = {(paradigm, block): config.candidates_of(paradigm)[index] for paradigm in rows for block in config.blocks}
        asked = replace(config, name=f"{config.name}_candidate_{index + 1}", candidates={}, rows=list(rows.values()),
                        seeds=[config.selection_seed], score_seed=config.selection_seed, selection_seed=config.score_seed)
        trial = Comparison(asked, candidates)
        num_failed += trial.run()
        for score in trial.scores:
            if score.is_done() and score.needs is not None:
                place = score.needs.paradigm, score.needs.block
                found.setdefault(place, {})[candidates[place]] = score.figures()["network"]["frames_right"]
    best = {place: max(figures, key=lambda candidate: figures[candidate]) for place, figures in found.items()}
    places = [{"paradigm": place[0], "block": place[1], "frames_right": found[place], "chosen": best[place]} for place in found]
    path = Path(config.output_dir) / f"{config.name}_candidates.json"
    path.write_text(json.dumps({"seed": config.selection_seed, "places": places}, indent=1) + "\n")
    for place in places:
        print(f"{place['paradigm']}, {blocks_of(place['block'])}: chosen {place['chosen'] or 'the settings as they are'}", flush=True)
    print(f"candidates: frames right of each are in {path}", flush=True)
    return best, num_failed


def multiplied(candidate: list[str], overrides: list[str]) -> list[str]:
    """Overrides of train.py in which every KEY=*FACTOR stands for the factor times what the key is under these overrides."""
    if not any("=*" in each for each in candidate):
        return candidate
    settings, made = settings_without(compose_run(overrides), ()), []
    for each in candidate:
        key, _, value = each.partition("=")
        if value.startswith("*"):
            try:
                each = f"{key}={float(value[1:]) * settings[key]:.6g}"
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"candidates has {each}: expected the factor of a number that this training has") from error
        made.append(each)
    return made


def settings_of_sampler(sampler: Sampler, config: ComparisonConfig) -> SamplerSettings:
    """What evaluate.py is asked for a row that is sampled so."""
    num_few = len(config.denoising_steps)
    num_steps = {Sampler.BIDIRECTIONAL: config.many_steps, Sampler.MANY: config.many_steps, Sampler.FEW: num_few,
                 Sampler.HALF: max(num_few // 2, 1)}
    if sampler == Sampler.OWN:
        return SamplerSettings()
    if sampler == Sampler.UNGUIDED:
        return SamplerSettings(denoising_steps=tuple(config.denoising_steps))
    return SamplerSettings(num_steps=num_steps[sampler], guidance=config.guidance, causal=sampler != Sampler.BIDIRECTIONAL)


def options_of_sampler(settings: SamplerSettings) -> dict[str, Any]:
    """The same as keys of evaluate.py."""
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {key: value for key, value in options.items() if value is not None and value is not False}


def set_aside_if_stale(folder: Path, checkpoint: Path) -> None:
    """Rename the folder of a score that was made of another checkpoint than the one which is there now."""
    scored = folder / "evaluation.json"
    if not scored.exists() or not checkpoint.exists():
        return
    (_, network) = json.loads(scored.read_text()).values()
    if network["checkpoint_sha256"] != file_digest(checkpoint):
        aside = next(path for path in (folder.with_name(f"{folder.name}.stale{number}") for number in count(1)) if not path.exists())
        os.replace(folder, aside)
        print(f"{folder.name} was made of another {checkpoint}: set aside as {aside.name}", flush=True)


def plain(value: Any) -> Any:
    """As json gives it back."""
    return json.loads(json.dumps(value))


def num_steps(budget: float, flops: float) -> int:
    """Steps of `flops` each that spend the budget, at least one."""
    return max(round(budget / flops), 1)


def blocks_of(block: int) -> str:
    return f"blocks of {block}"


def compose_run(overrides: list[str]) -> Config:
    """The configuration that train.py would have with these overrides; inside its own main, Hydra is set up already."""
    is_set_up = GlobalHydra.instance().is_initialized()
    with nullcontext() if is_set_up else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_config(compose("train", overrides))


def settings_of_result(config: Config) -> dict[str, Any]:
    """The flat configuration of a run without what changes no weight."""
    return settings_without(config, NOT_OF_THE_RESULT)


def place_of(row: str, training: Training | None) -> tuple[str, str, str]:
    """Row, block size and seed, as a table names them."""
    return (row, "0", "0") if training is None else (row, str(training.block), str(training.seed))


def is_of(training: Training, description: dict[str, Any]) -> bool:
    """Does a table's description speak of this training, whatever its settings?"""
    return (description["paradigm"], description["block"], description["seed"]) == (training.paradigm, training.block, training.seed)


ConfigStore.instance().store(name="comparison_schema", node=ComparisonConfig)
register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="comparison")
def main(composed: DictConfig) -> None:
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError("a comparison is many runs, each a process of its own: start it without torchrun")
        num_failed = compare(OmegaConf.to_object(composed))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if num_failed:
        sys.exit(f"{num_failed} jobs failed, see above; the same command tries them again")


def run_command_line() -> None:
    """`main`, with every refusal of Hydra as one line."""
    run_in_one_line(main, ComparisonConfig)


if __name__ == "__main__":
    run_command_line()
