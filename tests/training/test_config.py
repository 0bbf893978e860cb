"""Configuration: every YAML composes, impossible values and unknown keys are refused by name, round trips are exact."""

import shlex
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
from helpers.compose import composed
from hydra.errors import HydraException

from clips.own_videos import VideosConfig
from machine.paths import CONFIGS
from method.settings import CausalConsistencyConfig, CausalODEConfig, check_num_frames
from moving_mnist import DatasetConfig
from network.text_encoder import TextEncoderConfig
from tiny_causal_wan import ModelConfig
from training.config import (
    Config,
    PretrainConfig,
    SelfForcingConfig,
    WandbConfig,
    check_parts_fit,
    config_from_dict,
    config_to_dict,
    explain_refusal,
)
from training.data import with_vocabulary

CHOICES = [
    (path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name in ("model", "dataset", "training", "experiment")
]
PARTNERS = {  # a choice that only fits together with another one
    ("dataset", "videos"): ["dataset.root=DIR"],
    ("model", "tiny_64"): ["dataset=moving_mnist_64"], ("dataset", "moving_mnist_64"): ["model=tiny_64"],
}


def refusal(*overrides: str) -> str:
    with pytest.raises((HydraException, ValueError)) as caught:
        composed(*overrides)
    message = explain_refusal(caught.value)
    assert "\n" not in message and "HYDRA_FULL_ERROR" not in message
    return message


def test_momentum_goes_with_muon_and_in_a_stored_configuration_with_any_optimizer():
    config = composed("training.optimizer=muon", "training.muon_momentum=0.9", "training.critic_muon_momentum=0")
    assert (config.training.muon_momentum, config.training.critic_muon_momentum) == (0.9, 0.0)
    stored = config_to_dict(config)  # whatever the defaults become, a checkpoint of AdamW stays readable
    stored["training"]["optimizer"] = "adamw"
    assert config_from_dict(stored).training.muon_momentum == 0.9


@pytest.mark.parametrize("override, words", [
    ("training.ema_decay=0.9", ["training.ema_decay is 0.9: expected 0.99", "with training.ema_power=3.0", "training.ema_power=null"]),
    ("training.muon_momentum=0.9", ["training.muon_momentum is 0.9: expected 0.5, its default, with training.optimizer=adamw"]),
])
def test_a_setting_that_another_one_makes_void_is_refused(override: str, words: list[str]):
    message = refusal("training.optimizer=adamw", override)
    assert all(word in message for word in words), message


def test_names_of_classes_join_the_vocabulary_and_are_kept():
    config = with_vocabulary(composed("dataset.class_names=[t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot]"))
    assert {"sneaker", "ankle", "boot", "moving"} <= set(config.text.vocabulary)
    assert config_from_dict(config_to_dict(config)) == config and with_vocabulary(composed()).text.vocabulary is None
    given = replace(config, text=replace(config.text, vocabulary=["sneaker"]))
    assert with_vocabulary(given).text.vocabulary == ["sneaker"]


@pytest.mark.parametrize("group, name", CHOICES, ids=lambda value: value)
def test_every_choice_composes_and_validates(group, name):
    assert isinstance(composed(f"{group}={name}", *PARTNERS.get((group, name), [])), Config)


def test_own_videos_decide_the_sizes_of_the_network():
    config = composed("dataset=videos", "dataset.root=DIR", "dataset.frame_size=64", "dataset.channels=1")
    assert config.dataset == VideosConfig(root="DIR", frame_size=64, channels=1)
    assert (config.model.frame_size, config.model.channels, config.model.width) == (64, 1, 192)
    assert composed("dataset=videos", "dataset.root='~/clips'").dataset.root == str(Path("~/clips").expanduser())
    assert config_from_dict(config_to_dict(config)) == config


def test_defaults_are_the_dataclasses_own_and_overrides_arrive_with_their_type():
    changed = "training.num_steps=2000", "training.lr=1e-4", "training.denoising_steps=[1000,400]", "model.patch_size=[1,4,4]"
    config = composed("training=published_exits", *changed)
    assert config.training == SelfForcingConfig(num_steps=2000, lr=1e-4, denoising_steps=[1000, 400])
    assert config.model.patch_size == [1, 4, 4]
    assert composed("training=published_exits") == Config(training=SelfForcingConfig())
    assert composed("training=pretrain") == Config(training=PretrainConfig(clip_steps=2200))


@pytest.mark.parametrize("override, words", [
    ("training.num_step=3", ["unknown key training.num_step", "training.num_steps"]),
    ("num_steps=3", ["unknown key num_steps", "training.num_steps"]),
    ("training.muon_lr=1", ["unknown key training.muon_lr in a run of training type dmd2"]),
    ("+training.num_step=3", ["unknown key training.num_step", "training.num_steps"]),
    ("training.lr=abc", ["training.lr", "abc", "Float"]),
    ("training.denoising_steps=[1000,soon]", ["training.denoising_steps", "soon", "Integer"]),
    ("training=selfforcing", ["unknown choice training=selfforcing", "pretrain, published_exits, self_forcing, teacher_forcing"]),
    ("training.loss=wgan", ["training.loss is wgan", "dmd, sid, gan"]), ("training.num_steps", ["training.num_steps"]),
    ("training.min_num_frames=10", ["training.min_num_frames is 10", "9 or 12"]),
    ("training.max_num_frames=6", ["training.min_num_frames is 9", "training.max_num_frames=6"]),
    ("training.denoising_steps=[1000,500,500]", ["training.denoising_steps is [1000, 500, 500]", "descending"]),
    ("training.denoising_steps=[750,0]", ["training.denoising_steps", "from 1000 down to at least 1"]),
    ("model.patch_size=[1,5,5]", ["model.patch_size [1, 5, 5]", "does not divide the frame size 32"]),
    ("model.patch_size=[2,8,8]", ["model.patch_size is [2, 8, 8]", "num_frames_per_block=3"]),
    ("model=tiny_64", ["model.frame_size is 64", "dataset.frame_size=32"]),
    ("dataset=videos", ["dataset.root is empty: expected the folder of your clips"]),
    ("dataset.root=DIR", ["unknown key dataset.root", "dataset=videos"]),
    ("text.width=32", ["model.text_width is 64", "text.width=32"]),
    ("model.channels=3", ["model.channels is 3", "dataset.channels=1"]),
    ("training.pretrained_checkpoint=", ["training.pretrained_checkpoint is empty"]),
    ("training.lr=nan", ["training.lr is nan"]), ("training.decay_fraction=1.5", ["training.decay_fraction is 1.5", "[0, 1]"]),
    ("training.guidance_interval=[0.8,0.2]", ["training.guidance_interval", "[0.8, 0.2]", "the lower one first"]),
    ("training.adam_betas=[0.9]", ["training.adam_betas is [0.9]"]), ("device=gpu", ["device is gpu", "auto, cpu, cuda, mps"]),
    ("seed=-1", ["seed is -1"]), ("wandb.mode=on", ["wandb.mode is"]), ("training.num_steps=0", ["training.num_steps is 0"]),
    ("training.resume=~/x.pt", ["""needs quotes within quotes, 'training.resume="~/x.pt"'"""]),
    ("run_name=../elsewhere", ["run_name is ../elsewhere", "without a path"]), ("run_name=checkpoint_final.pt", ["run_name"]),
])
def test_a_refused_override_is_one_line_that_names_it(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("path", ["~/runs", "/tmp/José", "/tmp/run=1", "/tmp/a[1]", "/tmp/a#1", "/tmp/a b", 'C:\\runs\\', 'a"b'])
def test_what_the_refusal_of_a_path_advises_is_understood(path):
    override = f"log_dir={path}"
    try:
        config = composed(override)
    except HydraException as error:
        advised, = shlex.split(explain_refusal(error).partition("within quotes, ")[2])
        config = composed(advised)
    assert config.log_dir == str(Path(path).expanduser())


LONG = {"window_frames": 6, "rollout_frames": 21, "min_num_frames": 9, "max_num_frames": 9}
EXCLUDED = [
    (LONG | {"rollout_frames": 6}, "rollout_frames is 6: expected at least training.max_num_frames=9"),
    (LONG | {"window_frames": None}, "window_frames is None: expected at most training.max_num_frames=9, with training.rollout_frames"),
    (LONG | {"generator_inputs": "teacher_forced"}, "rollout_frames is 21: expected none where real videos are used"),
    (LONG | {"switch_probability": 1.5}, r"switch_probability is 1.5: expected a number in \[0, 1\]"),
    ({"switch_probability": 0.5}, "switch_probability is 0.5: expected 0 without training.rollout_frames, as no window starts later"),
    (LONG | {"hide_first_chunk": True}, "hide_first_chunk is True: expected false with training.rollout_frames"),
    ({"generator_inputs": "teacher_forced", "context_noise": 100}, "context_noise is 100: expected 0 with training.generator_inputs=teach"),
    ({"dmd_sign": 0}, "dmd_sign is 0: expected 1"), ({"dmd_sign": -1, "loss": "sid"}, "dmd_sign is -1: expected 1 with .*loss=sid"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), [
    *((PretrainConfig, {key: value}, f"{key} is .*expected") for key, value in (
        ("muon_lr", nan), ("warmup_steps", -1), ("prompt_dropout", 1.5), ("loss_time_floor", 0.0), ("objective", "both"),
        ("digit_variation", 0.41), ("time_shift", inf), ("switch_probability", 1.5))),
    (PretrainConfig, {"switch_probability": 0.5, "clean_prefix_probability": 0.0}, "switch_probability is 0.5: expected 0 without clean"),
    (CausalODEConfig, {"trajectory_steps": 25}, r"trajectory_steps is 25: .*denoising_steps=\[1000, 750, 500, 250\], such as 4$"),
    (CausalConsistencyConfig, {"consistency_steps": 1}, "consistency_steps is 1"),
    *((SelfForcingConfig, changes, words) for changes, words in EXCLUDED),
])
def test_what_is_impossible_or_excludes_another_option_is_refused_in_one_line(kind, changes, words):
    with pytest.raises(ValueError, match=f"^training.{words}") as caught:
        kind(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_frames, is_first_alone, nearest", [
    (10, False, "9 or 12"), (0, False, "3"), (20, False, "18 or 21"), (-3, False, "3"), (0, True, "1"), (20, True, "19 or 22"),
])
def test_frame_counts_name_their_neighbours(num_frames, is_first_alone, nearest):
    with pytest.raises(ValueError, match=f"frames is {num_frames}: .*nearest valid: {nearest}$"):
        check_num_frames("frames", num_frames, 3, is_first_alone)
    check_num_frames("frames", 22 if is_first_alone else 21, 3, is_first_alone)


def unlike_defaults(training: PretrainConfig | SelfForcingConfig) -> Config:
    return Config(
        seed=7, device="cpu", precision="float32", log_dir="elsewhere", run_name="mine", training=training,
        model=ModelConfig(frame_size=16, channels=3, patch_size=[3, 4, 2], text_width=32), text=TextEncoderConfig(32, 9),
        dataset=DatasetConfig(frame_size=16, digit_size=8, channels=3, num_digits=2, mnist_root="digits"),
        wandb=WandbConfig(mode="disabled", project="p"),
    )


@pytest.mark.parametrize("training", [
    PretrainConfig(num_steps=7, muon_lr=0.5, resume="file.pt"), SelfForcingConfig(denoising_steps=[1000, 3], adam_betas=[0.5, 0.6]),
    CausalODEConfig(trajectory_teacher="bidirectional", denoising_steps=[1000, 600], trajectory_steps=10),
    CausalConsistencyConfig(consistency_steps=7), SelfForcingConfig(denoising_steps=[1000]),
])
def test_config_to_dict_and_back(training):
    config = unlike_defaults(training)
    plain = config_to_dict(config)
    assert config_from_dict(plain) == config
    assert type(config_from_dict(plain).training) is type(training)
    check_parts_fit(config)


def test_an_older_dict_without_a_field_gets_its_default_and_keeps_its_noised_copies():
    plain = config_to_dict(Config(training=SelfForcingConfig(num_steps=9)))
    plain["training"]["critic_draws"] = 3
    plain["training"]["continuation_probability"] = 0.5
    del plain["training"]["critic_warmup_steps"], plain["training"]["noise_draws"], plain["wandb"]
    assert config_from_dict(plain) == Config(training=SelfForcingConfig(num_steps=9, noise_draws=3))
