"""Whatever a user writes: any configuration composes or is refused in one line that names the key, any prompt becomes a video."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest
from helpers.generation import COMMON
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from generate import main
from machine.paths import CONFIGS
from method.settings import TRAINING_KINDS
from training.checkpoint import CheckpointError, checkpoint_config
from training.config import Config, build_config, check_choices, config_to_dict, explain_command_line, flatten, register_schemas

CHOICES = {"pretrain": "pretrain", "dmd2": "self_forcing", "causal_ode": "causal_ode", "causal_consistency": "causal_consistency"}
KEYS = {kind: tuple(flatten(config_to_dict(Config(training=TRAINING_KINDS[kind]())))) for kind in CHOICES}
register_schemas()

NUMBERS = st.one_of(
    st.integers(-3, 40), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**400]), st.floats(), st.floats(-2, 2),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "null", "true", "nan", "-inf", "1e999", "0x10", "1_0", "${seed}", "${no.such}", "???"]),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=4), st.dictionaries(st.text(max_size=3), PLAIN, max_size=2))


def is_one_line_naming(key: str, message: str) -> bool:
    return message != "" and "\n" not in message and "Traceback" not in message and key.split(".")[-1] in message


def as_override(key: str, value: object) -> str:
    """As it is written on the command line."""
    if isinstance(value, str) or value is None:
        return f"{key}={'null' if value is None else value}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def compose_or_refuse(overrides: list[str]) -> str | None:
    """None where it composes, else the one line that train.py would print."""
    try:
        check_choices(overrides)
        config = build_config(compose("train", overrides))
    except (HydraException, OmegaConfBaseException, OverflowError, ValueError) as error:  # what train.py makes a line of, no others
        return explain_command_line(error, overrides)
    assert isinstance(config, Config)
    return None


@pytest.fixture(scope="module")
def hydra_is_set_up():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@pytest.mark.parametrize("override", [
    "training.lr=1" + "0" * 400, "training=null", "experiment=${0}", "experiment=[health,null]", "experiment=[{}]",
    "training.lr={a:1", "training.lr=${no.such}", "training.adam_betas=${seed}", "training.denoising_steps=[[1000]]",
    "training.num_steps=null", "run_name=\x00", "training.pretrained_checkpoint=\n\xad@\x85eEm", "wandb=null", "training.resume=\'\'",
])
def test_a_refusal_names_what_was_written(hydra_is_set_up, override):
    message = compose_or_refuse([override])
    assert message is not None and is_one_line_naming(override.partition("=")[0], message), message


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_value_on_the_command_line_composes_or_is_refused_in_one_line(hydra_is_set_up, data):
    kind = data.draw(st.sampled_from(sorted(CHOICES)))
    key = data.draw(st.sampled_from(KEYS[kind]))
    value = data.draw(VALUES)
    message = compose_or_refuse([f"training={CHOICES[kind]}", as_override(key, value)])
    assert message is None or is_one_line_naming(key, message), f"{key}: {message}"


@given(st.data())
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_value_in_a_stored_configuration_is_read_or_refused_in_one_line(data):
    kind = data.draw(st.sampled_from(sorted(CHOICES)))
    plain = config_to_dict(Config(training=TRAINING_KINDS[kind]()))
    for key in data.draw(st.lists(st.sampled_from(KEYS[kind]), min_size=1, max_size=2, unique=True)):
        *groups, name = key.split(".")
        inner = plain
        for group in groups:
            inner = inner[group]
        inner[name] = data.draw(VALUES)
    try:
        config = checkpoint_config(Path("file.pt"), {"config": plain})
    except CheckpointError as error:
        assert re.fullmatch(r"file\.pt: its configuration does not fit this version of the code \(.*\)", str(error)), str(error)
    else:
        assert isinstance(config, Config)


NASTY = (
    "", " ", "a 7 moving up " * 2500, "\x00\x01\x1b[31m\x7f\x85", "a\x00 7\r\n\t\u2028\u202e", "\u0663 \u2167 \u4e03 \U0001f600\u200d",
    "e\u0301" * 200, "../../etc/passwd", "C:\\con\\nul", "'\"`$(rm)`{}[]", "\ufeff\ufffe\uffff",
    "a" * 100_000, "%s %n {0}", "<svg onload=x>",
)


def assert_videos(student_path: Path, folder: Path, prompts: list[str]) -> None:
    """Each of the prompts is a video, and its JSON gives it back; no file stands anywhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = ["--checkpoint", str(student_path), "--num_frames", "3", "--output_dir", str(folder / "out"), *COMMON]
        main([*call, "--prompts", *prompts])
    told = json.loads((folder / "out" / "generation.json").read_text())["videos"]
    assert [video["prompt"] for video in told] == prompts and [item.name for item in folder.iterdir()] == ["out"]
    for video in told:
        path = folder / "out" / video["file"]
        assert path.stat().st_size > 100 and path.name.isascii() and path.name.isprintable()
        assert json.loads(path.with_suffix(".json").read_text())["prompt"] == video["prompt"]


def test_nasty_prompts_become_videos(student_path, tmp_path, capfd):
    assert_videos(student_path, tmp_path, list(NASTY))
    assert all(line.isprintable() for line in re.split(r"[\r\n]", capfd.readouterr().out))
