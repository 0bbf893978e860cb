"""The settings of a comparison of paradigms: its rows, those of Table 2 of Self-Forcing (arXiv 2506.08009) at toy scale for blocks of
several frames and of one, and the trainings behind them. Every default in a field, every check at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from machine.paths import at_home
from method.choices import DEVICES, PRECISIONS, require

REAL, TEACHER, YARDSTICK = "real", "teacher", "sf_dmd"  # YARDSTICK: the training whose steps the budget counts
PARADIGMS = {  # the trainings, as train.py is asked for them
    "tf": ("training=teacher_forcing",),
    "df": ("training=diffusion_forcing",),
    "tf_dmd": ("training=tf_dmd",),
    "causvid": ("training=causvid",),
    "sf_dmd": ("training=published_exits",),
    "sf_sid": ("training=published_exits", "training.loss=sid"),
    "sf_gan": ("training=published_exits", "training.loss=gan"),
}
OWN_KEYS = (  # of a training, which the comparison itself decides
    "training", "seed", "device", "precision", "log_dir", "run_name", "wandb", "wandb.mode", "training.num_steps",
    "training.num_frames_per_block", "training.min_num_frames", "training.max_num_frames", "training.pretrained_checkpoint",
    "training.checkpoint_interval", "training.keep_last", "training.sample_interval", "training.eval_videos", "training.resume",
)


@dataclass(frozen=True)
class Row:
    """A line of the table. paradigm: a key of PARADIGMS; None for real videos and for the teacher's file, which are not trained here.

    sampler: "own", that of the network's training; "bidirectional", all frames at once in many guided steps; or block by block: Euler's
    method with guidance in "many", "few" or "half" as few steps, or "unguided", in few steps with fresh noise.
    """

    title: str
    paradigm: str | None
    sampler: str


ROWS = {
    REAL: Row("real video", None, "own"),
    TEACHER: Row("bidirectional teacher", None, "bidirectional"),
    "start": Row("start, no training", None, "many"),  # the same file, block by block as pretrained: what every row starts from
    "start_few": Row("start, guided", None, "few"),
    "start_half": Row("start, guided, half the steps", None, "half"),
    "start_unguided": Row("start, no guidance", None, "unguided"),
    "tf": Row("TF", "tf", "many"),
    "df": Row("DF", "df", "many"),
    "tf_few": Row("TF, guided", "tf", "few"),
    "df_few": Row("DF, guided", "df", "few"),
    "tf_unguided": Row("TF, no guidance", "tf", "unguided"),
    "df_unguided": Row("DF, no guidance", "df", "unguided"),
    "tf_dmd": Row("TF + DMD", "tf_dmd", "own"),
    "causvid": Row("DF + DMD (CausVid)", "causvid", "own"),
    "sf_dmd": Row("Self-Forcing, DMD", "sf_dmd", "own"),
    "sf_sid": Row("Self-Forcing, SiD", "sf_sid", "own"),
    "sf_gan": Row("Self-Forcing, GAN", "sf_gan", "own"),
}


def check_overrides(key: str, overrides: list[str]) -> None:
    """Raise ValueError, naming the key, unless it ends in "all" or a paradigm and each override is KEY=VALUE of a key that the comparison
    does not decide."""
    group, _, name = key.partition(".")
    require(name == "all" or name in PARADIGMS, group, name, f"all or one of {', '.join(PARADIGMS)}")
    for override in overrides:
        name, equals, _ = override.lstrip("+").partition("=")
        require(
            bool(equals) and name not in OWN_KEYS, key, override,
            "KEY=VALUE of a training, of a key that the comparison does not decide itself",
        )


@dataclass
class ComparisonConfig:
    """One comparison. Every training starts from `teacher` and may spend the FLOPs of `budget` steps of Self-Forcing with DMD
    at its block size. overrides: of train.py, for all trainings and by paradigm, such as `["training.lr=1e-4"]`."""

    name: str = "table2"  # of the files in output_dir
    # Of Self-Forcing with the GAN only where asked for: its budget leaves it a dozen updates against a fresh discriminator.
    rows: list[str] = field(default_factory=lambda: [row for row in ROWS if row != "sf_gan"])
    blocks: list[int] = field(default_factory=lambda: [3, 1])  # frames a block
    seeds: list[int] = field(default_factory=lambda: [0])  # of the trainings
    budget: int = 160
    num_frames: int = 21  # of videos, in training and in scoring
    teacher: str = "pretrained/teacher.pt"
    overrides: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in ("all", *PARADIGMS)})
    checkpoint_interval: int = 20  # steps from which an interrupted training continues
    num_videos: int = 256
    score_seed: int = 0  # of the held-out prompts and of the videos' noise
    many_steps: int = 50
    denoising_steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])  # of networks that were not trained for few steps
    guidance: float | None = None  # of guided rows; that of the network's training if not given
    # Further overrides of every training, of which the best are kept: each "KEY=VALUE KEY=VALUE", "" for none; `*0.5` halves a value. By
    # paradigm or for "all", as many for every paradigm.
    candidates: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in ("all", *PARADIGMS)})
    selection_seed: int = 1000  # of the trainings and prompts that choose among them
    batch_size: int = 64  # videos a forward pass in scoring
    processes: int = 1  # trainings or scorings at a time
    folder: str = "logs/table2"
    output_dir: str = "results"
    device: str = "auto"  # of every training and scoring
    precision: str = "auto"

    def __post_init__(self) -> None:
        from method.settings import check_denoising_steps  # loads torch, which --help needs not

        self.folder, self.output_dir, self.teacher = (at_home(path) for path in (self.folder, self.output_dir, self.teacher))
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        for name in ("budget", "num_frames", "checkpoint_interval", "num_videos", "many_steps", "batch_size", "processes"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")
        for row in self.rows:
            require(row in ROWS, "rows", row, f"any of {', '.join(ROWS)}")
        for block in self.blocks:
            fits = block >= 1 and self.num_frames % block == 0
            require(fits, "blocks", block, f"blocks that divide num_frames={self.num_frames}")
        for name in ("rows", "blocks", "seeds"):
            values = getattr(self, name)
            require(bool(values), name, values, "at least one")
            require(len(set(values)) == len(values), name, values, "each one once")
        require(all(0 <= seed < 2**63 for seed in self.seeds), "seeds", self.seeds, "0 to 2**63 - 1")
        require(Path(self.name).name == self.name and self.name != "..", "name", self.name, "a file name without a path")
        check_denoising_steps("denoising_steps", self.denoising_steps)
        for name, candidates in self.candidates.items():
            key = f"candidates.{name}"
            require(len(set(candidates)) == len(candidates), key, candidates, "each one once")
            check_overrides(key, [override for candidate in candidates for override in candidate.split()])
        numbers = {name: len(self.candidates_of(name)) for name in self.paradigms}
        require(
            len(set(numbers.values())) <= 1, "candidates", numbers,
            "as many for every paradigm that is trained: one that may choose among more is compared unfairly",
        )
        require(
            0 <= self.selection_seed < 2**63 and self.selection_seed not in (*self.seeds, self.score_seed), "selection_seed",
            self.selection_seed, "another seed than seeds and score_seed: no claim is made on what chose the settings",
        )
        require(self.guidance is None or self.guidance >= 0, "guidance", self.guidance, "0 or more (1 is no guidance)")
        for name, overrides in self.overrides.items():
            check_overrides(f"overrides.{name}", overrides)
        require(self.rows != [REAL], "rows", self.rows, "another row too: real videos are scored beside it")
        self.rows = [row for row in ROWS if row in self.rows]  # in the table's order

    def candidates_of(self, paradigm: str) -> list[str]:
        """Those of a paradigm; empty if nothing is chosen."""
        return self.candidates.get(paradigm) or self.candidates.get("all") or []

    @property
    def paradigms(self) -> list[str]:
        """The trainings that the rows need."""
        return [name for name in PARADIGMS if any(ROWS[row].paradigm == name for row in self.rows)]
