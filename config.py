"""The typed configuration: every default of a run stands in one dataclass field here or beside the class it sizes.

YAML under `configs/` only deviates from these. Checks run when a configuration is built, before any work; each refusal
names the key, what was found and what was expected.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from flow_matching import NUM_TRAIN_TIMESTEPS
from moving_mnist import DatasetConfig
from text_encoder import TextEncoderConfig
from tiny_causal_wan import ModelConfig

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")


def _require(condition: bool, key: str, found: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found}: expected {expected}")


def check_num_frames(key: str, num_frames: int, num_frames_per_block: int) -> None:
    """Raise ValueError naming the nearest valid counts where num_frames is not a positive multiple of the block."""
    if num_frames < 1 or num_frames % num_frames_per_block:
        below = num_frames // num_frames_per_block * num_frames_per_block
        nearest = [count for count in (below, below + num_frames_per_block) if count > 0]
        raise ValueError(
            f"{key} is {num_frames}: expected a positive multiple of num_frames_per_block={num_frames_per_block}; "
            f"nearest valid: {' or '.join(map(str, nearest))}"
        )


def check_denoising_steps(key: str, steps: list[int]) -> None:
    """Raise ValueError unless the timesteps are non-empty, in 1..1000, strictly descending and start at 1000."""
    valid = bool(steps) and all(isinstance(s, int) and 1 <= s <= NUM_TRAIN_TIMESTEPS for s in steps)
    descending = valid and all(a > b for a, b in zip(steps, steps[1:], strict=False)) and steps[0] == NUM_TRAIN_TIMESTEPS
    _require(
        descending, key, list(steps),
        f"strictly descending whole timesteps from {NUM_TRAIN_TIMESTEPS} down to at least 1, such as [1000, 750, 500, 250]",
    )


@dataclass
class TrainingConfig:
    """What every kind of training shares. Times of intervals in steps; 0 switches an interval off."""

    training_type: str = MISSING  # "pretrain" or "dmd2"
    num_steps: int = 1000
    batch_size: int = 16  # videos a step
    lr: float = 1e-4
    decay_fraction: float = 0.0  # share of the run, at its end, over which the learning rates fall linearly to 0
    num_frames_per_block: int = 3
    min_num_frames: int = 21
    max_num_frames: int = 21
    time_shift: float = 3.0
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    log_interval: int = 1
    sample_interval: int = 250
    checkpoint_interval: int = 250
    keep_last: int = 2  # interval checkpoints kept beside the final one
    eval_videos: int = 64  # videos read by the judge at the end; 0 switches it off
    teacher_steps: int = 50  # Euler steps of the many-step samples that are shown
    teacher_eta: float = 1.0  # fresh noise in those steps: 0 is Euler's method, 1 ancestral sampling
    guidance: float = 2.5  # of those samples, and of the teacher in distribution matching; 1 is none
    resume: str | None = None  # checkpoint of a run of the same training type to go on from

    def __post_init__(self) -> None:
        own_type = type(self).training_type
        _require(self.training_type == own_type, "training.training_type", self.training_type, f"{own_type}, which training= has chosen")
        for name in ("num_steps", "batch_size", "num_frames_per_block", "teacher_steps", "log_interval", "keep_last"):
            value = asdict(self)[name]
            _require(value >= 1, f"training.{name}", value, "at least 1")
        for name in ("sample_interval", "checkpoint_interval", "eval_videos"):
            value = asdict(self)[name]
            _require(value >= 0, f"training.{name}", value, "0 (off) or more")
        for name in ("lr", "time_shift", "clip_norm"):
            value = asdict(self)[name]
            _require(0 < value < float("inf"), f"training.{name}", value, "a positive number")
        _require(0 <= self.decay_fraction <= 1, "training.decay_fraction", self.decay_fraction, "a number in [0, 1]")
        _require(0 <= self.teacher_eta <= 1, "training.teacher_eta", self.teacher_eta, "a number in [0, 1]")
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "a number in [0, 1)")
        _require(self.guidance >= 0, "training.guidance", self.guidance, "0 or more (1 is no guidance)")
        check_num_frames("training.min_num_frames", self.min_num_frames, self.num_frames_per_block)
        check_num_frames("training.max_num_frames", self.max_num_frames, self.num_frames_per_block)
        _require(
            self.min_num_frames <= self.max_num_frames, "training.min_num_frames", self.min_num_frames,
            f"at most training.max_num_frames={self.max_num_frames}",
        )


@dataclass
class PretrainConfig(TrainingConfig):
    """Pretraining on Moving MNIST: bidirectional and block-causal steps in turn, on short clips first if asked."""

    training_type: str = "pretrain"
    num_steps: int = 6000
    batch_size: int = 24
    clip_steps: int = 0  # the first so many steps see clips of clip_frames, clip_batch_size at a time: digits are learned sooner
    clip_frames: int = 6
    clip_batch_size: int = 64
    lr: float = 1.5e-3  # AdamW: embeddings, biases, norms, head
    muon_lr: float = 3e-3  # Muon: matrices of the transformer blocks
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    prompt_dropout: float = 0.1
    clean_prefix_probability: float = 0.5
    compile: bool = False  # torch.compile of the transformer blocks: needs a C++ compiler, pays only in long runs
    loss_time_floor: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_dropout", "clean_prefix_probability"):
            value = asdict(self)[name]
            _require(0 <= value <= 1, f"training.{name}", value, "a number in [0, 1]")
        _require(self.clip_steps >= 0, "training.clip_steps", self.clip_steps, "0 (none) or more")
        _require(self.clip_batch_size >= 1, "training.clip_batch_size", self.clip_batch_size, "at least 1")
        if self.clip_steps:
            check_num_frames("training.clip_frames", self.clip_frames, self.num_frames_per_block)
        _require(self.warmup_steps >= 0, "training.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(self.muon_lr > 0, "training.muon_lr", self.muon_lr, "a positive number")
        _require(0 < self.loss_time_floor <= 1, "training.loss_time_floor", self.loss_time_floor, "a number in (0, 1]")


@dataclass
class SelfForcingConfig(TrainingConfig):
    """Self-Forcing with distribution matching. A step is one critic update; every `dfake_gen_update_ratio`-th step also
    updates the generator."""

    training_type: str = "dmd2"
    pretrained_checkpoint: str = "pretrained/teacher.pt"
    num_steps: int = 700
    batch_size: int = 8
    lr: float = 1.5e-4
    guidance: float = 2.0  # stronger guidance makes strokes bolder than real ones
    teacher_steps: int = 25  # for the samples of a run only
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # times of the scores at which the teacher is guided
    clamp_real_score: bool = False  # keep the guided teacher's x_0 in [-1, 1], which guidance leaves
    generator_checkpoint: str | None = None  # the network that the generator starts from; the teacher if not given
    critic_lr: float = 5e-4
    adam_betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    ema_decay: float = 0.99
    denoising_steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])
    context_noise: int = 0  # timestep, 0..1000, at which finished blocks are written into the cache
    gradient_frames: int = 21  # only the last so many frames carry gradient and are scored
    same_exit_step: bool = True  # one exit step for all blocks of a rollout; false draws one per block
    dfake_gen_update_ratio: int = 4
    critic_warmup_steps: int = 16  # critic updates before the generator's first
    min_score_time: float = 0.02
    max_score_time: float = 0.98
    loss_time_floor: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_denoising_steps("training.denoising_steps", self.denoising_steps)
        check_num_frames("training.gradient_frames", self.gradient_frames, self.num_frames_per_block)
        _require(0 <= self.context_noise <= NUM_TRAIN_TIMESTEPS, "training.context_noise", self.context_noise, "a timestep in 0..1000")
        _require(self.dfake_gen_update_ratio >= 1, "training.dfake_gen_update_ratio", self.dfake_gen_update_ratio, "at least 1")
        _require(self.critic_warmup_steps >= 0, "training.critic_warmup_steps", self.critic_warmup_steps, "0 or more")
        _require(self.critic_lr > 0, "training.critic_lr", self.critic_lr, "a positive number")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(0 < self.loss_time_floor <= 1, "training.loss_time_floor", self.loss_time_floor, "a number in (0, 1]")
        _require(
            len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas), "training.adam_betas",
            list(self.adam_betas), "two numbers in [0, 1)",
        )
        _require(
            len(self.guidance_interval) == 2 and 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1,
            "training.guidance_interval", list(self.guidance_interval), "two times in [0, 1], the lower one first",
        )
        _require(
            0 < self.min_score_time < self.max_score_time <= 1, "training.min_score_time and max_score_time",
            (self.min_score_time, self.max_score_time), "0 < min < max <= 1",
        )


@dataclass
class WandbConfig:
    """Weights & Biases logging. No account is needed for "offline"; "disabled" writes nothing."""

    mode: str = "offline"
    project: str = "self-forcing-moving-mnist"

    def __post_init__(self) -> None:
        _require(self.mode in ("offline", "online", "disabled"), "wandb.mode", self.mode, "offline, online or disabled")


@dataclass
class Config:
    """One run of train.py."""

    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # bfloat16 autocast where the processor multiplies it natively, else float32
    log_dir: str = "logs/training"
    run_name: str | None = None  # folder under log_dir; a date and time if not given
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = MISSING
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        is_plain_name = self.run_name is None or Path(self.run_name).name == self.run_name
        _require(
            is_plain_name and self.run_name not in ("..", "checkpoint_final.pt"), "run_name", self.run_name,
            "the name of a new folder under log_dir, without a path",
        )
        for key, value in _flatten(asdict(self)).items():
            numbers = value if isinstance(value, list) else [value]
            is_finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
            _require(is_finite, key, value, "a finite number")


def check_parts_fit(config: Config) -> None:
    """Raise ValueError where two parts of the configuration contradict each other."""
    model, dataset, training = config.model, config.dataset, config.training
    _require(model.frame_size == dataset.frame_size, "model.frame_size", model.frame_size, f"dataset.frame_size={dataset.frame_size}")
    _require(model.channels == dataset.channels, "model.channels", model.channels, f"dataset.channels={dataset.channels}")
    _require(model.text_width == config.text.width, "model.text_width", model.text_width, f"text.width={config.text.width}")
    _require(
        training.num_frames_per_block % model.patch_size[0] == 0, "model.patch_size", list(model.patch_size),
        f"a temporal patch that divides training.num_frames_per_block={training.num_frames_per_block}",
    )


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, so that YAML and overrides are checked against them."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Config)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="dataset", name="schema", node=DatasetConfig)
    store.store(group="training", name="pretrain_schema", node=PretrainConfig)
    store.store(group="training", name="self_forcing_schema", node=SelfForcingConfig)


def build_config(composed: DictConfig) -> Config:
    """The typed configuration of what Hydra composed; every check has run when it returns.

    Raises ValueError naming the key for an impossible value and for a key that was forced in with `+key=value`.
    """
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    known = _flatten(config_to_dict(config))
    for key in _flatten(OmegaConf.to_container(composed)):
        if key not in known:
            raise ValueError(_unknown_key(key, [config.training]))
    check_parts_fit(config)
    return config


def _flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys, as they are written on the command line."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unknown_key(key: str, kinds: list[TrainingConfig]) -> str:
    keys = [known for kind in kinds for known in _flatten(config_to_dict(Config(training=kind)))]
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    nearest = difflib.get_close_matches(key, same_name or keys, n=1, cutoff=0.0)[0]
    run = f" in a run of training type {kinds[0].training_type}" if len(kinds) == 1 else ""
    return f"unknown key {key}{run}: the nearest known key is {nearest}; --help shows them all"


def explain_refusal(error: Exception, known_keys: list[str] | None = None) -> str:
    """One line that says which key or choice was refused, and what would do; Hydra's own messages take a page.

    known_keys: those of another configuration than a training run's.
    """
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = [option for option in error.options if not option.endswith("schema")]
        return f"unknown choice {group}={name}: expected one of {', '.join(known)}"
    if isinstance(root, (ConfigAttributeError, ConfigKeyError)) and root.full_key:
        typed = re.match(r"Could not override '([^']+)'", str(error))
        key = typed.group(1) if typed else root.full_key
        if known_keys is not None:
            nearest = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.0)[0]
            return f"unknown key {key}: the nearest known key is {nearest}; known are {', '.join(known_keys)}"
        kinds = {PretrainConfig: [PretrainConfig()], SelfForcingConfig: [SelfForcingConfig()]}
        both: list[TrainingConfig] = [SelfForcingConfig(), PretrainConfig()]
        return _unknown_key(key, kinds[root.object_type] if root.object_type in kinds else both)
    lines = [line.strip() for line in str(root if str(root) else error).splitlines() if line.strip()]
    if isinstance(root, OmegaConfBaseException) and root.full_key:
        kinds_of_training: list[TrainingConfig] = [PretrainConfig(), SelfForcingConfig()]
        defaults = {key: value for kind in kinds_of_training for key, value in _flatten(config_to_dict(Config(training=kind))).items()}
        example = f"; expected a value such as {defaults[root.full_key]}, its default" if root.full_key in defaults else ""
        return f"{root.full_key}: {lines[0]}{example}"
    return "; ".join(lines)


def config_to_dict(config: Config) -> dict[str, Any]:
    """A plain dict of numbers, strings, lists and dicts, as checkpoints store it."""
    return asdict(config)


def config_from_dict(plain: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`. Raises ValueError naming a key that this version does not know."""
    kinds = {"pretrain": PretrainConfig, "dmd2": SelfForcingConfig}
    training_type = plain["training"]["training_type"]
    if training_type not in kinds:
        raise ValueError(f"training_type is {training_type!r}: expected one of {', '.join(kinds)}")
    parts = {
        "model": ModelConfig, "text": TextEncoderConfig, "dataset": DatasetConfig, "training": kinds[training_type],
        "wandb": WandbConfig,
    }
    typed = {key: _typed(parts[key], value) if key in parts else value for key, value in plain.items()}
    return Config(**typed)


def _typed(kind: type, plain: dict[str, Any]) -> Any:
    """The dataclass `kind` of plain values, with every type checked as on the command line."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
