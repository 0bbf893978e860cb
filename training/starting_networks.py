"""The networks that a training starts from or continues: read from files, and refused where they do not fit the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.own_videos import VideosConfig
from machine.paths import REPOSITORY
from method.settings import FewStepConfig, PretrainConfig, SelfForcingConfig
from training.checkpoint import CheckpointError, LoadedNetworks, load_networks, same_text_encoder
from training.config import Config, config_from_dict, config_to_dict, flatten

DATA_GEOMETRY = {f"dataset.{name}" for name in ("frame_size", "digit_size", "num_digits", "channels")}  # the same in all of its stages


def check_is_bidirectional(path: str, stored: Config) -> None:
    """Raise CheckpointError where a network was trained causally only and so is no bidirectional teacher."""
    training = stored.training
    if isinstance(training, PretrainConfig) and training.objective != "mixed":
        raise CheckpointError(
            f"{path} was trained with objective={training.objective}, which makes a causal network, but a bidirectional teacher is "
            "needed here: give one of objective=mixed, and this one as training.generator_checkpoint if it is to be the start"
        )


def check_same_networks(path: Path, stored: Config, wanted: Config) -> None:
    """Raise CheckpointError naming both sides where a checkpoint's networks, or what its videos show, are not this run's."""
    if type(stored.dataset) is not type(wanted.dataset):
        kinds = ("one's own videos" if isinstance(each.dataset, VideosConfig) else "Moving MNIST" for each in (stored, wanted))
        raise CheckpointError("{} was trained on {}, and this run is of {}: give a network of the same data set".format(path, *kinds))
    words, asked_words = stored.text.words, wanted.text.words
    if words != asked_words:
        apart = sorted(set(words) ^ set(asked_words))[:8]
        how = f"which do not share the words {', '.join(apart)}" if apart else "which have the same words in another order"
        raise CheckpointError(f"{path} was trained with other captions than those of this run, {how}: give the same ones, or another file")
    theirs, ours = (flatten(config_to_dict(each)) for each in (stored, wanted))
    sizes = [key for key in ours if key in DATA_GEOMETRY or key.startswith(("model.", "text.")) and key != "text.vocabulary"]
    differing = [key for key in sizes if theirs[key] != ours[key]]
    if differing:
        found, asked = (", ".join(f"{key}={each[key]}" for key in differing) for each in (theirs, ours))
        raise CheckpointError(f"{path} was trained with {found}, but this run asks for {asked}: give the same sizes or another file")


def check_same_start(training: SelfForcingConfig, checkpoint: dict[str, Any], name: str, teacher: dict[str, Tensor]) -> None:
    """Raise CheckpointError where a resumed run had another start or another teacher: what is configured would be silently ignored."""
    if training.generator_checkpoint is not None:
        stored = config_from_dict(checkpoint["config"]).training if "config" in checkpoint else None
        if not isinstance(stored, SelfForcingConfig) or stored.generator_checkpoint != training.generator_checkpoint:
            raise CheckpointError(f"training.generator_checkpoint cannot be combined with training.resume={name}: "
                                  "the checkpoint already contains a generator")
    found = checkpoint.get("real_score_state_dict", {})
    if found.keys() == teacher.keys() and not all(torch.equal(found[key], value.cpu()) for key, value in teacher.items()):
        raise CheckpointError(
            f"{name} was trained with another teacher than training.pretrained_checkpoint={training.pretrained_checkpoint}: "
            "give the teacher of that run, or start a new run with training.generator_checkpoint"
        )


def load_start(path: Path, config: Config, teacher: LoadedNetworks, device: torch.device) -> LoadedNetworks:
    """The network that a generator starts from. Raises CheckpointError as `load_fitting` does, and if it was trained with another text
    encoder than the teacher's, which is the one kept."""
    start = load_fitting(path, config, device)
    if not same_text_encoder(start, teacher):
        raise CheckpointError(f"{path} was trained with another text encoder than the teacher {config.training.pretrained_checkpoint}: "
                              "give a generator that was trained from this teacher")
    return start


def load_teacher(path: Path, config: Config, device: torch.device) -> LoadedNetworks:
    """The pretrained network and its text encoder, frozen. Raises CheckpointError as `load_fitting` does, and for a student."""
    teacher = load_fitting(path, config, device)
    if isinstance(teacher.config.training, FewStepConfig):
        raise CheckpointError(
            f"{path} is a few-step student, whose bidirectional side is no longer trained: give a pretrained network as the "
            "teacher; training.generator_checkpoint=PATH lets a generator start from a student"
        )
    return teacher


def load_fitting(path: Path, config: Config, device: torch.device) -> LoadedNetworks:
    """The networks of a file, which must have this run's sizes. A relative path that does not exist is looked for in the repository.
    Raises CheckpointError naming both sides if sizes differ."""
    if not path.exists() and (REPOSITORY / path).exists():  # an absolute path stays itself
        path = REPOSITORY / path
    stored = load_networks(path, device)
    check_same_networks(path, stored.config, config)
    return stored
