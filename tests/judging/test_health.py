"""The health panel: its figures against hand-computed cases, a training it does not touch, its picture, its refusals."""

from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from helpers.runs import SHARED, pretraining, rows_of, tiny_config
from helpers.stages import assert_same, build_self_forcing

import train
from judging import health
from judging.digit_judge import DigitJudge, JudgeConfig
from judging.health import compare_runs
from judging.metrics import facts_of_prompts
from judging.prompts import JUDGED_COLUMNS, PROMPTS, SEEDS, FixedPrompts
from method.diagnostics import critic_lag, exit_columns, mean_by_exit_step, mean_by_noise_level, score_figures
from method.flow_matching import add_noise
from moving_mnist import DatasetConfig
from sampling.samplers import sample
from train import SimplifiedTrainer
from training.checkpoint import load_checkpoint
from training.config import Config, SelfForcingConfig
from training.run_log import read_scalars

STEPS = [1000, 750, 500, 250]


def test_values_are_averaged_by_noise_level_and_a_level_without_a_video_is_left_out():
    values, t = torch.tensor([1.0, 2.0, 3.0, 6.0, 7.0]), torch.tensor([0.02, 0.34, 0.5, 0.67, 1.0])
    assert mean_by_noise_level(values, t) == {"low": 1.0, "middle": 2.5, "high": 6.5}
    assert mean_by_noise_level(values[3:], t[3:]) == {"high": 6.5}


def test_a_loss_is_averaged_over_the_frames_of_each_exit_step():
    terms = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]])[..., None, None, None].expand(-1, -1, 1, 2, 2)
    frame_exits = torch.tensor([[0, 0, 2], [2, 0, 3]])
    expected = {"loss_exit_1000": (1 + 2 + 7) / 3, "loss_exit_500": (3 + 5) / 2, "loss_exit_250": 9.0}
    assert mean_by_exit_step(terms, frame_exits, STEPS) == pytest.approx(expected)
    assert mean_by_exit_step(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([[-1, 2, 2]]), STEPS) == {"loss_exit_500": 1.5}  # -1: given
    for exits, expected in (  # a loss of whole videos belongs to an exit step only where a video has one
        ([[1, 1, 1], [3, 3, 3]], {"loss_exit_750": 1.0, "loss_exit_250": 4.0}), ([[1, 1, 1], [3, 0, 3]], {}),
        ([[-1, 1, 1], [-1, 3, 3]], {"loss_exit_750": 1.0, "loss_exit_250": 4.0}), ([[-1, 1, 1], [-1, 3, 1]], {}),
    ):
        assert mean_by_exit_step(torch.tensor([1.0, 4.0]), torch.tensor(exits), STEPS) == expected


@pytest.mark.parametrize("way", [0.0, 0.25, 1.0, 1.5])
def test_on_gaussians_critic_lag_is_the_share_of_the_way_that_the_critic_has_missed(way: float):
    """The generator has gone `way` of the path from where the critic believes it to be, 0.8, to the teacher, -0.5."""
    stale, real, s, t = 0.8, -0.5, 0.3, torch.full((64, 3), 0.6)
    random = torch.Generator().manual_seed(0)
    x_0 = stale + way * (real - stale) + s * torch.randn(64, 3, 1, 16, 16, generator=random)
    x_t = add_noise(x_0, torch.randn(x_0.shape, generator=random), t)
    shrink = s**2 * 0.4 / (0.4**2 * s**2 + 0.6**2)
    x_0_fake, x_0_real = (mean + shrink * (x_t - 0.4 * mean) for mean in (stale, real))
    assert critic_lag(x_0, x_0_fake, x_0_real) == pytest.approx(way, abs=0.01)
    assert critic_lag(x_0, x_0_real, x_0_real) == 0.0  # nothing pushes


def test_score_figures_are_the_distance_of_the_scores_by_noise_level_and_the_lag():
    x_0, x_0_real = torch.zeros(2, 2, 1, 2, 2), torch.zeros(2, 2, 1, 2, 2)
    x_0_fake = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1, 1).expand_as(x_0)
    assert score_figures(x_0, x_0_fake, x_0_real, torch.tensor([0.1, 0.9])) == {
        "score_distance": 1.25, "score_distance_low": 0.5, "score_distance_high": 2.0, "critic_lag": 1.0,
    }


@pytest.mark.parametrize("loss", ["dmd", "sid", "gan"])
def test_the_stage_reports_the_loss_of_the_exit_step_and_the_scores_by_noise_level(loss: str, teacher: Path):
    stage = build_self_forcing(teacher, loss=loss, dfake_gen_update_ratio=1, critic_warmup_steps=0)
    seen: set[str] = set()
    for step in range(6):
        figures = stage.train_step(step)
        (column,) = figures.keys() & set(exit_columns(STEPS))
        assert column == exit_columns(STEPS)[figures["exit_step"]]
        assert figures[column] == pytest.approx(figures["loss_generator"], rel=1e-5)
        by_level = [value for name, value in figures.items() if name.startswith("score_distance_")]
        if loss != "gan":
            assert min(by_level) <= figures["score_distance"] * (1 + 1e-5) and max(by_level) >= figures["score_distance"] * (1 - 1e-5)
        assert bool(by_level) == ("critic_lag" in figures) == (loss != "gan")
        seen |= figures.keys()
    assert seen <= set(stage.columns)


@pytest.mark.parametrize("changes", [
    {"same_exit_step": False, "gradient_frames": 6}, {"generator_inputs": "diffusion_forced", "gradient_frames": 6},
])
def test_every_scored_frame_knows_its_exit_step(changes, teacher: Path, monkeypatch):
    stage = build_self_forcing(teacher, min_num_frames=9, **changes)
    engine, times = stage.engine, []
    forward = engine.generator.forward_block_causal
    monkeypatch.setattr(engine.generator, "forward_block_causal", lambda x, t, *rest: times.append(t) or forward(x, t, *rest))
    rollout = engine.make_videos(stage.text_encoder.encode(["a 3", "a 4"]), 9, False, torch.zeros(2, 9, 1, 16, 16))
    assert rollout.frame_exits.shape == rollout.scored.shape[:2] == (2, 6)
    assert torch.equal(rollout.frame_exits[0, ::3], torch.tensor(rollout.exit_steps[1:]))
    for t in times:
        torch.testing.assert_close(torch.tensor([*engine.plan.times, 0.0])[rollout.frame_exits], t[:, 3:])  # -1 is clean data
    assert bool(times) == ("generator_inputs" in changes)


def test_the_wrong_sign_turns_the_generators_gradient_around(teacher: Path):
    gradients, losses = [], []
    for sign in (1, -1):
        stage = build_self_forcing(teacher, dmd_sign=sign, dfake_gen_update_ratio=1, critic_warmup_steps=0, lr=1e-30, clip_norm=1e9)
        seen: list[torch.Tensor] = []
        for parameter in stage.engine.generator.parameters():
            parameter.register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
        losses.append(stage.train_step(0)["loss_generator"])
        gradients.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the loss does not show it
    assert any(gradient.any() for gradient in gradients[0])
    for right, wrong in zip(*gradients, strict=True):
        torch.testing.assert_close(wrong, -right, rtol=1e-3, atol=1e-6)


def small_judge(*_: object) -> DigitJudge:
    """A judge of the tiny videos of these tests, with random weights."""
    torch.manual_seed(0)
    return DigitJudge(JudgeConfig(frame_size=16, digit_size=8, widths=(4, 8))).requires_grad_(False).eval()


def test_the_fixed_prompts_are_the_same_at_every_reading_and_ask_for_every_digit_and_direction(teacher: Path):
    digits, directions = facts_of_prompts(list(PROMPTS))
    assert set(digits.tolist()) == set(range(10)) and set(directions.tolist()) == set(range(8))
    assert len(set(digits.bincount().tolist())) == len(set(directions.bincount().tolist())) == 1  # each as often
    assert len(set(PROMPTS)) == len(PROMPTS) == len(SEEDS) == len(set(SEEDS))
    stage, made = build_self_forcing(teacher, dfake_gen_update_ratio=1, critic_warmup_steps=0), []

    def make(*asked: object) -> torch.Tensor:
        assert asked == (list(PROMPTS), list(SEEDS), 6)
        made.append(sample(stage.live(), *asked, stage.runtime))
        return made[-1]

    fixed = FixedPrompts(small_judge(), DatasetConfig(frame_size=16, digit_size=8), 6, make)
    first, second = fixed.read(), fixed.read()
    assert first == second and first.keys() == set(JUDGED_COLUMNS) and torch.equal(made[0], made[1])
    stage.train_step(0)
    fixed.read()
    assert not torch.equal(made[1], made[2])  # the live generator's, which has moved


def test_the_last_block_is_read_alone(judge, batch):
    video = batch.video[: len(PROMPTS), :9].clone()
    video[:, 6:] = -1  # gone in the last of three blocks
    read = FixedPrompts(judge, DatasetConfig(), 9, lambda prompts, seeds, num_frames: video).read()
    assert read["stroke_mass_ratio_last_block"] == read["frames_right_last_block"] == 0 and read["stroke_mass_ratio"] > 0.4


def watched_config(teacher: Path, log_dir: Path, **changes: object) -> Config:
    own = {**SHARED, "sample_interval": 4, "health_interval": 2, "dfake_gen_update_ratio": 2, "critic_warmup_steps": 1}
    return tiny_config(log_dir, SelfForcingConfig(**{**own, "pretrained_checkpoint": str(teacher), **changes}))


def test_a_run_logs_and_draws_its_panel_and_neither_it_nor_resuming_changes_a_bit(teacher: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train, "load_judge", small_judge)
    drawn = []
    monkeypatch.setattr(train, "draw_run", lambda *paths: drawn.append(len(rows_of(paths[0].parent))) or health.draw_run(*paths))
    config = watched_config(teacher, tmp_path / "on")
    folder = SimplifiedTrainer(config).train()
    rows, whole = rows_of(folder), load_checkpoint(folder / "checkpoint_final.pt")
    assert {"critic_lag", "loss_exit_750", "score_distance_low", "frames_right"} <= rows[0].keys()
    read = [step for step, row in enumerate(rows) if row["frames_right"]]
    assert read == [0, 1, 3, 5] and all(rows[step][name] for step in read for name in JUDGED_COLUMNS)
    assert [bool(row["critic_lag"]) for row in rows] == [False, True, False, True, False, True]
    assert drawn == [4, 6]  # at the sample interval and at the end
    assert imageio.imread(folder / "health.png").std() > 5
    off = watched_config(teacher, tmp_path / "off", health_interval=0, sample_interval=0, checkpoint_interval=0)
    unwatched = SimplifiedTrainer(off).train()
    assert not set(JUDGED_COLUMNS) & rows_of(unwatched)[0].keys()
    again = replace(config, log_dir=str(tmp_path / "again"))
    resumed = SimplifiedTrainer(replace(again, training=replace(config.training, resume=str(folder / "checkpoint_0000004.pt")))).train()
    for other in (unwatched, resumed):
        checkpoint = load_checkpoint(other / "checkpoint_final.pt")
        for key in whole.keys() - ({"config"} if other is resumed else {"config", "watchdog"}):
            assert_same(whole[key], checkpoint[key], key)
    for name in rows[0].keys() - {"seconds"}:
        assert [row[name] for row in rows_of(resumed)] == [row[name] for row in rows[4:]], name


def test_a_run_keeps_its_best_reading_and_ends_with_a_verdict(teacher: Path, tmp_path: Path, monkeypatch, capsys):
    """Readings that rise, fall far and half recover: what is kept is the checkpoint of the best, what is said is the fall."""
    monkeypatch.setattr(train, "load_judge", small_judge)
    readings = (0.4, 1.0), (0.9, 1.1), (0.3, 2.6), (0.8, 1.2)
    rows = (reading[:1] * 3 + reading[1:] + reading for reading in readings)
    monkeypatch.setattr(FixedPrompts, "read", lambda self: dict(zip(JUDGED_COLUMNS, next(rows), strict=True)))
    folder = SimplifiedTrainer(watched_config(teacher, tmp_path)).train()
    printed = capsys.readouterr().out
    assert "COLLAPSE: step 4: the fixed prompts read frames right 0.30" in printed
    verdict = printed.splitlines()[-1]
    assert verdict.startswith("verdict: COLLAPSED at step 4 ") and verdict == (folder / "verdict.txt").read_text().strip()
    assert load_checkpoint(folder / "checkpoint_best.pt")["step"] == 2


def test_videos_that_the_judge_cannot_read_leave_no_columns_and_one_line(teacher: Path, tmp_path: Path, capsys):
    named = pretraining(tmp_path / "named", eval_videos=1)
    for config, reason in (
        (replace(named, dataset=replace(named.dataset, class_names=list("abcdefghij"))), "dataset.class_names is a, b"),
        (watched_config(teacher, tmp_path), "the judge reads one digit of 14 px on 32 px frames"),  # the judge that ships
    ):
        trainer = SimplifiedTrainer(config)
        assert f"stroke mass): {reason}" in capsys.readouterr().out
        assert trainer.judge is trainer.fixed_prompts is None and not set(JUDGED_COLUMNS) & set(trainer.log.columns)
        trainer.log.close()


def write_run(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    lines = ["step,seconds,loss_generator,critic_lag,loss_exit_250,loss_exit_1000,frames_right,num_frames"]
    lines += [f"{step},0.1,{scale * (step + 1)},{-scale},,{scale},{'' if step % 2 else 0.5},21" for step in range(6)]
    (folder / "scalars.csv").write_text("\n".join(lines) + "\n")
    return folder


def is_orange(picture: np.ndarray) -> np.ndarray:
    """Pixels of the colour C1."""
    return (np.abs(picture.astype(int) - (255, 127, 14)) < 8).all(axis=-1)


def test_runs_are_drawn_over_each_other_in_one_order(tmp_path: Path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", 100.0)
    series = read_scalars(one / "scalars.csv")
    assert health.ordered_columns(set(series)) == ["loss_generator", "critic_lag", "loss_exit_1000", "frames_right"]
    np.testing.assert_array_equal(series["frames_right"][0], [0, 2, 4])
    compare_runs([one], tmp_path / "out" / "alone.png")
    compare_runs([one, two], tmp_path / "out" / "both.png")
    alone, both = (imageio.imread(tmp_path / "out" / name)[..., :3] for name in ("alone.png", "both.png"))
    assert alone.std() > 5 and not is_orange(alone).any() and is_orange(both).sum() > 100  # the second run's colour


def test_every_column_that_is_drawn_is_one_that_a_run_writes(teacher: Path):
    written = {*build_self_forcing(teacher).columns, *JUDGED_COLUMNS}
    assert set(health.PANELS) <= written and len(health.ordered_columns(written)) == len(health.PANELS) + len(STEPS)


@pytest.mark.parametrize(("content", "output", "words"), [
    (None, "new.png", "run holds no scalars.csv: give the folder of a run"),
    ("step,seconds,loss_causal\n0,0.1,2.0\n", "new.png", "scalars.csv has none of the panel's columns"),
    ("step,seconds,critic_lag\n0,0.1,much\n", "new.png", "scalars.csv is no table of a run's figures by step"),
    (b"step,seconds,critic_lag\n0,0.1,\xff\n", "new.png", "scalars.csv is no table of a run's figures by step"),
    ("step,seconds,critic_lag\n0,0.1,2.0\n", "old.png", "old.png exists already: give --output the name of a new file"),
])
def test_the_command_line_refuses_in_one_line_and_writes_nothing(content, output, words, refusal, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "old.png").write_bytes(b"old")
    if content is not None:
        (tmp_path / "run" / "scalars.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert words in refusal(health.main, str(tmp_path / "run"), "--output", str(tmp_path / output))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
