"""evaluate.py scores a checkpoint on prompts that its training never drew, and says clearly what it cannot do."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.networks import save_untrained
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clips.own_videos import VideosConfig
from evaluate import EvaluateConfig, evaluate, examine_clips, main, make_rows, write_results
from judging.prompts import new_indices, say_who_saw_the_judges_digits
from judging.report import LOOK_FIGURES, PROMPT_FIGURES
from machine.paths import CONFIGS
from machine.seeds import Purpose
from moving_mnist import DatasetConfig, MovingMNISTGenerator
from sampling.samplers import SamplerSettings, describe_sampler
from tiny_causal_wan import ModelConfig
from training.checkpoint import load_networks
from training.command_line import run_in_one_line
from training.config import Config, PretrainConfig

NUM_DRAWN = 300


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An untrained network for 32-pixel frames of one digit."""
    model = ModelConfig(width=24, num_layers=1, num_heads=2)
    return save_untrained(tmp_path / "teacher.pt", Config(model=model, training=PretrainConfig(teacher_steps=2)), NUM_DRAWN)


def test_rows_are_named_by_their_folders_and_sampled_as_wished():
    wishes = {"num_steps": 7, "guidance": 1.5, "eta": 0.25, "ink_kept": 0.75}
    rows = make_rows(EvaluateConfig(checkpoint=["one/checkpoint_final.pt", "two/checkpoint_final.pt", "three.pt"], **wishes))
    assert [row.name for row in rows] == ["one/checkpoint_final", "two/checkpoint_final", "three"]
    assert {row.settings for row in rows} == {SamplerSettings(**wishes)}
    (row,) = make_rows(EvaluateConfig(checkpoint="one.pt", num_steps=4, causal=True))
    assert row.settings == SamplerSettings(num_steps=4, causal=True)
    assert EvaluateConfig(sanity=True).output_dir == "results" and EvaluateConfig().output_dir == "outputs/evaluation"
    assert EvaluateConfig(sanity=True, output_dir="here").output_dir == "here"


def test_what_ships_is_scored_beside_its_start_in_few_guided_steps():
    rows = make_rows(EvaluateConfig())
    start = load_networks(rows[1].path, torch.device("cpu")).config.training
    assert [f"{row.name}, {describe_sampler(row.settings, start)}" for row in rows[1:4]] == [
        "guided Euler, 4 steps, guidance 2.5", "guided Euler, 2 steps, guidance 2.5", "no guidance, 4 steps",
    ]
    assert [row.path.name for row in rows] == [*["teacher.pt"] * 4, "student.pt"]
    plans = [row.settings.make_plan(start) for row in rows[1:4]]
    assert [(plan.evaluations, plan.cache_evaluations, plan.fresh_noise) for plan in plans] == [(8, 2, False), (4, 2, False), (4, 1, True)]
    assert plans[0].times == plans[2].times


@pytest.mark.parametrize(("changes", "options"), [
    ({}, (None, None)), ({"int8": True}, (None, "int8")), ({"compile": True, "int8": True}, ("compile", "int8")),
])
def test_networks_are_prepared_as_asked(changes: dict, options: tuple, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    prepare = Mock(side_effect=ValueError("enough"))
    monkeypatch.setattr("evaluate.prepared", prepare)
    with pytest.raises(ValueError, match="^enough"):
        evaluate(EvaluateConfig(checkpoint=str(teacher), precision="float32", **changes))
    assert prepare.call_args.args[2:] == options


def test_real_videos_score_high_an_untrained_network_low_and_files_are_left(teacher: Path, tmp_path: Path, capsys):
    config = EvaluateConfig(checkpoint=str(teacher), num_videos=24, num_frames=6, precision="float32", output_dir=str(tmp_path / "out"))
    results = evaluate(config)
    assert list(results) == ["real", "teacher, 2 steps, guidance 4, eta 1"]
    untrained = results["teacher, 2 steps, guidance 4, eta 1"]
    assert results["real"]["frames_right"] > 0.9 and results["real"]["track_within_1px"] == 1
    assert untrained["frames_right"] < 0.5 and untrained["frames_per_second"] > 0
    assert (untrained["precision"], untrained["compiled"], untrained["int8"]) == ("float32", False, False)
    assert (untrained["plan"]["num_steps"], untrained["plan"]["ink_kept"]) == (2, 0.2)
    assert (untrained["evaluations_a_block"], untrained["cache_evaluations_a_block"]) == (4, 0)
    for key in PROMPT_FIGURES | LOOK_FIGURES:
        low, high = results["real"][f"{key}_ci"]
        assert low <= results["real"][key] <= high
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == results
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "per_frame.png", "comparison.png", "comparison.gif"}
    assert results["real"]["frechet_distance"] < untrained["frechet_distance"] and untrained["coverage"] < results["real"]["coverage"]
    assert results["real"]["frechet_distance"] < results["real"]["frames_shuffled"]["frechet_distance"]
    assert set(results["real"]["training_digits"]) >= {"frechet_distance", "density", "coverage"}
    assert sum(line.startswith("teacher, 2 steps") for line in capsys.readouterr().out.splitlines()) == 3  # in every table


def test_videos_of_two_digits_are_counted(tmp_path: Path):
    model = ModelConfig(frame_size=64, width=24, num_layers=1, num_heads=2)
    dataset = DatasetConfig(frame_size=64, digit_size=28, num_digits=2, min_speed=2.4, max_speed=4.4)
    pair = save_untrained(tmp_path / "pair.pt", Config(model=model, dataset=dataset, training=PretrainConfig(teacher_steps=1)))
    results = evaluate(EvaluateConfig(checkpoint=str(pair), num_videos=8, num_frames=9, precision="float32", output_dir=str(tmp_path)))
    untrained = results["pair, 1 steps, guidance 4, eta 1"]
    assert results["real"]["count_right"] > 0.6 and untrained["count_right"] < 0.4
    assert "frechet_distance" not in results["real"] and (tmp_path / "per_frame.png").exists()


def test_too_few_videos_have_no_distribution(teacher: Path, tmp_path: Path, capsys):
    results = evaluate(EvaluateConfig(checkpoint=str(teacher), num_videos=2, num_frames=3, precision="float32", output_dir=str(tmp_path)))
    assert "coverage" not in results["real"] and "they need more videos" in capsys.readouterr().out


def test_prompts_are_held_out_word_for_word(teacher: Path):
    networks = load_networks(teacher, torch.device("cpu"))
    held_out = MovingMNISTGenerator(DatasetConfig(), "test", purpose=Purpose.EVALUATION)
    drawn = MovingMNISTGenerator(DatasetConfig(), "train").captions(0, range(NUM_DRAWN))
    captions, again, other = (held_out.captions(seed, new_indices(held_out, [networks], seed, 50)) for seed in (0, 0, 1))
    assert len(captions) == 50 and captions == again != other and not set(drawn) & set(captions)


def test_a_network_that_saw_the_judges_digits_is_named(teacher: Path, capsys):
    networks = load_networks(teacher, torch.device("cpu"))
    clean = replace(networks, digits_seen=("train",))
    say_who_saw_the_judges_digits({"a.pt": clean})
    assert capsys.readouterr().out == ""
    say_who_saw_the_judges_digits({"a.pt": clean, "b.pt": networks})
    assert capsys.readouterr().out.startswith("note: b.pt learned from digits that the judges learned from")


def test_the_yaml_composes_to_the_defaults():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert OmegaConf.to_object(compose("evaluate")) == EvaluateConfig()


@pytest.mark.parametrize(("argument", "words"), [
    ("num_videos=0", "num_videos is 0: expected at least 1"), ("seed=abc", "seed"), ("checkpoint=absent.pt", "no checkpoint at absent.pt"),
    ("checkpoint=[a.pt,'']", "checkpoint is empty: expected a path"),
    ("chekpoint=x", "unknown key chekpoint: the nearest known key is checkpoint"),
])
def test_bad_input_is_one_line(argument: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", argument, "device=cpu"])
    with pytest.raises(SystemExit) as caught:
        run_in_one_line(main, EvaluateConfig)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message and words in message


def test_a_second_evaluation_leaves_the_first_ones_files(tmp_path):
    video, figures = torch.zeros(1, 3, 1, 32, 32), {"frames_right_by_frame": [1.0, 0.5, 1.0], "frames_right_by_frame_ci": [[0.5, 1.0]] * 3}
    for word in ("first", "second"):
        write_results(tmp_path, {word: figures}, [("real", video)], ["a 3"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"first": figures}
    assert json.loads((tmp_path / "evaluation_2.json").read_text()) == {"second": figures}


def test_moved_clips_are_asked_for_by_the_key_of_this_script(tmp_path):
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    for config, missing in ((EvaluateConfig(), moved), (EvaluateConfig(videos_root=str(elsewhere)), elsewhere)):
        with pytest.raises(FileNotFoundError, match=f"no folder at {missing}: set videos_root to the folder"):
            examine_clips(config, VideosConfig(root=str(moved)), {})
