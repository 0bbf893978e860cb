"""The typed configuration: every default of a run is in one dataclass field here or beside the class it sizes; YAML under `configs/` only
deviates. Checks run when a configuration is built, before any work; each refusal names the key, what was found and what was expected."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from clips.own_videos import VideosConfig
from machine.paths import CONFIGS, at_home
from method.choices import DEVICES, PRECISIONS, require
from method.settings import TRAINING_KINDS, DataConfig, PretrainConfig, SelfForcingConfig, TrainingConfig
from moving_mnist import DatasetConfig
from network.text_encoder import TextEncoderConfig
from tiny_causal_wan import ModelConfig

PATH_KEYS = ("log_dir", "dataset.root", "training.resume", "training.pretrained_checkpoint", "training.generator_checkpoint")
GROUPS = ("model", "dataset", "training", "experiment")  # of configs/, chosen by the name of a file


@dataclass
class WandbConfig:
    """Weights & Biases logging. No account is needed for "offline"; "disabled" writes nothing."""

    mode: str = "offline"
    project: str = "self-forcing-moving-mnist"

    def __post_init__(self) -> None:
        require(self.mode in ("offline", "online", "disabled"), "wandb.mode", self.mode, "offline, online or disabled")


@dataclass
class Config:
    """One run of train.py."""

    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # bfloat16 autocast where the processor multiplies it faster, else float32
    log_dir: str = "logs/training"
    run_name: str | None = None  # folder under log_dir; a date and time if not given
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    dataset: DataConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = MISSING
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        is_plain_name = self.run_name is None or Path(self.run_name).name == self.run_name
        require(
            is_plain_name and self.run_name not in ("..", "checkpoint_final.pt"), "run_name", self.run_name,
            "the name of a new folder under log_dir, without a path",
        )
        for key, value in flatten(asdict(self)).items():
            numbers = value if isinstance(value, list) else [value]
            is_finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
            require(is_finite, key, value, "a finite number")


def check_parts_fit(config: Config) -> None:
    """Raise ValueError where two parts of the configuration contradict each other."""
    model, dataset, training, patch = config.model, config.dataset, config.training, config.model.patch_size[0]
    require(model.frame_size == dataset.frame_size, "model.frame_size", model.frame_size, f"dataset.frame_size={dataset.frame_size}")
    require(model.channels == dataset.channels, "model.channels", model.channels, f"dataset.channels={dataset.channels}")
    require(model.text_width == config.text.width, "model.text_width", model.text_width, f"text.width={config.text.width}")
    block = f"a temporal patch that divides training.num_frames_per_block={training.num_frames_per_block}"
    require(training.num_frames_per_block % patch == 0, "model.patch_size", list(model.patch_size), block)
    for name, frames in (("window_frames", training.window_frames or 0), ("sink_frames", training.sink_frames)):
        training.check(name, frames % patch == 0, f"a multiple of the temporal patch {patch}")
    one_frame = f"false with a temporal patch of {patch} frames"
    training.check("independent_first_frame", patch == 1 or not training.independent_first_frame, one_frame)
    if isinstance(training, SelfForcingConfig):
        by_power = training.ema_power is not None, f"training.ema_power={training.ema_power}", "training.ema_power=null"
        not_muon = training.optimizer != "muon", f"training.optimizer={training.optimizer}", "training.optimizer=muon"
        for name, reason in {"ema_decay": by_power, "muon_momentum": not_muon, "critic_muon_momentum": not_muon}.items():
            (is_ignored, setting, instead), default = reason, getattr(SelfForcingConfig, name)
            unused = f"{default}, its default, with {setting}, which ignores it, or {instead}"
            training.check(name, not is_ignored or getattr(training, name) == default, unused)


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, so that YAML and overrides are checked against them."""
    store = ConfigStore.instance().store
    schema = OmegaConf.structured(Config)
    schema.dataset = MISSING  # its kind is chosen by the group
    store("train_schema", schema)
    store("schema", ModelConfig, "model")
    store("schema", DatasetConfig, "dataset")
    store("videos_schema", VideosConfig, "dataset")
    store("pretrain_schema", PretrainConfig, "training")
    store("self_forcing_schema", SelfForcingConfig, "training")
    for kind in ("causal_ode", "causal_consistency"):
        store(f"{kind}_schema", TRAINING_KINDS[kind], "training")


def compose_run(overrides: list[str]) -> Config:
    """The configuration of `python train.py OVERRIDES`. Raises as `build_config` and Hydra do."""
    register_schemas()
    is_set_up = GlobalHydra.instance().is_initialized()  # inside a main of Hydra
    with nullcontext() if is_set_up else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_config(compose("train", overrides))


def build_config(composed: DictConfig) -> Config:
    """The typed, checked configuration of what Hydra composed. Raises ValueError naming the key for an impossible value and for an unknown
    key that `+key=value` added."""
    for key in PATH_KEYS:
        path = OmegaConf.select(composed, key, default=None)
        if isinstance(path, str):
            OmegaConf.update(composed, key, at_home(path))
    config = OmegaConf.to_object(composed)
    known = flatten(config_to_dict(config))
    for key in flatten(OmegaConf.to_container(composed)):
        if key not in known:
            raise ValueError(_unknown_key(key, [config.training], config.dataset))
    check_parts_fit(config)
    return config


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys, as they are written on the command line."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unknown_key(key: str, kinds: list[TrainingConfig], dataset: DataConfig) -> str:
    if isinstance(dataset, DatasetConfig) and key in {f"dataset.{name}" for name in vars(VideosConfig(root="DIR"))}:
        return f"unknown key {key}: it belongs to dataset=videos"
    keys = [known for kind in kinds for known in flatten(config_to_dict(Config(training=kind, dataset=dataset)))]
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    nearest = difflib.get_close_matches(key, same_name or keys, n=1, cutoff=0.0)[0]
    run = f" in a run of training type {kinds[0].training_type}" if len(kinds) == 1 else ""
    return f"unknown key {key}{run}: the nearest known key is {nearest}; --help shows them all"


def explain_refusal(error: Exception, known_keys: list[str] | None = None) -> str:
    """One line that names the refused key or choice and what is expected; Hydra's own messages take a page. known_keys: of another
    configuration than a training run's."""
    if isinstance(error, OverrideParseException):
        return f"{_shortened(error.override)} cannot be read{_quoting_advice(error.override) or f' ({_shortened(str(error))})'}"
    root: BaseException = error
    while root.__cause__ is not None and not (isinstance(root, OmegaConfBaseException) and root.full_key):  # under a tracer it has a cause
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
        kinds = [kind() for kind in TRAINING_KINDS.values()]
        dataset = VideosConfig(root="DIR") if root.object_type is VideosConfig else DatasetConfig()
        return _unknown_key(key, [kind for kind in kinds if type(kind) is root.object_type] or kinds, dataset)
    lines = [line.strip() for line in str(root if str(root) else error).splitlines() if line.strip()]
    if isinstance(root, OmegaConfBaseException) and root.full_key:
        configs = [Config(training=kind()) for kind in TRAINING_KINDS.values()]
        defaults = {key: value for config in configs for key, value in flatten(config_to_dict(config)).items()}
        example = f"; expected a value such as {defaults[root.full_key]}, its default" if root.full_key in defaults else ""
        return f"{root.full_key}: {lines[0]}{example}"
    return "; ".join(lines)


def _quoting_advice(override: str) -> str:
    """How to type an override whose value has characters that are special in Hydra's grammar; empty if quoting does not help."""
    key, _, value = override.partition("=")
    quoted = '{}="{}"'.format(key, value.replace("\\", "\\\\").replace('"', '\\"'))
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return ""
    shown = f", {shlex.quote(quoted)}" if quoted.isprintable() else ""  # a line break would make two lines of the message
    return f": its value needs quotes within quotes{shown}"


def explain_command_line(error: Exception, overrides: list[str]) -> str:
    """`explain_refusal`, with the override at fault if Hydra's error does not name it."""
    if isinstance(error, OverflowError):  # of an integer where a float belongs
        longest = max(overrides, key=lambda override: max(map(len, re.findall(r"\d+", override)), default=0))
        return f"{_shortened(longest)}: the number is too large"
    reason = explain_refusal(error)
    if reason.startswith("Config group override must be"):
        groups = [override for override in overrides if override.partition("=")[0] in GROUPS]
        return f"{', '.join(groups)}: {reason}"
    interpolated = [override for override in overrides if "${" in override and override.partition("=")[0] not in reason]
    return f"{_shortened(', '.join(interpolated))}: {reason}" if interpolated else reason


def check_choices(overrides: list[str]) -> None:
    """Raise ValueError for a group's choice that Hydra fails on: an interpolation, or a list that is not of names."""
    name = r"(?!(?:null|true|false)\b)[a-z_][\w./-]*"
    for override in overrides:
        group, _, value = override.partition("=")
        is_list = value.lstrip().startswith("[")
        is_list_of_names = re.fullmatch(rf"\s*\[\s*{name}(\s*,\s*{name})*\s*\]\s*", value, re.IGNORECASE)
        if group.lstrip("+~") in GROUPS and ("${" in value or (is_list and not is_list_of_names)):
            raise ValueError(f"{_shortened(override)}: expected the name of a file in configs/{group.lstrip('+~')}/, without .yaml")


def _shortened(text: str) -> str:
    """At most 200 characters of its first line."""
    return text.partition("\n")[0][:200]


def config_to_dict(config: Config) -> dict[str, Any]:
    """A plain dict of numbers, strings, lists and dicts, as checkpoints store it."""
    return asdict(config)


def config_from_dict(plain: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`, with every type checked as on the command line. Raises ValueError naming a key in one line.

    In earlier versions no digits were set aside for the judges (no dataset.judge_fraction); a run that was no comparison held an empty
    `experiment`; noise_draws was critic_draws; clamp_scores was clamp_real_score; continuation_probability continued real videos.
    """
    plain = {key: plain[key] for key in dict(plain) if key != "experiment" or plain[key] is not None}
    is_own = "root" in plain.get("dataset", {})
    if "dataset" in plain and not is_own:
        plain["dataset"] = {"judge_fraction": 0.0, **plain["dataset"]}
    training_type = plain["training"]["training_type"]
    if training_type not in TRAINING_KINDS:
        raise ValueError(f"training_type is {training_type!r}: expected one of {', '.join(TRAINING_KINDS)}")
    renamed = {"critic_draws": "noise_draws", "clamp_real_score": "clamp_scores"}
    plain["training"] = {renamed.get(key, key): value for key, value in plain["training"].items() if key != "continuation_probability"}
    parts = {
        "model": ModelConfig, "text": TextEncoderConfig, "dataset": VideosConfig if is_own else DatasetConfig,
        "training": TRAINING_KINDS[training_type], "wandb": WandbConfig,
    }
    for group, kind in parts.items():
        try:
            if group in plain:
                plain[group] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain[group]))
        except OverflowError as error:
            raise ValueError(f"{group}: holds a whole number too large for a float") from error
        except OmegaConfBaseException as error:
            key = f"{group}.{error.full_key}" if error.full_key else group
            raise ValueError(f"{key}: {str(error).partition(chr(10))[0]}") from error
    return Config(**plain)
