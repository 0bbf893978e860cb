"""Tests of `generate`: a video is a function of (prompt, seed, checkpoint, settings), and bad input ends in one line.

The networks are tiny and untrained, their zero-initialised parts filled with noise, so that every input matters.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.generation import COMMON, STUDENT, TEACHER, generate_files, refusal, write_networks
from omegaconf import OmegaConf

import generate as entry
from clips.video_files import load_array
from dynamic_video_sf import SelfForcingEngine
from evaluate import EvaluateConfig
from generate import BidirectionalPlan, SamplerSettings, generate, main
from machine.runtime import Runtime
from method.plans import NAIVE_STEPS, RolloutPlan, baseline_plans, few_step_plan, many_step_plan, warp_steps
from network.attention import ContextWindow
from network.text_encoder import parse_caption
from sampling.samplers import prepared, sample_many_step
from tiny_causal_wan import TinyCausalWanModel
from training.checkpoint import LoadedNetworks, load_networks
from training.config import Config, PretrainConfig, SelfForcingConfig, TrainingConfig
from training.stages import PretrainStage

CPU = Runtime(torch.device("cpu"), torch.float32)
PROMPTS = ["a handwritten 7 drifting up", "the digit 3 moving left quickly", "", "a 0 bouncing around"]
OWN_SETTINGS = SamplerSettings()  # the checkpoint's own


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_networks(tmp_path_factory.mktemp("teacher") / "teacher.pt", TEACHER)


@pytest.fixture(scope="module")
def teacher(teacher_path: Path) -> LoadedNetworks:
    return load_networks(teacher_path, torch.device("cpu"))


def sample(
    networks: LoadedNetworks, prompts: list[str] = PROMPTS, num_frames: int = 9, settings: SamplerSettings = OWN_SETTINGS,
    batch_size: int = 4, seeds: list[int] | None = None,
) -> torch.Tensor:
    return generate(networks, prompts, list(range(len(prompts))) if seeds is None else seeds, num_frames, settings, CPU, batch_size)


# --- a video is a function of (prompt, seed, checkpoint, settings) ----------------------------------------------------


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_the_batch_size_changes_a_video_by_rounding_at_most(kind: str, request: pytest.FixtureRequest):
    networks = request.getfixturevalue(kind)
    together, alone = sample(networks, batch_size=4), sample(networks, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(networks, batch_size=3), alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(together, sample(networks, batch_size=4))
    for prompts, seeds in (([PROMPTS[0]] * 2, [0, 1]), (PROMPTS[:2], [0, 0])):
        one, other = sample(networks, prompts, seeds=seeds)
        assert not torch.allclose(one, other, atol=1e-3), "prompts and seeds matter, each alone"


def test_the_student_generates_exactly_what_training_rolls_out(student: LoadedNetworks):
    """The engine draws an exit step and seeds; with the last exit step its video is the generated one, bit for bit."""
    training = student.config.training
    last = len(training.denoising_steps) - 1
    with torch.no_grad():
        prompt = student.generator.encode_prompt(*student.text_encoder.encode(PROMPTS))
    for random_seed in range(50):
        engine = SelfForcingEngine(training, student.generator, torch.Generator().manual_seed(random_seed))
        rollout = engine.rollout(prompt, 21, with_gradient=False)
        if rollout.exit_steps[0] == last:
            break
    replay = torch.Generator().manual_seed(random_seed)
    torch.randint(last + 1, (1,), generator=replay)
    seeds = torch.randint(2**62, (len(PROMPTS),), generator=replay).tolist()
    assert torch.equal(sample(student, num_frames=21, seeds=seeds), rollout.x_0)


def test_a_short_video_is_the_start_of_a_long_one(student: LoadedNetworks):
    long = sample(student, PROMPTS[:1], num_frames=27)
    assert torch.equal(sample(student, PROMPTS[:1], num_frames=9), long[:, :9])
    assert torch.equal(sample(student, PROMPTS[:1], num_frames=21), long[:, :21])


# --- student or teacher -----------------------------------------------------------------------------------------------


STUDENT_PLAN = RolloutPlan(warp_steps([1000, 600, 300], 3.0), 3, context_time=0.1, context=ContextWindow(21), clamp_x_0=True)
WINDOWED = SelfForcingConfig(window_frames=9, sink_frames=3, hide_first_chunk=False)


@pytest.mark.parametrize(("training", "settings", "expected"), [
    (STUDENT, {}, STUDENT_PLAN), (STUDENT, {"causal": True}, STUDENT_PLAN),
    (STUDENT, {"denoising_steps": (1000, 500), "guidance": 1.5}, replace(STUDENT_PLAN, times=warp_steps([1000, 500], 3.0), guidance=1.5)),
    (STUDENT, {"num_steps": 5, "guidance": 2.0}, many_step_plan(5, 3.0, 3, 2.0, ContextWindow(21), 0.1)),
    (WINDOWED, {}, few_step_plan(WINDOWED, ContextWindow(9, 3))),
    (WINDOWED, {"window_frames": 12, "sink_frames": 0}, few_step_plan(WINDOWED, ContextWindow(12))),
    (TEACHER, {}, BidirectionalPlan(3, 3.0, 2.0, 0.4, 0.3)),
    (TEACHER, {"num_steps": 7, "guidance": 1.0}, BidirectionalPlan(7, 3.0, 1.0, 0.4, 0.3)),
    (TEACHER, {"eta": 0.0}, BidirectionalPlan(3, 3.0, 2.0, 0.0, 0.3)),
    (TEACHER, {"ink_kept": 1.0}, BidirectionalPlan(3, 3.0, 2.0, 0.4, 1.0)),
    (TEACHER, {"denoising_steps": (1000, 500)}, RolloutPlan(warp_steps([1000, 500], 3.0), 3, context=ContextWindow(21))),
    (TEACHER, {"num_steps": 4, "causal": True}, many_step_plan(4, 3.0, 3, TEACHER.guidance, ContextWindow(21))),
    (TEACHER, {"causal": True}, many_step_plan(TEACHER.teacher_steps, 3.0, 3, TEACHER.guidance, ContextWindow(21))),
    (TEACHER, {"num_steps": 2, "causal": True, "guidance": 1.0, "window_frames": 9, "sink_frames": 3},
     many_step_plan(2, 3.0, 3, 1.0, ContextWindow(9, 3))),
])
def test_a_plan_is_as_asked_and_otherwise_the_checkpoints(training: TrainingConfig, settings: dict, expected: object):
    assert SamplerSettings(**settings).make_plan(training) == expected


def test_times_are_warped_and_euler_steps_are_those_of_the_naive_rollout():
    torch.testing.assert_close(list(STUDENT_PLAN.times), [3 * t / (1 + 2 * t) for t in (1.0, 0.6, 0.3)])
    plan = SamplerSettings(num_steps=4, causal=True).make_plan(TEACHER)
    assert plan.times == warp_steps(NAIVE_STEPS, 3.0) and not plan.fresh_noise


@pytest.mark.parametrize("objective", ["teacher_forcing", "diffusion_forcing"])
@pytest.mark.parametrize("settings", [{}, {"num_steps": 4}])
def test_a_network_that_was_trained_causally_rolls_out_unasked(objective: str, settings: dict):
    plan = SamplerSettings(**settings).make_plan(PretrainConfig(objective=objective))
    assert isinstance(plan, RolloutPlan) and plan == SamplerSettings(**settings, causal=True).make_plan(PretrainConfig(objective=objective))


@pytest.mark.parametrize("name", ["eta", "ink_kept"])
def test_settings_of_the_bidirectional_teacher_are_refused_for_a_rollout(name: str):
    for settings, training in (
        ({}, STUDENT), ({"num_steps": 5}, STUDENT), ({"denoising_steps": (1000,)}, TEACHER), ({"num_steps": 4, "causal": True}, TEACHER),
    ):
        with pytest.raises(ValueError, match=f"^--{name} is for a bidirectional teacher"):
            SamplerSettings(**settings, **{name: 0.5}).make_plan(training)
    with pytest.raises(ValueError, match=f"^--{name} is 1.5: expected 0"):
        SamplerSettings(**{name: 1.5})


def test_the_baselines_are_the_start_of_a_student_in_its_steps_and_in_half_of_them():
    student = SelfForcingConfig(denoising_steps=[1000, 600, 300], guidance=3.0, window_frames=9)
    assert baseline_plans(student) == {
        "no guidance, 3 steps": few_step_plan(student), "guided, 3 steps": many_step_plan(3, 3.0, 3, 3.0, ContextWindow(9)),
        "guided, 1 steps": many_step_plan(1, 3.0, 3, 3.0, ContextWindow(9)),
    }
    assert list(baseline_plans(replace(student, denoising_steps=[1000]))) == ["no guidance, 1 steps", "guided, 1 steps"]
    assert list(baseline_plans(replace(student, guidance=1.0)))[1:] == ["Euler, 3 steps", "Euler, 1 steps"]
    naive = RolloutPlan(warp_steps(NAIVE_STEPS, 3.0), 3)
    assert baseline_plans(TEACHER) == {
        "no guidance, 4 steps": naive, **{f"guided, {steps} steps": many_step_plan(steps, 3.0, 3, 2.5) for steps in (4, 2)},
    }


@pytest.mark.parametrize(("settings", "cost"), [
    ({"num_steps": 4, "causal": True}, (8, 2)), ({"num_steps": 4, "causal": True, "guidance": 1.0}, (4, 1)),
    ({"denoising_steps": (1000, 500)}, (2, 1)), ({"num_steps": 3}, (6, 0)), ({"num_steps": 3, "guidance": 1.0}, (3, 0)),
])
def test_a_plan_counts_the_networks_evaluations(teacher: LoadedNetworks, monkeypatch, settings: dict, cost: tuple[int, int]):
    plan = SamplerSettings(**settings).make_plan(teacher.config.training)
    assert (plan.evaluations, plan.cache_evaluations) == cost
    counted = [0, 0]  # videos that were denoised in a pass, and videos that were written
    passes = {"forward_bidirectional": (1, 0), "forward_cached": (1, 0), "write_cache": (0, 1), "write_and_forward": (1, 1)}
    for name, kinds in passes.items():
        def count(model, x, *others, method=vars(TinyCausalWanModel)[name], kinds=kinds):
            for place, kind in enumerate(kinds):
                counted[place] += kind * len(x)
            return method(model, x, *others)
        monkeypatch.setattr(TinyCausalWanModel, name, count)
    sample(teacher, PROMPTS[:1], settings=SamplerSettings(**settings))
    num_blocks = 3 if isinstance(plan, RolloutPlan) else 1
    assert counted == [num_blocks * plan.evaluations, (num_blocks - 1) * plan.cache_evaluations]


def test_the_teacher_gives_the_video_of_its_own_sampler(teacher: LoadedNetworks):
    plan = BidirectionalPlan(3, 3.0, 2.0, 0.4, 0.3)
    expected = sample_many_step(teacher.generator, teacher.text_encoder, PROMPTS, [0, 1, 2, 3], 9, plan, CPU)
    assert torch.equal(sample(teacher), expected)
    naive = sample(teacher, settings=SamplerSettings(denoising_steps=(1000, 500)))
    assert not torch.allclose(naive, expected, atol=1e-2)


def test_the_teacher_goes_past_its_length_only_block_by_block(teacher: LoadedNetworks):
    with pytest.raises(ValueError, match="at most the 21 frames.*--causal"):
        sample(teacher, PROMPTS[:1], num_frames=24)
    for settings in (SamplerSettings(denoising_steps=(1000,)), SamplerSettings(num_steps=2, causal=True)):
        assert sample(teacher, PROMPTS[:1], num_frames=24, settings=settings).shape == (1, 24, 1, 8, 8)


@pytest.mark.parametrize(("prompts", "seeds", "words"), [(PROMPTS[:1], [0, 1], "1 prompts and 2 seeds"), ([], [], "0 prompts")])
def test_every_prompt_needs_one_seed(student: LoadedNetworks, prompts: list[str], seeds: list[int], words: str):
    with pytest.raises(ValueError, match=words):
        sample(student, prompts, seeds=seeds)


def test_unknown_words_are_named_in_one_line_for_all_batches(student_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate_files(student_path, tmp_path, "--prompts", "a purple 7", "a 3 above the sea", "a purple 2", "--num_frames", "3",
                   "--samples_per_prompt", "2", "--batch_size", "1")
    (line,) = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "unknown words" in line]
    assert line.startswith("warning: unknown words") and "purple, above, sea." in line


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_same_call_writes_the_same_files_in_every_format(student_path: Path, tmp_path: Path):
    for folder in ("first", "second"):
        for suffix in entry.FORMATS:
            generate_files(student_path, tmp_path / folder / suffix, "--prompts", *PROMPTS[:2], "--samples_per_prompt", "2",
                           "--num_frames", "6", "--seed", "42", "--format", suffix)
        if folder == "first":
            time.sleep(1.1)  # a time in a file would show; for an archive's two-second steps see below
    stems = [
        "000_a-handwritten-7-drifting-up_seed42", "001_a-handwritten-7-drifting-up_seed43",
        "002_the-digit-3-moving-left-quickly_seed42", "003_the-digit-3-moving-left-quickly_seed43",
    ]
    for suffix in entry.FORMATS:
        first, second = (sorted((tmp_path / folder / suffix).iterdir()) for folder in ("first", "second"))
        assert {path.name for path in first} == {
            *(f"{stem}.{kind}" for stem in stems for kind in (suffix, "json")), "contact_sheet.png", "generation.json",
        }
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second], suffix
    with zipfile.ZipFile(tmp_path / "first" / "npz" / f"{stems[0]}.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_what_is_prepared_for_generation_is_a_copy_that_makes_the_same_bits(student: LoadedNetworks):
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    ready = prepared(student, runtime)
    assert ready.generator.head.weight.dtype == torch.bfloat16 and student.generator.head.weight.dtype == torch.float32
    videos = [generate(networks, PROMPTS[:2], [0, 1], 6, OWN_SETTINGS, runtime, 2) for networks in (student, ready)]
    assert torch.equal(*videos)


def test_products_in_8_bit_integers_stay_near_and_are_told(student_path: Path, tmp_path: Path):
    videos = {}
    for name, options in (("plain", []), ("int8", ["--int8"])):
        generate_files(student_path, tmp_path / name, "--prompts", "a 7", "--num_frames", "6", "--format", "npz", *options)
        assert json.loads((tmp_path / name / "generation.json").read_text())["int8"] == bool(options)
        videos[name] = np.load(tmp_path / name / "000_a-7_seed0.npz")["video"]
    error = np.abs(videos["int8"] - videos["plain"])
    assert 0 < error.mean() < 0.05, error.mean()


def test_int8_where_it_is_slower_is_said(student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sampling.samplers.gain_over_float32", lambda dtype: 0.2)
    generate_files(student_path, tmp_path, "--prompts", "a 7", "--int8")
    assert "8-bit integers takes 5.0 times as long as one of float32 on this processor: leave --int8 out" in capsys.readouterr().err
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
    assert "--int8 needs exact products of 8-bit integers" in refusal(
        "--checkpoint", str(student_path), "--int8", "--output_dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_every_size_is_compiled_however_many_there_are(student: LoadedNetworks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs are found and kept, and not compiled
    ready, graphs = prepared(student, CPU, "--compile"), []
    for batch_size in range(1, 11):  # Dynamo by itself keeps eight, and runs Python from then on
        torch._dynamo.utils.counters.clear()
        generate(ready, PROMPTS[:1] * batch_size, [0] * batch_size, 3, OWN_SETTINGS, CPU, batch_size)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0, graphs


def test_a_last_smaller_batch_compiles_nothing_again(student: LoadedNetworks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prompts, seeds = [f"a {digit}" for digit in range(9)], list(range(9))
    found = generate(prepared(student, CPU, "--compile"), prompts, seeds, 12, OWN_SETTINGS, CPU, batch_size=8)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    torch.testing.assert_close(found, generate(student, prompts, seeds, 12, OWN_SETTINGS, CPU, batch_size=8), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_missing_compiler_ends_in_one_line(command: str, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    if command == "generate":
        with pytest.raises(SystemExit, match="^error: --compile needs a C.. compiler, and no-such-compiler is not there"):
            generate_files(student_path, tmp_path, "--compile")
    else:
        config = Config(training=PretrainConfig(compile=True))
        with pytest.raises(ValueError, match="^training.compile needs a C.. compiler, and no-such-compiler is not there"):
            PretrainStage(config, CPU, torch.Generator())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "work", "arguments"), [
    ("generate", "run", []), ("experiments.benchmark", "run", []), ("experiments.long_video", "run", ["drift"]),
    ("evaluate", "evaluate", OmegaConf.structured(EvaluateConfig)),
])
def test_ctrl_c_ends_in_one_line_and_130(module: str, work: str, arguments: Any, monkeypatch: pytest.MonkeyPatch, capsys):
    program = importlib.import_module(module)
    monkeypatch.setattr(program, work, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:  # the latter would end the whole suite
        program.main(arguments)
    errors = capsys.readouterr().err
    assert isinstance(caught.value, SystemExit) and caught.value.code == 130
    assert errors.startswith("interrupted: ") and errors.count("\n") == 1


def test_npz_holds_the_clamped_video_and_its_prompt(teacher_path: Path, teacher: LoadedNetworks, tmp_path: Path):
    generate_files(teacher_path, tmp_path, "--prompts", "a/b ü 7", "--num_frames", "6", "--seed", "3", "--format", "npz")
    video, prompt = load_array(tmp_path / "000_a-b-u-7_seed3.npz")
    assert prompt == "a/b ü 7" and video.dtype == torch.float32
    with pytest.warns(UserWarning, match="unknown words"):
        raw = sample(teacher, ["a/b ü 7"], num_frames=6, seeds=[3])
    assert raw.abs().max() > 1, "the case would not show the clamp"
    assert torch.equal(video, raw[0].clamp(-1, 1))


def test_existing_files_are_never_overwritten(student_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """If one name is taken, all files of the call get the same number, so they stay together."""
    (tmp_path / "contact_sheet.png").write_text("mine")
    for number in (2, 3):
        generate_files(student_path, tmp_path, "--prompts", "a 7", "--num_frames", "3")
        assert f"names end in _{number}" in capsys.readouterr().out
    assert (tmp_path / "contact_sheet.png").read_text() == "mine"
    names = ("000_a-7_seed0_{}.gif", "000_a-7_seed0_{}.json", "contact_sheet_{}.png", "generation_{}.json")
    assert {path.name for path in tmp_path.iterdir()} == {"contact_sheet.png", *(name.format(n) for name in names for n in (2, 3))}
    listed = json.loads((tmp_path / "generation_3.json").read_text())
    assert listed["videos"][0]["file"] == "000_a-7_seed0_3.gif" and listed["contact_sheet"] == "contact_sheet_3.png"


def test_the_wishes_of_the_command_line_reach_the_sampler(teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    samplers = []
    for wishes in (["--num_steps", "2", "--guidance", "1.5", "--eta", "0.25", "--ink_kept", "0.75"], ["--causal", "--num_steps", "4"]):
        folder = tmp_path / wishes[0]
        generate_files(teacher_path, folder, "--prompts", "a 7", "--num_frames", "6", *wishes)
        samplers.append(json.loads((folder / "generation.json").read_text())["sampler"])
    assert [samplers[0]["plan"][name] for name in ("num_steps", "guidance", "eta", "ink_kept")] == [2, 1.5, 0.25, 0.75]
    assert samplers[1]["kind"] == "causal" and samplers[1]["plan"]["guidance"] == TEACHER.guidance
    assert samplers[1]["plan"]["times"] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert "step 1, causal, 8 + 2 evaluations a block, on cpu" in capsys.readouterr().out


def test_the_sidecar_says_how_each_video_was_made(student_path: Path, tmp_path: Path):
    generate_files(student_path, tmp_path, "--prompts", "a 7", "a 7", "--num_frames", "3", "--denoising_steps", "1000", "500",
                   "--guidance", "1.5")
    facts = json.loads((tmp_path / "generation.json").read_text())
    digest = hashlib.sha256(student_path.read_bytes()).hexdigest()
    assert facts["checkpoint"] == {"name": "student.pt", "sha256": digest, "training_type": "dmd2", "step": 1}
    requested = facts["sampler"]["requested"]
    assert (requested["denoising_steps"], requested["guidance"], requested["num_steps"]) == ([1000, 500], 1.5, None)
    assert facts["sampler"]["kind"] == "causal" and facts["sampler"]["plan"]["times"] == [1.0, 0.75]
    assert (facts["device"], facts["precision"], facts["versions"]["torch"]) == ("cpu", "float32", str(torch.__version__))
    for number, row in enumerate(facts["videos"]):
        own = json.loads((tmp_path / row["file"]).with_suffix(".json").read_text())
        assert own == {**row, **{key: value for key, value in facts.items() if key not in ("videos", "contact_sheet")}}, number
    assert str(tmp_path) not in (tmp_path / "generation.json").read_text() + (tmp_path / "000_a-7_seed0.json").read_text()
    assert [(row["file"], row["prompt"], row["seed"]) for row in facts["videos"]] == [
        ("000_a-7_seed0.gif", "a 7", 0), ("001_a-7_seed0.gif", "a 7", 0),
    ]


def test_the_default_checkpoint_is_there_and_the_default_prompts_are_of_the_grammar(
    student: LoadedNetworks, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for num_digits, prompts in entry.DEFAULT_PROMPTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            student.text_encoder.tokenize(list(prompts))
        assert {len(parse_caption(prompt).digits) for prompt in prompts} == {num_digits}
    assert entry.DEFAULT_CHECKPOINT.is_file()
    monkeypatch.setattr(entry, "DEFAULT_CHECKPOINT", student_path)
    monkeypatch.chdir(tmp_path)
    main(["--num_frames", "3", *COMMON])  # the default prompts, into the default folder
    assert len(list((tmp_path / "outputs").glob("*.gif"))) == len(entry.DEFAULT_PROMPTS[1])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--num_frames", "10"], "num_frames is 10: .*nearest valid: 9 or 12"), (["--guidance", "nan"], "--guidance is nan"),
    (["--samples_per_prompt", "0"], "--samples_per_prompt is 0: expected at least 1"), (["--seed", str(2**63)], "--seed is 92233720368547"),
    (["--denoising_steps", "750", "500"], r"--denoising_steps is \[750, 500\]: expected strictly descending"),
    (["--denoising_steps", "1000", "--num_steps", "4"], "--denoising_steps .* and --num_steps .* exclude each other"),
    (["--denoising_steps", "1000", "--causal"], "--denoising_steps .* and --causal .* exclude each other"),
    (["--window_frames", "9", "--sink_frames", "9"], "--sink_frames is 9: expected 0 to 6"),
    (["--schedule", "0: a 7", "9: a 3", "--num_frames", "9"], "asks for 'a 3' from frame 9 on, but the last block starts at frame 6"),
    (["--schedule", "0: a 7", "4: a 3", "--num_frames", "9"], r"at frame 4: expected the start of a block, such as \[3, 6\]"),
    (["--schedule", "3: a 7"], r"at the frames \[3\]: expected ascending frames, the first one 0"),
    (["--schedule", "a 7"], "--schedule has 'a 7': expected a frame and a prompt"),
    (["--schedule", "0: a 7", "--prompts", "a 3"], "--prompts and --schedule exclude each other"),
    (["--init", "nowhere.gif"], "no file at nowhere.gif"),
    (["--prompts", "\udcff"], "is not valid text"), (["--output_dir", ""], "--output_dir is empty: expected a path"),
    (["--switch", "keep"], "--switch is keep, but no prompt changes without --schedule"),
    (["--checkpoint", "missing.pt"], "no checkpoint at missing.pt"), (["--checkpoint", __file__], "test_generate.py"),
])
def test_bad_arguments_end_in_one_line(student_path: Path, tmp_path: Path, arguments: list[str], expected: str):
    message = refusal("--checkpoint", str(student_path), "--output_dir", str(tmp_path / "out"), *arguments)
    assert re.search(expected, message)
    assert not (tmp_path / "out").exists(), "refused before anything is made"


def test_the_output_folder_is_checked_before_sampling(student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "generate", Mock(side_effect=AssertionError("sampled before the folder was checked")))
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal("--checkpoint", str(student_path), "--output_dir", str(folder))
        assert f"cannot write into the folder {folder}" in message and "output_dir" in message


@pytest.mark.parametrize("arguments", [["--format", "avi"], ["--num_frame", "9"]])
def test_an_unreadable_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
