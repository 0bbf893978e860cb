"""Many trainings with equal compute, their scores, and one table: `python -m experiments.comparison`.

    python -m experiments.comparison budget=320 num_videos=64 'blocks=[3]' 'rows=[tf,sf_dmd]'

Trainings and scores are child processes of train.py and evaluate.py, `processes` at a time: a training, then its scores. A training has
a folder under `folder` whose name ends in a fingerprint of all its settings; a score is done if the table has its row. Both are compared
with the plan before they are reused, so the same command continues where an earlier one stopped. The table is rewritten after every job.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import RLock
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.comparison_settings import PARADIGMS, REAL, ROWS, YARDSTICK, ComparisonConfig
from machine.paths import CONFIGS, REPOSITORY
from training.command_line import answer_help, run_in_one_line

if __name__ == "__main__":
    answer_help("comparison", __doc__, ComparisonConfig)  # before torch, which takes seconds, is loaded

from experiments.comparison_jobs import NOT_OF_THE_RESULT, Score, Training, fingerprint, quote, row_difference, stop  # noqa: E402
from experiments.comparison_report import put_by, read_table, results_of, write_table  # noqa: E402
from experiments.compute import flops_per_step  # noqa: E402
from judging.prompts import JUDGED_CODE  # noqa: E402
from machine.interruption import EXIT_INTERRUPTED  # noqa: E402
from machine.runtime import code_digest, describe_machine, file_digest, resolve_runtime  # noqa: E402
from sampling.samplers import SamplerSettings  # noqa: E402
from training.checkpoint import checkpoint_config, load_checkpoint  # noqa: E402
from training.config import compose_run, register_schemas  # noqa: E402
from training.resume import describe_difference, settings_without  # noqa: E402

SCRIPTS = REPOSITORY  # where train.py and evaluate.py are
NOT_OF_A_STEP = (  # keys of a run that change no FLOP of its steps
    *NOT_OF_THE_RESULT, "seed", "training.num_steps", "training.lr", "training.muon_lr", "device", "precision",
)


class Comparison:
    """The jobs of one configuration and their results so far. chosen: further overrides of train.py, by paradigm and block size
    (`choose_settings`). Raises ValueError and OSError."""

    def __init__(self, config: ComparisonConfig, chosen: dict[tuple[str, int], str] | None = None):
        runtime = resolve_runtime(config.device, config.precision)  # once, for all jobs: auto is decided by timing
        self.config = replace(config, device=runtime.device.type, precision=runtime.precision)
        self.chosen = chosen or {}
        self.folder, self.output_dir = Path(self.config.folder), Path(self.config.output_dir)
        self.teacher = Path(self.config.teacher)
        if not self.teacher.exists():
            self.teacher = REPOSITORY / self.teacher  # an absolute path stays
        if not self.teacher.is_file():
            raise ValueError(f"teacher is {self.config.teacher}: no such checkpoint; expected a pretrained network")
        self.teacher_digest = file_digest(self.teacher)
        self.teacher_training = checkpoint_config(self.teacher, load_checkpoint(self.teacher, is_mapped=True)).training
        self.code = {"training": code_digest("train"), "score": code_digest(*JUDGED_CODE), "flops": code_digest("experiments.compute")}
        self.num_threads = max((os.cpu_count() or 1) // self.config.processes, 1)
        self.machine = describe_machine(self.num_threads)
        for folder in (self.folder, self.output_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.earlier = read_table(self.output_dir, self.config.name)
        self.trainings = [training for block in self.config.blocks for training in self._plan_trainings(block)]
        rows = {row: ROWS[row].paradigm for row in self.config.rows if row != REAL}
        self.chains: list[list[Training | Score]] = [[self._plan_score(row, None)] for row in rows if rows[row] is None]
        for training in self.trainings:  # a training and its scores run on one worker
            of_training = [self._plan_score(row, training) for row in rows if rows[row] == training.paradigm]
            self.chains.append([training, *of_training])
        self.jobs = [job for chain in self.chains for job in chain]
        self.scores = [job for job in self.jobs if isinstance(job, Score)]
        self.failed: dict[str, str] = {}  # one line each, by label
        self.children: list[subprocess.Popen[bytes]] = []
        self.lock, self.is_stopped = RLock(), False

    # --- planning -----------------------------------------------------------------------------------------------------

    def _plan_trainings(self, block: int) -> list[Training]:
        budget = self.config.budget * self._flops(YARDSTICK, block, self._overrides(YARDSTICK, block, ""))  # without what is chosen for it
        planned = []
        for paradigm in self.config.paradigms:
            overrides = self._overrides(paradigm, block, self.chosen.get((paradigm, block), ""))
            flops = self._flops(paradigm, block, overrides)
            for seed in self.config.seeds:
                asked = [*overrides, f"training.num_steps={max(round(budget / flops), 1)}", f"seed={seed}"]
                config = compose_run(asked)
                settings = {"teacher": self.teacher_digest, "code_sha256": self.code["training"],
                            **settings_without(config, NOT_OF_THE_RESULT)}
                folder = self.folder / "trainings" / f"{paradigm}-block{block}-seed{seed}-{fingerprint(settings)}"
                label = f"training {paradigm}, blocks of {block}, seed {seed}, {config.training.num_steps} steps"
                planned.append(Training(label, paradigm, block, seed, config, asked, folder, settings, flops))
        return planned

    def _overrides(self, paradigm: str, block: int, candidate: str) -> list[str]:
        """Of train.py, without the seed and the number of steps; later ones win."""
        config = self.config
        overrides = [
            *PARADIGMS[paradigm], *config.overrides["all"], *config.overrides[paradigm],
            f"training.num_frames_per_block={block}", f"training.min_num_frames={config.num_frames}",
            f"training.max_num_frames={config.num_frames}", f"training.pretrained_checkpoint={quote(self.teacher)}",
            f"training.checkpoint_interval={config.checkpoint_interval}", "training.sample_interval=0", "training.eval_videos=0",
            f"device={config.device}", f"precision={config.precision}",
        ]
        return overrides + multiplied(candidate.split(), overrides)

    def _flops(self, paradigm: str, block: int, overrides: list[str]) -> float:
        """FLOPs of a training step, counted once and kept beside the table."""
        path, config = self.output_dir / f"{self.config.name}_flops.json", compose_run(overrides)
        kept = json.loads(path.read_text()) if path.exists() else {}
        settings = {"code_sha256": self.code["flops"], **settings_without(config, NOT_OF_A_STEP)}
        name = f"{paradigm}-block{block}-{fingerprint(settings)}"
        if name not in kept:
            start = time.perf_counter()
            kept[name] = flops_per_step(config)
            print(f"counted {kept[name] / 1e9:.1f} GFLOP a step of {paradigm}, blocks of {block} "
                  f"({time.perf_counter() - start:.0f} seconds)", flush=True)
            path.write_text(json.dumps(kept, indent=1) + "\n")
        return kept[name]

    def _plan_score(self, row: str, training: Training | None) -> Score:
        config = self.config
        asked = sampler_options(ROWS[row].sampler, config)
        facts = {"num_videos": config.num_videos, "num_frames": config.num_frames, "seed": config.score_seed,
                 "batch_size": config.batch_size, "device": config.device, "precision": config.precision}
        options = [f"{key}={value}".replace(" ", "") for key, value in {**facts, **asked}.items()]
        plan = SamplerSettings(**asked).make_plan(self.teacher_training if training is None else training.config.training)
        settings = {**facts, "plan": json.loads(json.dumps(asdict(plan))), "code_sha256": self.code["score"],
                    "network": self.teacher_digest if training is None else training.settings}
        block, seed, label, checkpoint = 0, 0, f"scoring {row}", self.teacher
        if training is not None:
            block, seed, checkpoint = training.block, training.seed, training.checkpoint
            label += f", blocks of {block}, seed {seed}"
        folder = self.folder / "scores" / f"{row}-block{block}-seed{seed}"
        return Score(label, (row, str(block), str(seed)), training, checkpoint, options, folder, settings)

    # --- running ------------------------------------------------------------------------------------------------------

    def reuse(self) -> list[list[Training | Score]]:
        """Take results that are done as planned, with one line for each difference; returns the chains of the remaining jobs."""
        results = results_of(self.earlier)
        real = results.get((REAL, "0", "0"))
        for score in self.scores:
            if score.place in results and (REAL not in self.config.rows or real is not None):
                if difference := row_difference(results[score.place], score.settings, score.checkpoint):
                    self._say(score, f"not taken from the earlier table: {difference[:200]}")
                else:
                    score.figures = {"network": results[score.place], REAL: real}
        left = []
        for chain in self.chains:
            waiting = [job for job in chain if isinstance(job, Score) and job.figures is None]
            if waiting:
                is_trained = isinstance(chain[0], Score) or self._is_trained(chain[0])
                left.append(waiting if is_trained else [chain[0], *waiting])
        return left

    def _is_trained(self, training: Training) -> bool:
        if training.checkpoint.exists():
            if difference := training.difference():
                self._say(training, f"not what was planned ({difference[:200]}): set aside as {training.set_aside()}")
            return not difference
        for other in sorted(training.folder.parent.glob(f"{training.folder.name.rpartition('-')[0]}-????????/settings.json")):
            stored = json.loads(other.read_text())["settings"]
            self._say(training, f"not taken from {other.parent.name}, which has {describe_difference(stored, training.settings)}")
        return False

    def run(self) -> int:
        """Run the remaining jobs; returns the number that failed. Raises KeyboardInterrupt with a line on how to continue."""
        chains = self.reuse()
        num_done = len(self.jobs) - sum(map(len, chains))
        shown = {score.place for score in self.scores if score.figures is not None}
        put_by(self.output_dir, self.config.name, self.earlier, shown)
        print(f"{len(self.jobs)} jobs, {num_done} done before; {self.config.processes} at a time with {self.num_threads} threads; "
              f"folder {self.folder}", flush=True)
        write_table(self.output_dir, self.config.name, self.table())
        terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the children would outlive this process
        with ThreadPoolExecutor(self.config.processes) as pool:
            try:
                list(pool.map(self._run_chain, chains))
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted: the same command continues from what is done") from None
            finally:
                signal.signal(signal.SIGTERM, terminated)
                with self.lock:  # no child starts from here on
                    self.is_stopped = True
                stop(self.children)
        print(f"wrote {self.config.name}.json, .md and .png to {self.output_dir}")
        return len(self.failed)

    def _run_chain(self, chain: list[Training | Score]) -> None:
        """Run jobs in order, no score whose training failed."""
        for job in chain:
            lacks_training = isinstance(chain[0], Training) and chain[0].label in self.failed
            reason = "its training failed" if lacks_training else self._run_job(job)
            with self.lock:
                if self.is_stopped:
                    return
                if reason:
                    self.failed[job.label] = reason
                write_table(self.output_dir, self.config.name, self.table())

    def _run_job(self, job: Training | Score) -> str:
        """Run a job to its end; returns why it failed, empty if it did not."""
        job.folder.mkdir(parents=True, exist_ok=True)
        arguments, log = job.arguments(), self.folder / "logs" / f"{job.folder.name}.txt"
        facts = {"settings": job.settings, "machine": self.machine, "arguments": arguments}
        (job.folder / "settings.json").write_text(json.dumps(facts, indent=1) + "\n")
        log.parent.mkdir(exist_ok=True)
        start = time.perf_counter()
        with self.lock, open(log, "ab") as file:
            if self.is_stopped:
                return "stopped"
            self._say(job, "starts")
            process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / job.script), *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(self.num_threads)},
            )
            self.children.append(process)
        code = process.wait()
        if self.is_stopped:
            return "stopped"
        if code == 0:
            reason = f"not what was planned: {difference[:200]}" if (difference := job.finish()) else ""
        else:
            reason = (log.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1].strip()
        minutes = (time.perf_counter() - start) / 60
        failure = f"FAILED after {minutes:.1f} minutes (exit code {code}): {reason}; log {log}"
        self._say(job, failure if reason else f"done in {minutes:.1f} minutes")
        return reason

    def _say(self, job: Training | Score, words: str) -> None:
        print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.label}: {words}", flush=True)

    # --- results ------------------------------------------------------------------------------------------------------

    def table(self) -> dict[str, Any]:
        """Settings, trainings, and the figures by row, block size and seed."""
        rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = {row: {} for row in self.config.rows}
        for score in self.scores:
            if score.figures is not None:
                row, block, seed = score.place
                rows[row].setdefault(block, {})[seed] = score.figures["network"]
                if REAL in rows:  # the same videos beside every score
                    rows[REAL] = {"0": {"0": score.figures[REAL]}}
        machines = {score.figures["network"]["machine"] for score in self.scores if score.figures is not None}
        settings = {key: value for key, value in asdict(self.config).items() if key != "folder"}
        return {
            "settings": {**settings, "code_sha256": self.code, "teacher_sha256": self.teacher_digest},
            "machines": sorted(machines), "failed": self.failed, "rows": rows,
            "trainings": [self._describe(training) for training in self.trainings],
        }

    def _describe(self, training: Training) -> dict[str, Any]:
        config = training.config.training
        for each in self.earlier["trainings"] if self.earlier else []:  # its scores are reused, and its folder may be gone
            if not training.checkpoint.exists() and each["settings"] == training.settings:
                return each
        return {
            "paradigm": training.paradigm, "block": training.block, "seed": training.seed, "is_done": training.checkpoint.exists(),
            "num_steps": config.num_steps, "gflops_per_step": training.flops_per_step / 1e9,
            "total_tflops": config.num_steps * training.flops_per_step / 1e12, "minutes": training.minutes(),
            "batch_size": config.batch_size, "lr": config.lr, "guidance": config.guidance, "precision": training.config.precision,
            "overrides": [*PARADIGMS[training.paradigm], *self.config.overrides["all"], *self.config.overrides[training.paradigm]],
            "chosen": self.chosen.get((training.paradigm, training.block), ""), "settings": training.settings,
        }


def compare(config: ComparisonConfig) -> int:
    """The whole comparison; returns the number of jobs that failed. Raises as `Comparison` does."""
    if not any(map(config.candidates_of, config.paradigms)):
        return Comparison(config).run()
    chosen, num_failed = choose_settings(config)
    return num_failed + Comparison(config, chosen).run()


def choose_settings(config: ComparisonConfig) -> tuple[dict[tuple[str, int], str], int]:
    """By paradigm and block size, the candidate with the most frames right on a seed and prompts that the table does not use; and the
    number of jobs that failed. NAME_candidates.json keeps every figure."""
    rows = {paradigm: next(row for row in ROWS if ROWS[row].paradigm == paradigm) for paradigm in config.paradigms}
    found: dict[tuple[str, int], dict[str, float]] = {(paradigm, block): {} for paradigm in rows for block in config.blocks}
    num_failed = 0
    for index in range(len(config.candidates_of(config.paradigms[0]))):  # all have as many
        candidates = {(paradigm, block): config.candidates_of(paradigm)[index] for paradigm, block in found}
        asked = replace(config, name=f"{config.name}_candidate_{index + 1}", candidates={}, rows=list(rows.values()),
                        seeds=[config.selection_seed], score_seed=config.selection_seed, selection_seed=config.score_seed)
        trial = Comparison(asked, candidates)
        num_failed += trial.run()
        for score in trial.scores:
            if score.figures is not None:
                place = score.training.paradigm, score.training.block
                found[place][candidates[place]] = score.figures["network"]["frames_right"]
    best = {place: max(figures, key=figures.get) for place, figures in found.items() if figures}
    places = [{"paradigm": place[0], "block": place[1], "frames_right": found[place], "chosen": best[place]} for place in best]
    path = Path(config.output_dir) / f"{config.name}_candidates.json"
    path.write_text(json.dumps({"seed": config.selection_seed, "places": places}, indent=1) + "\n")
    for place in places:
        print(f"{place['paradigm']}, blocks of {place['block']}: chosen {place['chosen'] or 'the settings as they are'}", flush=True)
    print(f"candidates: frames right of each are in {path}", flush=True)
    return best, num_failed


def multiplied(candidate: list[str], overrides: list[str]) -> list[str]:
    """The candidate's overrides, with KEY=*FACTOR replaced by the factor times the key's value under `overrides`."""
    made = []
    for each in candidate:
        key, _, value = each.partition("=")
        if value.startswith("*"):
            try:
                each = f"{key}={float(value[1:]) * settings_without(compose_run(overrides), ())[key]:.6g}"
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"candidates has {each}: expected the factor of a number that this training has") from error
        made.append(each)
    return made


def sampler_options(sampler: str, config: ComparisonConfig) -> dict[str, Any]:
    """The keys of evaluate.py for a row of this sampler (`Row`)."""
    if sampler == "own":
        return {}
    if sampler == "unguided":
        return {"denoising_steps": config.denoising_steps}
    num_few = len(config.denoising_steps)
    num_steps = {"few": num_few, "half": max(num_few // 2, 1)}.get(sampler, config.many_steps)
    guidance = {} if config.guidance is None else {"guidance": config.guidance}
    return {"num_steps": num_steps, **guidance, **({} if sampler == "bidirectional" else {"causal": True})}


ConfigStore.instance().store(name="comparison_schema", node=ComparisonConfig)
register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="comparison")
def main(composed: DictConfig) -> None:
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError("a comparison starts a process for every run: start it without torchrun")
        num_failed = compare(OmegaConf.to_object(composed))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted; the same command continues", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if num_failed:
        sys.exit(f"{num_failed} jobs failed, see above; the same command tries them again")


if __name__ == "__main__":
    run_in_one_line(main, ComparisonConfig)
