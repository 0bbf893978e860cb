"""Score checkpoints on prompts and seeds that training never used: `python evaluate.py`.

    python evaluate.py checkpoint=PATH              one checkpoint, with its own sampler
    python evaluate.py 'checkpoint=[PATH,PATH]'     several
    python evaluate.py num_videos=128               fewer videos, wider intervals
    python evaluate.py checkpoint=PATH videos_root=DIR    of a network of one's own videos, which are in another folder now

Without a checkpoint it scores what ships: the teacher; the network that the student starts from, block by block in few
steps with guidance and without; and the student, beside real videos of held-out digits with the same prompts. The figures
are those of `panel`, each with its 95 % interval over the videos, and the cost: frames/s, and evaluations of the network
for a block, to denoise it + to write it into the cache. Writes evaluation.json (every figure, by frame and by block too),
per_frame.png, comparison.png and comparison.gif into `output_dir`.

    python evaluate.py sanity=true num_videos=256   no network: which fault of real videos moves which figure, `sanity`
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from machine.interruption import refusals_in_one_line
from machine.paths import CONFIGS, PRETRAINED, at_home
from method.choices import DEVICES, MAX_SEED, PRECISIONS, require
from training.command_line import answer_help, run_in_one_line


@dataclass
class EvaluateConfig:
    """What to score. num_steps, causal, denoising_steps, guidance, eta, ink_kept, compile, int8: as in generate.py, for every checkpoint
    named, or for the student that ships (compile, int8: for all)."""

    checkpoint: Any = None  # a path or several; what ships if not given
    num_videos: int = 512
    num_frames: int = 21
    seed: int = 0  # of the held-out prompts and of the videos' noise
    batch_size: int = 32
    denoising_steps: list[int] | None = None
    num_steps: int | None = None
    causal: bool = False
    guidance: float | None = None
    eta: float | None = None
    ink_kept: float | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    int8: bool = False
    videos_root: str | None = None  # where the clips of a network of one's own videos are now
    sanity: bool = False  # try the figures on real videos made worse, instead of scoring a network
    output_dir: str | None = None  # outputs/evaluation if not given, results for sanity

    def __post_init__(self) -> None:
        paths = [] if self.checkpoint is None else [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"checkpoint is {self.checkpoint}: expected a path, or several as 'checkpoint=[PATH,PATH]'")
        if "" in paths or self.output_dir == "":
            raise ValueError(f"{'checkpoint' if '' in paths else 'output_dir'} is empty: expected a path")
        self.checkpoint = [at_home(path) for path in paths]
        default = "results" if self.sanity else "outputs/evaluation"
        self.output_dir = at_home(default if self.output_dir is None else self.output_dir)
        self.videos_root = None if self.videos_root is None else at_home(self.videos_root)
        for name in ("num_videos", "num_frames", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")


if __name__ == "__main__":
    answer_help("evaluate", __doc__, EvaluateConfig)  # before torch, which takes seconds, is loaded

from torch import Tensor  # noqa: E402

from clips.own_videos import VideosConfig  # noqa: E402
from judging import report  # noqa: E402
from judging.clip_panel import CLIP_FIGURES, ClipPanel  # noqa: E402
from judging.panel import Panel  # noqa: E402
from judging.prompts import JUDGED_CODE, new_indices, say_who_saw_the_judges_digits  # noqa: E402
from judging.sanity import check_sanity  # noqa: E402
from machine.files import free_paths, require_writable  # noqa: E402
from machine.runtime import code_digest, file_digest, resolve_runtime  # noqa: E402
from machine.seeds import Purpose, video_seeds  # noqa: E402
from method.plans import NAIVE_STEPS  # noqa: E402
from method.settings import DataConfig  # noqa: E402
from moving_mnist import DatasetConfig, MovingMNISTGenerator  # noqa: E402
from sampling.samplers import SamplerSettings, check_length, describe_sampler, generate, prepared  # noqa: E402
from sampling.video_io import comparison_gif, comparison_sheet, to_display  # noqa: E402
from training.checkpoint import LoadedNetworks, load_networks  # noqa: E402

NUM_SHOWN = 6  # prompts in the pictures


@dataclass(frozen=True)
class Row:
    """One line of the table: a checkpoint and how it is sampled."""

    name: str
    path: Path
    settings: SamplerSettings


def make_rows(config: EvaluateConfig) -> list[Row]:
    """The rows asked for, or those of the networks that ship."""
    steps = None if config.denoising_steps is None else tuple(config.denoising_steps)
    settings = SamplerSettings(steps, config.num_steps, config.guidance, config.eta, config.ink_kept, causal=config.causal)
    if config.checkpoint:
        paths = [Path(path) for path in config.checkpoint]
        stems = [path.stem for path in paths]  # checkpoint_final, often: then the folder tells runs apart
        return [Row(path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}", path, settings) for path in paths]
    teacher = PRETRAINED / "teacher.pt"
    return [
        Row("teacher", teacher, SamplerSettings()),
        *(Row("guided Euler", teacher, SamplerSettings(num_steps=num, causal=True)) for num in (len(NAIVE_STEPS), len(NAIVE_STEPS) // 2)),
        Row("no guidance", teacher, SamplerSettings(denoising_steps=tuple(NAIVE_STEPS))),
        Row("student", PRETRAINED / "student.pt", settings),
    ]


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """Sample and score every row; returns the figures by row and leaves files in output_dir. Raises ValueError, OSError."""
    runtime = resolve_runtime(config.device, config.precision)
    rows, options = make_rows(config), ("compile" if config.compile else None, "int8" if config.int8 else None)
    loaded: dict[Path, LoadedNetworks] = {row.path: prepared(load_networks(row.path, runtime.device), runtime, *options) for row in rows}
    dataset = common_data(rows, loaded)
    if isinstance(dataset, VideosConfig):  # clips are as long as the training's longest video
        config = replace(config, num_frames=min(config.num_frames, loaded[rows[0].path].config.training.max_num_frames))
    for row in rows:  # whatever does not fit is refused before any sampling
        training = loaded[row.path].config.training
        check_length(config.num_frames, row.settings.make_plan(training), training)
    require_writable(Path(config.output_dir))
    examine = examine_clips if isinstance(dataset, VideosConfig) else examine_digits
    trial = examine(config, dataset, loaded)
    num_videos, titles = len(trial.prompts), trial.titles | report.COST_FIGURES
    seeds = video_seeds(config.seed, range(num_videos), Purpose.EVALUATION_NOISE)
    facts_of_call = {  # what every row's figures depend on beside its checkpoint and its plan
        **{key: getattr(config, key) for key in ("num_videos", "num_frames", "seed", "batch_size")},
        "device": runtime.device.type, "precision": runtime.precision, "compiled": config.compile, "int8": config.int8,
        "code_sha256": code_digest(*JUDGED_CODE),
    }
    results: dict[str, dict[str, object]] = {}
    shown: list[tuple[str, Tensor]] = [("real", to_display(trial.real[:NUM_SHOWN]))]

    def score(name: str, video: Tensor, facts: dict[str, object]) -> None:
        results[name] = {**facts, **trial.judge(video)}
        print(report.format_row(name, results[name], titles), flush=True)

    print(f"{num_videos} videos of {config.num_frames} frames, held-out prompts, seed {config.seed}, {runtime}")
    print(trial.description)
    print(report.format_line(trial.heading, titles), flush=True)
    for name, video in trial.real_rows.items():
        score(name, video, {})
    for row in rows:
        networks = loaded[row.path]
        name = f"{row.name}, {describe_sampler(row.settings, networks.config.training)}"
        start = time.perf_counter()
        video = generate(networks, trial.prompts, seeds, config.num_frames, row.settings, runtime, config.batch_size, True)
        seconds, plan = time.perf_counter() - start, row.settings.make_plan(networks.config.training)
        score(name, video, {
            "checkpoint": row.path.name, "checkpoint_sha256": file_digest(row.path), "plan": asdict(plan), **facts_of_call,
            "evaluations_a_block": plan.evaluations, "cache_evaluations_a_block": plan.cache_evaluations,
            "frames_per_second": num_videos * config.num_frames / seconds,
        })
        shown.append((name, to_display(video[:NUM_SHOWN])))
    trial.print_rest(results)
    write_results(Path(config.output_dir), results, shown, trial.prompts[:NUM_SHOWN])
    return results


def common_data(rows: list[Row], loaded: dict[Path, LoadedNetworks]) -> DataConfig:
    """What all rows were trained on; of Moving MNIST with the most digits set aside. Raises ValueError if they differ."""
    found = [loaded[row.path].config.dataset for row in rows]
    if all(isinstance(each, DatasetConfig) for each in found):
        most = max(each.judge_fraction for each in found)
        found = [replace(each, judge_fraction=most) for each in found]
    for row, each in zip(rows, found, strict=True):
        if each != found[0]:
            raise ValueError(f"{row.path} was trained on other data than {rows[0].path}: evaluate them one by one")
    return found[0]


@dataclass(frozen=True)
class Trial:
    """What is asked of every row, and how it is judged."""

    real: Tensor  # videos of the prompts
    prompts: list[str]
    heading: str
    titles: dict[str, str]
    description: str
    real_rows: dict[str, Tensor]  # real videos that are judged too
    judge: Callable[[Tensor], dict[str, Any]]  # the figures of videos made for the prompts
    print_rest: Callable[[dict[str, dict[str, Any]]], None]  # the tables that need every row


def examine_digits(config: EvaluateConfig, dataset: DatasetConfig, loaded: dict[Path, LoadedNetworks]) -> Trial:
    """Held-out digits under prompts that none of the networks drew."""
    say_who_saw_the_judges_digits({path.name: networks for path, networks in loaded.items()})
    panel = Panel(dataset, config.num_videos, config.num_frames, config.seed)
    held_out = MovingMNISTGenerator(dataset, "test", purpose=Purpose.EVALUATION)
    indices = new_indices(held_out, list(loaded.values()), config.seed, config.num_videos)
    real = held_out.sample(config.seed, indices, config.num_frames)
    return Trial(
        real.video, real.captions, "does what the prompt asks",
        report.PROMPT_FIGURES if dataset.num_digits == 1 else report.COUNT_FIGURES, panel.judge.describe(), {"real": real.video},
        lambda video: {"judge_held_out_accuracy": panel.judge.config.accuracy, **panel.judge_videos(video, real.captions, config.seed)},
        lambda results: print_rest(results, panel.yardsticks(real.video, real.captions, config.seed), dataset.num_digits),
    )


def examine_clips(config: EvaluateConfig, dataset: VideosConfig, _: dict[Path, LoadedNetworks]) -> Trial:
    """Held-out clips of one's own videos, with their captions as prompts."""
    root = dataset.root if config.videos_root is None else config.videos_root
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder at {root}: set videos_root to the folder where the clips are now")
    panel = ClipPanel(replace(dataset, root=root), config.num_videos, config.num_frames, config.seed)
    return Trial(
        panel.held_out, panel.prompts, "like held-out clips", CLIP_FIGURES, panel.describe(), panel.real_rows(config.seed),
        lambda video: panel.judge(video, config.seed), lambda results: None,
    )


def print_rest(results: dict[str, dict[str, object]], measured_beside: dict[str, dict[str, float | list]], num_digits: int) -> None:
    """The tables that need every row. Adds the yardsticks, measured_beside, to the row of real videos."""
    if num_digits == 1:
        titles = report.LOOK_FIGURES | report.COST_FIGURES
        print("\n" + report.format_table("looks like real video", results | measured_beside, titles))
        results["real"].update({key.removeprefix("real, ").replace(" ", "_"): value for key, value in measured_beside.items()})
        if not measured_beside:
            print("no Frechet distance, density and coverage: they need more videos")
    print("\n" + report.format_table("drift: change a block of 3 frames", results, report.DRIFT_FIGURES))


def write_results(folder: Path, results: dict[str, dict[str, object]], shown: list[tuple[str, Tensor]], prompts: list[str]) -> None:
    """evaluation.json, the curves by frame, and the pictures of the first prompts, every source side by side. Overwrites nothing."""
    figures, curves, sheet, animation = free_paths(folder, ["evaluation.json", "per_frame.png", "comparison.png", "comparison.gif"])
    figures.write_text(json.dumps(results, indent=2) + "\n")
    report.draw_curves(curves, results)
    comparison_sheet(sheet, shown, prompts)
    comparison_gif(animation, shown, prompts)
    print(f"wrote {figures.name}, {curves.name}, {sheet.name} and {animation.name} to {folder}")


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def main(composed: DictConfig) -> None:
    with refusals_in_one_line():
        config = OmegaConf.to_object(composed)
        if config.sanity:
            check_sanity(Path(config.output_dir), config.num_videos, config.num_frames, config.seed)
        else:
            evaluate(config)


if __name__ == "__main__":
    run_in_one_line(main, EvaluateConfig)
