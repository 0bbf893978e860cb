"""The exact measures: right on real videos, and each moved by the fault that it is there to see."""

import warnings
from dataclasses import replace
from math import cos, pi, sin

import numpy as np
import pytest
import torch

from judging import metrics, tracking
from judging.corruptions import corrupt
from judging.digit_judge import warn_of_foreign_digits
from judging.metrics import NO_DIGIT, NO_DIRECTION, VideoScores, bootstrap_interval, share_interval, summarise
from judging.panel import Panel
from judging.sanity import REAL_LIMITS
from judging.tracking import fit_bouncing_track
from moving_mnist import DatasetConfig, bounce, load_digits

CONFIG = DatasetConfig()
NUM_FRAMES = 21
EARNED = ("frames_right", "videos_right", "one_class", "track_within_1px", "direction_obeyed", "moving")


@pytest.fixture(scope="module")
def facts(batch):
    return batch.digits[:, 0], batch.directions[:, 0]


def straight_track(start, velocity, offset=(0.0, 0.0), num_frames=NUM_FRAMES):
    """Centres (1, F, 2) of a bouncing box whose centre of mass is `offset` from its centre."""
    wall, span = (CONFIG.digit_size - 1) / 2, CONFIG.frame_size - CONFIG.digit_size
    frame = torch.arange(num_frames).unsqueeze(1)
    corner = bounce(torch.tensor(start) + frame * torch.tensor(velocity), span)  # (F, 2)
    return (wall + torch.tensor(offset) + corner).unsqueeze(0)


def test_gate_on_stroke_mass_is_relative_to_the_class():
    probabilities = torch.eye(10)[torch.tensor([[1, 1, 1, 1, 0]])]  # (1, 5, 10)
    class_mass = torch.full((10,), 30.0)
    class_mass[1] = 10.0
    classes = metrics.read_classes(probabilities, torch.tensor([[3.9, 4.1, 24.9, 25.1, 25.1]]), class_mass)
    assert classes.tolist() == [[NO_DIGIT, 1, 1, NO_DIGIT, 0]]


def test_classes_to_measures():
    classes = torch.tensor([
        [3, 3, 3, 3], [3, 3, 3, 5], [3, 3, 5, 5], [5, 5, 5, 5], [NO_DIGIT] * 4, [NO_DIGIT, NO_DIGIT, 3, NO_DIGIT],
        [3, 3, NO_DIGIT, 4],
    ])
    digits = torch.full((7,), 3)
    assert metrics.videos_right(classes, digits).tolist() == [True, True, False, False, False, False, True]
    assert metrics.class_kept(classes).sum(dim=1).tolist() == [4, 3, 2, 4, 0, 1, 2]


@pytest.mark.parametrize("start, velocity, offset, num_frames", [
    ((17.9, 0.2), (1.1, 1.4), (0.4, -0.5), NUM_FRAMES), ((9.0, 9.0), (-2.2, 0.0), (-0.3, 0.2), NUM_FRAMES),
    ((3.0, 9.0), (1.53, -0.87), (0.1, 0.3), 126),
])
def test_fit_recovers_a_bouncing_track(start, velocity, offset, num_frames):
    centres = straight_track(start, velocity, offset, num_frames)
    fit = fit_bouncing_track(centres, CONFIG)
    torch.testing.assert_close(fit.error, torch.zeros(1, num_frames), atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.track, centres, atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.velocity, torch.tensor([velocity]), atol=2e-3, rtol=0)


def test_fit_on_noisy_centres_is_the_least_squares_optimum():
    truth = straight_track((3.0, 9.0), (1.5, -0.6), (0.2, 0.0))
    noisy = truth + 0.3 * torch.randn(32, NUM_FRAMES, 2, generator=torch.Generator().manual_seed(0))
    fit = fit_bouncing_track(noisy, CONFIG)
    assert (fit.error.square().sum(dim=1) <= (noisy - truth).square().sum(dim=(1, 2)) + 1e-6).all()
    assert (fit.velocity - torch.tensor([1.5, -0.6])).abs().max() < 0.15
    torch.testing.assert_close(fit_bouncing_track(noisy[5:6], CONFIG).track[0], fit.track[5])


def test_refinement_never_loses_to_the_grid(monkeypatch):
    centres = 32 * torch.rand(64, NUM_FRAMES, 2, generator=torch.Generator().manual_seed(0))
    refined = fit_bouncing_track(centres, CONFIG).error.square().sum(dim=1)
    monkeypatch.setattr(tracking, "REFINE_STEPS", 0)
    assert (refined <= fit_bouncing_track(centres, CONFIG).error.square().sum(dim=1) + 1e-3).all()


def test_fit_cannot_explain_other_walls_or_speeds():
    def distance(centres):
        return fit_bouncing_track(centres, CONFIG).error.mean().item()

    there_and_back = straight_track((3.0, 9.0), (2.0, 0.0))
    assert distance(there_and_back) < 0.01
    assert distance(there_and_back + torch.tensor([3.0, 0.0])) > 0.5  # walls moved further than any glyph's offset
    assert distance(straight_track((3.0, 9.0), (4.0, 0.0))) > 0.5  # too fast
    torch.manual_seed(0)
    assert distance(there_and_back[:, torch.randperm(NUM_FRAMES)]) > 2
    with pytest.raises(ValueError, match="2 frames"):
        distance(there_and_back[:, :2])


def test_only_what_moves_and_is_read_keeps_to_a_track():
    fit = fit_bouncing_track(straight_track((3.0, 9.0), (0.0, 0.0)), CONFIG)
    assert fit.error.max() < 0.01 and not metrics.is_moving(fit.speed, torch.full((1, NUM_FRAMES), 7), CONFIG).any()
    speeds = torch.tensor([0.49, 0.51, 0.51]) * CONFIG.min_speed
    classes = torch.tensor([[7, 7, 7], [7, NO_DIGIT, 7], [NO_DIGIT, 7, NO_DIGIT]])
    assert metrics.is_moving(speeds, classes, CONFIG).tolist() == [False, True, False]
    error = torch.tensor([[0.9, 0.9], [0.0, 1.5], [0.0, 1.3], [0.9, 0.9]])  # root mean squares 0.9, 1.06, 0.92
    assert metrics.track_within(error, torch.tensor([True, True, True, False])).tolist() == [True, False, True, False]


def test_octants_turn_counter_clockwise_and_up_is_a_falling_row():
    octants, moving = torch.arange(8), torch.ones(8, dtype=torch.bool)
    angles = [(o + 0.4 * (-1) ** o) * pi / 4 for o in range(8)]
    velocity = torch.tensor([[cos(angle), -sin(angle)] for angle in angles])
    assert metrics.direction_obeyed(velocity, moving, octants).all() and not metrics.direction_obeyed(velocity, ~moving, octants).any()
    upside_down = metrics.direction_obeyed(velocity * torch.tensor([1.0, -1.0]), moving, octants)
    assert upside_down.tolist() == [octant in (0, 4) for octant in range(8)]


def test_real_held_out_videos_score_near_the_top(judge, readings, facts):
    summary = summarise(metrics.score_readings(judge, readings, *facts, CONFIG))
    for name in REAL_LIMITS.keys() & summary.keys():
        low, high = REAL_LIMITS[name]
        assert low <= summary[name] <= high, name
    assert summary["frames_right"] > 0.96 and summary["videos_right"] > 0.96
    for name in ("class_kept", "frames_within_1px", "sharpness_ratio"):
        assert abs(summary[f"{name}_slope"]) < 0.01, name


def test_faint_blank_and_white_videos_earn_nothing(judge, batch, facts):
    video, facts = batch.video[:48], [values[:48] for values in facts]
    for worse, most in ((torch.full_like(video, -1), 0), (torch.full_like(video, 1), 0), (corrupt(video, "faint"), 0.1)):
        summary = summarise(metrics.score_videos(judge, worse, *facts, CONFIG))
        assert all(summary[name] <= most for name in EARNED)
    assert summary["stroke_mass_ratio"] == pytest.approx(0.2, abs=0.03)  # of the faint ones


def test_bootstrap_interval_holds_the_mean_and_narrows():
    values = (torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7).float()
    low, high = bootstrap_interval(values, seed=0)
    standard_error = (values.var() / 400).sqrt().item()
    assert low < values.mean() < high and bootstrap_interval(values, seed=0) == [low, high]
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    few_low, few_high = bootstrap_interval(values[:25])
    assert few_high - few_low > 2 * (high - low)
    assert bootstrap_interval(torch.ones(5)) == [1.0, 1.0]


def test_the_interval_of_yes_and_no_is_wilsons():
    for hits, num, expected in ((512, 512, (0.9926, 1.0)), (0, 20, (0.0, 0.1611)), (8, 10, (0.4902, 0.9433)), (81, 263, (0.2553, 0.3662))):
        # 81 of 263: Newcombe 1998, table I
        assert share_interval(torch.arange(num) < hits) == pytest.approx(expected, abs=5e-5), (hits, num)
    assert share_interval(torch.ones(512))[1] == 1 and share_interval(torch.zeros(9))[0] == 0


def test_the_interval_of_shares_of_frames_holds_the_truth_and_narrows_with_the_frames():
    """2000 sets of 60 videos of 21 frames: of each video some are right, a share that differs from video to video."""
    rng = torch.Generator().manual_seed(0)
    right = torch.rand(21, 60, 2000, generator=rng) < 0.95 * torch.rand(60, 2000, generator=rng).sqrt()  # mean 0.95 * 2/3
    of_videos, of_frames = (torch.tensor(share_interval(shares)) for shares in (right.double().mean(dim=0), right[0]))
    for intervals in (of_videos, of_frames):
        held = (intervals[:, 0] <= 0.95 * 2 / 3) & (0.95 * 2 / 3 <= intervals[:, 1])
        assert held.double().mean().item() == pytest.approx(0.95, abs=0.02)
    assert (of_videos.diff(dim=1).mean() / of_frames.diff(dim=1).mean()).item() == pytest.approx(0.53, abs=0.05)
    torch.testing.assert_close(of_videos[7], torch.tensor(share_interval(right[:, :, 7].double().mean(dim=0))))
    low, high = share_interval(torch.full((40,), 20 / 21))  # as many right in every video: as wide as yes or no
    assert high - low > 0.1


def test_a_bool_measure_has_the_interval_of_shares_and_others_the_bootstrap():
    right = torch.ones(64, 6, dtype=torch.bool)
    summary = summarise(VideoScores({"right": right, "ink": right.float()}, {"whole": right[:, 0]}))
    low = 1 / (1 + 1.959964**2 / 64)
    for interval in (summary["right_ci"], summary["whole_ci"], *summary["right_by_frame_ci"]):
        assert interval == pytest.approx([low, 1])
    assert summary["ink_ci"] == summary["ink_by_frame_ci"][0] == [1, 1] and summary["right_slope_ci"] == [0, 0]


def test_by_frame_and_by_block_and_the_slope_of_the_drift():
    values = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6], [1.0, 1, 1, 1, 1, 1, 1]])
    summary = summarise(VideoScores({"ink": values}, {"none": torch.zeros(0)}))
    assert summary["ink_by_frame"] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5] and summary["ink_by_block"] == [1, 2.5, 3.5]  # the last is short
    assert summary["ink_slope"] == pytest.approx((2.5 + 0) / 2)  # of blocks 1, 4, 6 and of a constant
    assert summary["ink_slope_ci"] == [0, 2.5]
    assert len(summary["ink_by_frame_ci"]) == 7 and summary["ink_by_frame_ci"][6] == bootstrap_interval(values[:, 6]) == [1, 6]
    assert "none" not in summary and "ink_slope" not in summarise(VideoScores({"ink": values[:, :3]}, {}))


def test_summary_counts_direction_only_where_the_prompt_names_one(judge, readings, facts):
    digits, directions = facts
    some = torch.full_like(directions, NO_DIRECTION)
    some[:4] = directions[:4]
    some[0] = metrics.opposite(some)[0]
    summary, none = (
        summarise(metrics.score_readings(judge, readings, digits, asked, CONFIG)) for asked in (some, torch.full_like(some, NO_DIRECTION))
    )
    assert summary["direction_obeyed"] == 0.75 and not {"direction_obeyed", "direction_obeyed_ci"} & none.keys()
    for name in (*EARNED, "mean_track_error", "stroke_mass_ratio"):
        low, high = summary[f"{name}_ci"]
        assert low <= summary[name] <= high, name


def test_facts_of_prompts():
    prompts = ["the digit 7 moving up", "a three", "a 0 sliding down and left fast"]
    digits, directions = metrics.facts_of_prompts(prompts)
    assert digits.tolist() == [7, 3, 0] and directions.tolist() == [2, NO_DIRECTION, 5]
    for prompt in ("digits 3 and 4", "a cat"):
        with pytest.raises(ValueError, match="expected 1"):
            metrics.facts_of_prompts([prompt])


@pytest.mark.parametrize(("changes", "broken", "words"), [
    ({"num_digits": 2}, False, "num_digits is 2"), ({"digit_size": 16}, False, "digit_size is 16"), ({}, True, "finite"),
])
def test_other_or_broken_videos_are_refused(changes, broken, words, judge, batch, facts):
    video = batch.video[:2].clone()
    video[0, 3, 0, 5, 5] = float("nan") if broken else 0
    with pytest.raises(ValueError, match=words):
        metrics.score_videos(judge, video, *facts, replace(CONFIG, **changes))


@pytest.mark.parametrize("num_digits", [1, 2])
def test_classes_that_are_no_digits_are_not_judged(num_digits):
    config = DatasetConfig(class_names=list("abcdefghij"), num_digits=num_digits)
    with pytest.raises(ValueError, match="dataset.class_names is a, b, .*: the measures are for videos of digits"):
        Panel(config, 8, 6)


@pytest.mark.parametrize("kind", ["as they are", "transposed", "shuffled labels"])
def test_images_that_the_judge_hardly_reads_are_said(judge, tmp_path, kind):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        digits = load_digits(CONFIG, split)
        images, labels = digits.images.numpy(), digits.labels.numpy().astype(np.uint8)
        images = images.transpose(0, 2, 1) if kind == "transposed" else images  # as EMNIST's files are
        labels = (labels + 1) % 10 if kind == "shuffled labels" else labels
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(header + np.ascontiguousarray(array).tobytes())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_foreign_digits(judge, DatasetConfig(mnist_root=str(tmp_path)))
    assert len(said) == (kind != "as they are")
    assert all("of the images in dataset.mnist_root" in str(each.message) for each in said)
