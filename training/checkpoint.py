"""Checkpoints: atomic save, safe load, and building networks from a file.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts: `torch.load(weights_only=True)` reads it, and no file can
run code. Keys that users rely on: `generator_state_dict`, `optimizer_state_dict`, `step`, `training_type` ("pretrain", "dmd2",
"causal_ode" or "causal_consistency"), `config` (a plain dict). Others: `text_encoder_state_dict`, `prompts_drawn` (seed: number of training
captions drawn), `digits_seen` (splits whose digits the network or its teacher learned from), `runtime` (device, number format), and in the
checkpoint of a run `generator_ema_state_dict` and all that resuming needs.

    python -m training.checkpoint IN OUT           strip IN to its averaged weights in float16, which is what `pretrained/` ships
    python -m training.checkpoint IN IN ... OUT    the mean of several students of one teacher, stripped likewise
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import argparse
import pickle
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.own_videos import VideosConfig
from digits.mnist import SPLITS
from machine.files import replacing
from machine.paths import user_path
from machine.runtime import PRECISIONS
from method.settings import DataConfig
from network.text_encoder import TextEncoder
from tiny_causal_wan import TinyCausalWanModel
from training.config import Config, config_from_dict
from training.sharding import placed_like

REQUIRED_KEYS = (
    "generator_state_dict", "optimizer_state_dict", "text_encoder_state_dict", "step", "training_type", "config", "prompts_drawn",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what to do."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash the file is whole or absent. Raises OSError as `replacing`."""
    with replacing(path, is_durable=True) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path, is_mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. is_mapped: leave tensors in the file until they are read. Raises CheckpointError for a missing,
    broken, hostile or foreign file."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .pt file that train.py wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a foreign file that is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is no checkpoint at all: refused, since reading it could run code"
        ) from error
    except Exception as error:  # torch.load raises nearly anything for bytes that are no checkpoint
        kind = "truncated, or another kind of file"
        if path.suffix == ".safetensors":
            kind = "a safetensors file holds weights without the settings of their training; expected a .pt file that train.py wrote"
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {kind}") from error
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED_KEYS):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this project: found {found}, expected the keys {', '.join(REQUIRED_KEYS)}")
    _check_values(path, checkpoint)
    for key, state in checkpoint.items():  # DistributedDataParallel and torch.compile put these into the names of what they wrap
        if key.endswith("_state_dict") and isinstance(state, dict) and all(isinstance(name, str) for name in state):
            checkpoint[key] = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}
    return checkpoint


def _check_values(path: Path, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError naming the first of the plain values that is not what train.py stores."""
    runtime = checkpoint.get("runtime", {"device": "cpu", "precision": "float32"})
    if not isinstance(runtime, dict) or "device" not in runtime or runtime.get("precision") not in list(PRECISIONS):
        raise CheckpointError(f"{path}: runtime is {runtime!r}: expected a device and a precision of {', '.join(PRECISIONS)}")
    drawn = checkpoint["prompts_drawn"]
    counts = [*drawn.keys(), *drawn.values()] if isinstance(drawn, dict) else [drawn]
    if not all(isinstance(number, int) and number >= 0 for number in [checkpoint["step"], *counts]):
        raise CheckpointError(f"{path}: step and prompts_drawn are {checkpoint['step']!r} and {drawn!r}: expected whole numbers")
    seen = checkpoint.get("digits_seen", [])
    if not isinstance(seen, list) or not all(split in SPLITS for split in seen):
        raise CheckpointError(f"{path}: digits_seen is {seen!r}: expected a list of some of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class LoadedNetworks:
    """Networks built from a file, in evaluation mode."""

    generator: TinyCausalWanModel
    text_encoder: TextEncoder
    config: Config
    step: int
    prompts_drawn: dict[int, int]  # seed: n means that training drew the captions (seed, 0..n - 1), which are not held out
    digits_seen: tuple[str, ...]  # splits whose digits this network, or one that it learned from, has seen


def checkpoint_config(path: Path, checkpoint: dict[str, Any]) -> Config:
    """The typed configuration stored in a checkpoint. Raises CheckpointError if this version cannot read it."""
    try:
        return config_from_dict(checkpoint["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration does not fit this version of the code ({error})") from error


def load_networks(path: Path, device: torch.device) -> LoadedNetworks:
    """Build generator (averaged weights if the file has them) and text encoder from a checkpoint, strictly, in float32. Stored sizes are
    compared with the stored tensors before memory is allocated. Raises CheckpointError."""
    checkpoint = load_checkpoint(path)
    config = checkpoint_config(path, checkpoint)
    weights = "generator_ema_state_dict" if "generator_ema_state_dict" in checkpoint else "generator_state_dict"
    if isinstance(checkpoint[weights], dict) and config.model.num_layers > len(checkpoint[weights]):
        raise CheckpointError(f"{path}: model.num_layers is {config.model.num_layers}, more than the file has tensors")
    try:
        with torch.device("meta"):  # shapes only
            generator, text_encoder = TinyCausalWanModel(config.model), TextEncoder(config.text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no network can be built of its stored sizes ({error})") from error
    for module, key in ((generator, weights), (text_encoder, "text_encoder_state_dict")):
        check_state(module, checkpoint[key], f"{path}: {key}")
        module.load_state_dict({name: value.float() for name, value in checkpoint[key].items()}, assign=True)
        module.to(device).eval().requires_grad_(False)
    return LoadedNetworks(generator, text_encoder, config, checkpoint["step"], checkpoint["prompts_drawn"], digits_seen(checkpoint))


def check_state(module: torch.nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Raise CheckpointError naming what differs unless `state` has exactly the module's tensors."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{name} is not a dict of this network's tensors")
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(f"{name}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(f"{name}: {key} is {tuple(value.shape)}, expected {tuple(own[key].shape)}")


def load_state(module: torch.nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Strict `load_state_dict` in the module's own dtype; raises CheckpointError as `check_state` does."""
    check_state(module, state, name)
    own = module.state_dict()
    module.load_state_dict({key: placed_like(value, own[key]) for key, value in state.items()})


def digits_seen(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """The splits that the networks of a checkpoint learned from; older files, from before judges had their own digits, saw those too."""
    return tuple(checkpoint["digits_seen"]) if "digits_seen" in checkpoint else ("train", "judge")


def splits_learned(dataset: DataConfig) -> tuple[str, ...]:
    """The splits that a training on these data learns from. Without a share for the judges theirs too; with the original files, whose
    training digits include the bundled ones, all."""
    if isinstance(dataset, VideosConfig):
        return ("train",)
    if dataset.source == "idx":
        return SPLITS
    return ("train",) if dataset.judge_fraction > 0 else ("train", "judge")


def merge_splits(*seen: Sequence[str]) -> tuple[str, ...]:
    """The splits that several trainings have seen together, in the order of `SPLITS`."""
    return tuple(split for split in SPLITS if any(split in one for one in seen))


def merge_counts(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    """Prompts drawn by two trainings together: per seed, the larger number, as both count from 0."""
    return {seed: max(one.get(seed, 0), other.get(seed, 0)) for seed in one.keys() | other.keys()}


def same_text_encoder(one: LoadedNetworks, other: LoadedNetworks) -> bool:
    """Up to rounding: a float16 file equals the float32 one that it was made from."""
    pairs = zip(one.text_encoder.parameters(), other.text_encoder.parameters(), strict=True)
    return all(torch.allclose(own, wanted, rtol=1e-2, atol=1e-3) for own, wanted in pairs)


def slim_checkpoint(sources: Sequence[Path], target: Path) -> None:
    """Write the averaged weights of a source in float16, without what only resuming needs; of several, their mean (a model soup, Wortsman
    et al., arXiv 2203.05482), which needs networks with a common past. Settings are those of the last. Raises CheckpointError for an unfit
    source, sources that do not go together and a target that exists, OSError as `save_checkpoint`."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: give the name of a new file, or delete it first")
    networks = [load_networks(source, torch.device("cpu")) for source in sources]
    last = networks[-1]
    for path, item in zip(sources, networks, strict=True):
        own, wanted = ((each.config.model, each.config.text) for each in (item, last))
        if own != wanted:
            raise CheckpointError(f"{path} has other sizes than {sources[-1]} ({own}, {wanted}): only equal ones have a mean")
        if not same_text_encoder(item, last):
            raise CheckpointError(f"{path} has another text encoder than {sources[-1]}: only networks of one teacher have a mean")
    checkpoint = load_checkpoint(sources[-1])
    states = [item.generator.state_dict() for item in networks]
    slim = {
        "generator_state_dict": {key: (sum(state[key] for state in states) / len(states)).half() for key in states[-1]},
        "text_encoder_state_dict": {key: value.half() for key, value in checkpoint["text_encoder_state_dict"].items()},
        "optimizer_state_dict": {},
        "prompts_drawn": reduce(merge_counts, (item.prompts_drawn for item in networks)),
        "digits_seen": list(merge_splits(*(item.digits_seen for item in networks))),
        **{key: checkpoint[key] for key in ("step", "training_type", "config", "runtime") if key in checkpoint},
    }
    save_checkpoint(target, slim)


def main() -> None:
    parser = argparse.ArgumentParser(description="Strip a checkpoint, or the mean of several, to its averaged weights in float16.")
    parser.add_argument("sources", type=user_path, nargs="+", metavar="IN")
    parser.add_argument("target", type=user_path, metavar="OUT")
    arguments = parser.parse_args()
    try:
        slim_checkpoint(arguments.sources, arguments.target)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
