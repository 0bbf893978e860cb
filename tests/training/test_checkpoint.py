"""Checkpoints: atomic save, exact round trip, every broken or hostile file refused before it can do anything."""

import io
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import randomise
from helpers.stages import run_config

from moving_mnist import DatasetConfig
from network.text_encoder import TextEncoder
from tiny_causal_wan import TinyCausalWanModel
from training import checkpoint as checkpoint_module
from training.checkpoint import (
    REQUIRED_KEYS,
    CheckpointError,
    checkpoint_config,
    load_checkpoint,
    load_networks,
    load_state,
    save_checkpoint,
    slim_checkpoint,
    splits_learned,
)
from training.config import PretrainConfig, config_from_dict, config_to_dict

CONFIG = run_config(PretrainConfig())


@pytest.fixture(scope="module")
def whole() -> dict:
    """What a run would save: live and averaged weights that differ, and the optimizer's state."""
    torch.manual_seed(0)
    live, average = randomise(TinyCausalWanModel(CONFIG.model), 1), randomise(TinyCausalWanModel(CONFIG.model), 2)
    moments = {key: torch.randn_like(value) for key, value in live.state_dict().items()}
    return {
        "generator_state_dict": live.state_dict(), "generator_ema_state_dict": average.state_dict(),
        "text_encoder_state_dict": TextEncoder(CONFIG.text).state_dict(), "optimizer_state_dict": {"adamw": {"state": moments}},
        "step": 42, "training_type": "pretrain", "config": config_to_dict(CONFIG), "prompts_drawn": {0: 8},
    }


@pytest.fixture
def path(tmp_path, whole) -> Path:
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", whole)
    return tmp_path / "run" / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------------------- broken files


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("wrapped", [lambda key: f"module.{key}", lambda key: f"_orig_mod.{key}", lambda key: f"module._orig_mod.{key}",
                                     lambda key: key.replace("blocks.0.", "blocks.0._orig_mod.")])
def test_names_that_a_wrapper_changed_are_taken_back(tmp_path, whole, wrapped):
    states = ("generator_state_dict", "generator_ema_state_dict", "text_encoder_state_dict")
    save_checkpoint(tmp_path / "c.pt", {**whole, **{key: {wrapped(name): value for name, value in whole[key].items()} for key in states}})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert all(loaded[key].keys() == whole[key].keys() for key in states)
    load_networks(tmp_path / "c.pt", torch.device("cpu"))


def test_other_kinds_of_files_are_refused(tmp_path, path):
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    for content in (b"hello", bytes(1000), buffer.getvalue(), b"x" + path.read_bytes(), pickle.dumps({"step": 1})):
        (tmp_path / "other.pt").write_bytes(content)
        refused(tmp_path / "other.pt")
    assert "no checkpoint at" in refused(tmp_path / "missing.pt")
    assert "no checkpoint at" in refused(tmp_path)  # a folder
    (tmp_path / "c.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert "holds weights without the settings of their training" in refused(tmp_path / "c.safetensors")


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_file_without_a_required_key_is_foreign(tmp_path, whole, key):
    torch.save({name: value for name, value in whole.items() if name != key}, tmp_path / "foreign.pt")
    assert key in refused(tmp_path / "foreign.pt")


# ------------------------------------------------------------------------------------------------------------- networks


def test_networks_carry_the_averaged_weights_in_evaluation_mode(path, whole):
    networks = load_networks(path, torch.device("cpu"))
    assert networks.config == CONFIG and networks.step == 42
    assert not networks.generator.training and not any(p.requires_grad for p in networks.generator.parameters())
    for key, value in networks.generator.state_dict().items():
        assert torch.equal(value, whole["generator_ema_state_dict"][key])


def test_weights_of_another_size_or_network_are_named(whole):
    model = TinyCausalWanModel(CONFIG.model)
    state = dict(whole["generator_state_dict"])
    key, value = next((key, value) for key, value in state.items() if value.ndim == 2)
    with pytest.raises(CheckpointError, match=rf"file: .*expected \({value.shape[0]}, {value.shape[1]}\)"):
        load_state(model, {**state, key: value[:-1]}, "file")
    with pytest.raises(CheckpointError, match="missing .*" + key):
        load_state(model, {name: tensor for name, tensor in state.items() if name != key}, "file")
    with pytest.raises(CheckpointError, match="unexpected .*stranger"):
        load_state(model, {**state, "stranger": value}, "file")
    with pytest.raises(CheckpointError, match="file is not a dict of this network's tensors"):
        load_state(model, {**state, key: "text"}, "file")


@pytest.mark.parametrize("config", [
    3, {}, {"training": {"training_type": []}}, {**config_to_dict(CONFIG), "novelty": 1},
])
def test_a_configuration_of_another_version_is_refused(path, whole, config):
    with pytest.raises(CheckpointError, match="its configuration does not fit this version"):
        checkpoint_config(path, {**whole, "config": config})


@pytest.mark.parametrize("weights", [7, [1, 2], {"q": 3}])
def test_weights_that_are_none_are_refused_by_loading_and_by_stripping(tmp_path, whole, weights):
    save_checkpoint(tmp_path / "broken.pt", {**whole, "generator_ema_state_dict": weights})
    for use in (lambda path: load_networks(path, torch.device("cpu")), lambda path: slim_checkpoint([path], tmp_path / "slim.pt")):
        with pytest.raises(CheckpointError, match="broken.pt"):
            use(tmp_path / "broken.pt")
    assert not (tmp_path / "slim.pt").exists()


def test_a_slim_checkpoint_loads_in_half_precision_and_less_than_half_the_size(path, tmp_path, whole):
    slim = tmp_path / "slim.pt"
    slim_checkpoint([path], slim)
    assert slim.stat().st_size < path.stat().st_size / 2
    stored = load_checkpoint(slim)
    assert {value.dtype for value in stored["generator_state_dict"].values()} == {torch.float16}
    assert stored["optimizer_state_dict"] == {} and stored["step"] == 42 and stored["training_type"] == "pretrain"
    loaded = load_networks(slim, torch.device("cpu")).generator.state_dict()
    for key, value in whole["generator_ema_state_dict"].items():
        assert loaded[key].dtype == value.dtype
        torch.testing.assert_close(loaded[key], value, rtol=1e-3, atol=1e-6)


def test_the_command_line_strips_or_explains(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(path), str(tmp_path / "slim.pt")])
    checkpoint_module.main()
    assert "slim.pt: 0." in capsys.readouterr().out
    before = path.read_bytes()
    for source, target, words in (("none.pt", "other.pt", "no checkpoint at"), ("slim.pt", str(path), "checkpoint.pt exists already")):
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / source), str(tmp_path / target)])
        with pytest.raises(SystemExit, match=f"error: .*{words}"):
            checkpoint_module.main()
    assert path.read_bytes() == before


def changed(whole: dict, tmp_path: Path, name: str, **changes: object) -> Path:
    save_checkpoint(tmp_path / name, {**whole, **changes})
    return tmp_path / name


def test_several_sources_make_their_mean(path, tmp_path, whole):
    other = {key: value + 0.5 for key, value in whole["generator_ema_state_dict"].items()}
    second = changed(whole, tmp_path, "other.pt", generator_ema_state_dict=other, step=50, prompts_drawn={0: 5, 3: 7})
    slim_checkpoint([path, second], tmp_path / "mean.pt")
    loaded = load_networks(tmp_path / "mean.pt", torch.device("cpu"))
    assert loaded.step == 50 and loaded.prompts_drawn == {0: 8, 3: 7}
    for key, value in loaded.generator.state_dict().items():
        torch.testing.assert_close(value, whole["generator_ema_state_dict"][key] + 0.25, rtol=1e-3, atol=1e-3)


def test_what_digits_a_network_has_seen_is_kept_and_a_mean_has_seen_all_of_its_parts(path, tmp_path, whole):
    assert load_networks(path, torch.device("cpu")).digits_seen == ("train", "judge")  # from before judges had their own digits
    clean = changed(whole, tmp_path, "clean.pt", digits_seen=["train"])
    assert load_networks(clean, torch.device("cpu")).digits_seen == ("train",)
    for sources, seen in (([clean], ("train",)), ([clean, path], ("train", "judge"))):
        target = tmp_path / f"{len(sources)}.pt"
        slim_checkpoint(sources, target)
        assert load_networks(target, torch.device("cpu")).digits_seen == seen
    with pytest.raises(CheckpointError, match="digits_seen is .*expected a list of some of train, judge, test"):
        load_checkpoint(changed(whole, tmp_path, "wrong.pt", digits_seen=["all"]))
    both, every = ("train", "judge"), ("train", "judge", "test")
    for changes, splits in (({}, ("train",)), ({"judge_fraction": 0.0}, both), ({"mnist_root": "x"}, every)):
        assert splits_learned(DatasetConfig(**changes)) == splits
    dataset = {key: value for key, value in whole["config"]["dataset"].items() if key != "judge_fraction"}
    assert config_from_dict({**whole["config"], "dataset": dataset}).dataset.judge_fraction == 0
    assert config_from_dict(whole["config"]).dataset.judge_fraction > 0


def test_networks_that_have_no_mean_are_refused(path, tmp_path, whole):
    torch.manual_seed(5)
    stranger = changed(whole, tmp_path, "stranger.pt", text_encoder_state_dict=randomise(TextEncoder(CONFIG.text), 5).state_dict())
    with pytest.raises(CheckpointError, match="checkpoint.pt has another text encoder than .*stranger.pt: only networks of one teacher"):
        slim_checkpoint([path, stranger], tmp_path / "mean.pt")
    larger = replace(CONFIG, model=replace(CONFIG.model, width=48))
    weights = TinyCausalWanModel(larger.model).state_dict()
    states = {"generator_ema_state_dict": weights, "generator_state_dict": weights}
    wide = changed(whole, tmp_path, "wide.pt", config=config_to_dict(larger), **states)
    with pytest.raises(CheckpointError, match="checkpoint.pt has other sizes than .*wide.pt"):
        slim_checkpoint([path, wide], tmp_path / "mean.pt")
    assert not (tmp_path / "mean.pt").exists()
