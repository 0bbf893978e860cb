"""The judge and the exact measures: right on real videos, and each moved by the fault that it is there to see."""

import warnings
from dataclasses import replace
from math import cos, pi, sin

import numpy as np
import pytest
import torch

from judging import metrics, tracking
from judging.digit_judge import (
    JUDGE_PATH,
    DigitJudge,
    held_out_accuracy,
    measure_classes,
    read_digits,
    save_network,
    warn_of_foreign_digits,
)
from judging.ink import display_intensity, intensity_centres
from judging.metrics import NO_DIGIT, NO_DIRECTION, VideoScores
from judging.panel import make_panel
from moving_mnist import DatasetConfig, MovingMNISTGenerator, bounce, load_digits

CONFIG = DatasetConfig()
NUM_FRAMES = 21


@pytest.fixture(scope="module")
def judge():
    return metrics.load_judge()


@pytest.fixture(scope="module")
def batch():
    return MovingMNISTGenerator(CONFIG, "test").sample(seed=6, indices=range(48), num_frames=NUM_FRAMES)


@pytest.fixture(scope="module")
def real(judge, batch):
    return metrics.score_videos(judge, batch.video, batch.digits[:, 0], batch.directions[:, 0], CONFIG)


@pytest.fixture(scope="module")
def score(judge, batch):
    """Summary of a video of the batch's prompts."""
    return lambda video: metrics.summarise(
        metrics.score_videos(judge, video, batch.digits[:, 0], batch.directions[:, 0], CONFIG)
    )


def straight_track(start, velocity, offset=(0.0, 0.0), num_frames=NUM_FRAMES):
    """Centres (1, F, 2) of a bouncing box whose centre of mass is `offset` from its centre."""
    wall, span = (CONFIG.digit_size - 1) / 2, CONFIG.frame_size - CONFIG.digit_size
    frame = torch.arange(num_frames).unsqueeze(1)
    corner = bounce(torch.tensor(start) + frame * torch.tensor(velocity), span)  # (F, 2)
    return (wall + torch.tensor(offset) + corner).unsqueeze(0)


def frame_with(pixels, background=-1.0):
    """A video (1, 1, 1, 32, 32) with values at (row, column)."""
    video = torch.full((1, 1, 1, CONFIG.frame_size, CONFIG.frame_size), background)
    for (row, column), value in pixels.items():
        video[0, 0, 0, row, column] = value
    return video


# -------------------------------------------------------------------------------------------------- strokes and centres


def stroke_mass(video):
    return display_intensity(video).sum(dim=(-2, -1))


def centres_of_mass(video):
    return intensity_centres(display_intensity(video))


def test_centre_of_mass_is_x_then_y_and_weighted():
    video = frame_with({(4, 10): 1.0, (4, 20): 0.0})  # intensities 1 and 1/2
    torch.testing.assert_close(centres_of_mass(video)[0, 0], torch.tensor([(10 + 0.5 * 20) / 1.5, 4.0]))


def test_haze_and_values_below_range_do_not_pull_the_centre():
    video = frame_with({(4, 10): 1.0}, background=-0.9)
    torch.testing.assert_close(centres_of_mass(video)[0, 0], torch.tensor([10.0, 4.0]))
    video[..., 20:, :] = -3.0
    torch.testing.assert_close(centres_of_mass(video)[0, 0], torch.tensor([10.0, 4.0]))


def test_blank_frame_has_its_middle_as_centre_and_no_mass():
    blank = frame_with({})
    torch.testing.assert_close(centres_of_mass(blank)[0, 0], torch.full((2,), (CONFIG.frame_size - 1) / 2))
    assert stroke_mass(blank).item() == 0


def test_stroke_mass_sums_clamped_intensity_whatever_the_channels():
    video = frame_with({(4, 10): 5.0, (9, 9): 0.0})  # 5 is clamped to 1
    torch.testing.assert_close(stroke_mass(video), torch.tensor([[1.5]]))
    torch.testing.assert_close(stroke_mass(video.repeat(1, 1, 3, 1, 1)), torch.tensor([[1.5]]))


# ------------------------------------------------------------------------------------------------------------ the judge


def test_shipped_judge_is_small_and_reads_held_out_digits(judge, batch):
    assert JUDGE_PATH.stat().st_size < 1_000_000
    assert judge.config.accuracy >= 0.975
    is_right = read_digits(judge, batch.video).argmax(dim=-1) == batch.digits
    assert is_right.float().mean() >= 0.97


def test_judge_does_not_see_where_the_digit_is(judge, batch):
    frame = torch.full((1, 1, 64, 64), -1.0)
    logits = []
    for row, column in ((0, 0), (32, 32), (7, 21)):
        shifted = frame.clone()
        shifted[..., row : row + 32, column : column + 32] = batch.video[0, 0]
        logits.append(judge(shifted))
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_probabilities_do_not_depend_on_the_batch(judge, batch):
    together = read_digits(judge, batch.video[:4])
    assert together.shape == (4, NUM_FRAMES, 10)
    torch.testing.assert_close(together.sum(dim=-1), torch.ones(4, NUM_FRAMES))
    torch.testing.assert_close(read_digits(judge, batch.video[2:3])[0], together[2], atol=1e-5, rtol=1e-4)


def test_judge_round_trip_and_strictness(judge, tmp_path):
    path = tmp_path / "folder" / "judge.pt"
    save_network(judge, path)
    again = metrics.load_judge(path)
    assert again.config == judge.config and not again.training
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, judge.state_dict()[name], atol=0, rtol=0)  # it was float16 before
    assert [file.name for file in path.parent.iterdir()] == ["judge.pt"]
    stored = torch.load(path, weights_only=True)
    del stored["judge_state_dict"]["class_mass"]
    for content in (stored, {"state": 1}, b"no judge"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="not a sound judge"):
            metrics.load_judge(path)
    with pytest.raises(FileNotFoundError, match="--train_judge"):
        metrics.load_judge(tmp_path / "none.pt")


def test_class_mass_is_that_of_the_digits_that_it_learned_from(judge):
    generator = MovingMNISTGenerator(CONFIG, "judge")
    mass = torch.stack([generator.sprites[generator.digit_set.labels == digit].mean(dim=0).sum() for digit in range(10)])
    torch.testing.assert_close(judge.class_mass, mass, rtol=1e-3, atol=0)
    again = DigitJudge(judge.config)
    measure_classes(again, generator)
    torch.testing.assert_close(judge.class_sharpness, again.class_sharpness, rtol=1e-3, atol=0)


def test_training_makes_a_judge_that_can_be_kept(tmp_path):
    config = replace(CONFIG, frame_size=24, digit_size=10)
    trained = metrics.train_judge(config, num_steps=40, seed=0)
    assert 0.15 < trained.config.accuracy < 1 and not trained.training  # 0.1 is chance
    assert all(not parameter.requires_grad for parameter in trained.parameters())
    save_network(trained, tmp_path / "judge.pt")
    metrics.load_judge(tmp_path / "judge.pt").check_matches(config)
    with pytest.raises(ValueError, match="num_digits is 2"):
        metrics.train_judge(replace(CONFIG, num_digits=2), num_steps=1, seed=0)
    with pytest.raises(ValueError, match="steps is 0"):
        metrics.train_judge(CONFIG, num_steps=0, seed=0)


def test_stored_accuracy_is_true(judge):
    again = held_out_accuracy(judge, MovingMNISTGenerator(CONFIG, "test"), torch.Generator().manual_seed(9))
    assert again == pytest.approx(judge.config.accuracy, abs=0.005)


def test_gate_on_stroke_mass_is_relative_to_the_class():
    probabilities = torch.eye(10)[torch.tensor([[1, 1, 1, 1, 0]])]  # (1, 5, 10)
    class_mass = torch.full((10,), 30.0)
    class_mass[1] = 10.0
    mass = torch.tensor([[3.9, 4.1, 24.9, 25.1, 25.1]])
    classes = metrics.read_classes(probabilities, mass, class_mass)
    assert classes.tolist() == [[NO_DIGIT, 1, 1, NO_DIGIT, 0]]


def test_classes_to_measures():
    classes = torch.tensor([
        [3, 3, 3, 3], [3, 3, 3, 5], [3, 3, 5, 5], [5, 5, 5, 5], [NO_DIGIT] * 4, [NO_DIGIT, NO_DIGIT, 3, NO_DIGIT],
        [3, 3, NO_DIGIT, 4],
    ])
    digits = torch.full((7,), 3)
    assert metrics.videos_right(classes, digits).tolist() == [True, True, False, False, False, False, True]
    assert metrics.one_class_throughout(classes).tolist() == [True, False, False, True, False, False, False]
    assert metrics.class_kept(classes).sum(dim=1).tolist() == [4, 3, 2, 4, 0, 1, 2]


# --------------------------------------------------------------------------------------------------------- how it moves


@pytest.mark.parametrize("start, velocity, offset, num_frames", [
    ((17.9, 0.2), (1.1, 1.4), (0.4, -0.5), NUM_FRAMES), ((9.0, 9.0), (-2.2, 0.0), (-0.3, 0.2), NUM_FRAMES),
    ((3.0, 9.0), (1.53, -0.87), (0.1, 0.3), 126),
])
def test_fit_recovers_a_bouncing_track(start, velocity, offset, num_frames):
    centres = straight_track(start, velocity, offset, num_frames)
    fit = metrics.fit_bouncing_track(centres, CONFIG)
    torch.testing.assert_close(fit.error, torch.zeros(1, num_frames), atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.track, centres, atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.velocity, torch.tensor([velocity]), atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.speed, fit.velocity.norm(dim=1))


def test_fit_on_noisy_centres_is_the_least_squares_optimum():
    truth = straight_track((3.0, 9.0), (1.5, -0.6), (0.2, 0.0))
    noisy = truth + 0.3 * torch.randn(32, NUM_FRAMES, 2, generator=torch.Generator().manual_seed(0))
    fit = metrics.fit_bouncing_track(noisy, CONFIG)
    assert (fit.error.square().sum(dim=1) <= (noisy - truth).square().sum(dim=(1, 2)) + 1e-6).all()
    assert (fit.velocity - torch.tensor([1.5, -0.6])).abs().max() < 0.15
    alone = metrics.fit_bouncing_track(noisy[5:6], CONFIG)
    torch.testing.assert_close(alone.track[0], fit.track[5])


def test_refinement_never_loses_to_the_grid(monkeypatch):
    centres = 32 * torch.rand(64, NUM_FRAMES, 2, generator=torch.Generator().manual_seed(0))
    refined = metrics.fit_bouncing_track(centres, CONFIG).error.square().sum(dim=1)
    monkeypatch.setattr(tracking, "REFINE_STEPS", 0)
    assert (refined <= metrics.fit_bouncing_track(centres, CONFIG).error.square().sum(dim=1) + 1e-3).all()


def test_fit_cannot_explain_other_walls_or_speeds():
    def distance(centres):
        return metrics.fit_bouncing_track(centres, CONFIG).error.mean().item()

    there_and_back = straight_track((3.0, 9.0), (2.0, 0.0))
    assert distance(there_and_back) < 0.01
    assert distance(there_and_back + torch.tensor([3.0, 0.0])) > 0.5  # walls moved further than any glyph's offset
    assert distance(straight_track((3.0, 9.0), (4.0, 0.0))) > 0.5  # too fast
    torch.manual_seed(0)
    assert distance(there_and_back[:, torch.randperm(NUM_FRAMES)]) > 2
    with pytest.raises(ValueError, match="2 frames"):
        distance(there_and_back[:, :2])


def test_frozen_videos_are_not_within_the_track():
    frozen = straight_track((3.0, 9.0), (0.0, 0.0))
    fit = metrics.fit_bouncing_track(frozen, CONFIG)
    readable = torch.full((1, NUM_FRAMES), 7)
    moving = metrics.is_moving(fit.speed, readable, CONFIG)
    assert not moving.any() and fit.error.max() < 0.01
    assert not metrics.track_within(fit.error, moving).any()
    speeds = torch.tensor([0.49, 0.51, 0.51]) * CONFIG.min_speed
    classes = torch.tensor([[7, 7, 7], [7, NO_DIGIT, 7], [NO_DIGIT, 7, NO_DIGIT]])
    assert metrics.is_moving(speeds, classes, CONFIG).tolist() == [False, True, False]


def test_track_within_takes_the_root_mean_square():
    error = torch.tensor([[0.9, 0.9], [0.0, 1.5], [0.0, 1.3]])
    moving = torch.ones(3, dtype=torch.bool)
    assert metrics.track_within(error, moving).tolist() == [True, False, True]
    assert metrics.track_within(error, moving, tolerance=0.5).tolist() == [False] * 3


def test_octants_turn_counter_clockwise_and_up_is_a_falling_row():
    octants = torch.arange(8)
    angles = [(o + 0.4 * (-1) ** o) * pi / 4 for o in range(8)]
    velocity = torch.tensor([[cos(angle), -sin(angle)] for angle in angles])
    moving = torch.ones(8, dtype=torch.bool)
    obeyed, named = metrics.direction_obeyed(velocity, moving, octants)
    assert obeyed.all() and named.all()
    upside_down, _ = metrics.direction_obeyed(velocity * torch.tensor([1.0, -1.0]), moving, octants)
    assert upside_down.tolist() == [octant in (0, 4) for octant in range(8)]
    assert not metrics.direction_obeyed(velocity, ~moving, octants)[0].any()
    obeyed, named = metrics.direction_obeyed(velocity, moving, torch.full((8,), NO_DIRECTION))
    assert not obeyed.any() and not named.any()


# --------------------------------------------------------------------------------------------- real and corrupted video


def test_real_held_out_videos_score_near_the_top(real):
    summary = metrics.summarise(real)
    assert summary["frames_right"] > 0.96
    assert summary["videos_right"] > 0.96
    assert summary["one_class"] > 0.85
    assert summary["track_within_1px"] == 1.0
    assert summary["mean_track_error"] < 0.1
    assert summary["direction_obeyed"] > 0.97
    assert summary["moving"] == 1.0
    assert abs(summary["stroke_mass_ratio"] - 1) < 0.1
    assert abs(summary["sharpness_ratio"] - 1) < 0.1
    for name in ("frames_right", "class_kept", "frames_within_1px", "stroke_mass_ratio", "sharpness_ratio"):
        assert abs(summary[f"{name}_slope"]) < 0.01, name
    assert len(summary["frames_right_by_block"]) == NUM_FRAMES // 3
    assert sum(summary["frames_right_by_block"]) / 7 == pytest.approx(summary["frames_right"], abs=1e-6)


def test_faint_videos_show_no_digit(score, batch):
    summary = score(metrics.corrupt(batch.video, "faint"))
    for name in ("frames_right", "videos_right", "one_class", "track_within_1px", "direction_obeyed", "moving"):
        assert summary[name] < 0.1, name
    assert summary["stroke_mass_ratio"] == pytest.approx(0.2, abs=0.03)


def test_blank_and_white_videos_earn_nothing(score, batch):
    for value in (-1.0, 1.0):
        summary = score(torch.full_like(batch.video, value))
        for name in ("frames_right", "videos_right", "one_class", "track_within_1px", "direction_obeyed", "moving"):
            assert summary[name] == 0, name


# ----------------------------------------------------------------------------------------------------------- the report


def test_bootstrap_interval_holds_the_mean_and_narrows():
    values = (torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7).float()
    low, high = metrics.bootstrap_interval(values, seed=0)
    standard_error = (values.var() / 400).sqrt().item()
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert metrics.bootstrap_interval(values, seed=0) == [low, high]
    few_low, few_high = metrics.bootstrap_interval(values[:25])
    assert few_high - few_low > 2 * (high - low)
    half_low, half_high = metrics.bootstrap_interval(values, level=0.5)
    assert half_high - half_low < 0.5 * (high - low)
    assert metrics.bootstrap_interval(torch.ones(5)) == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least one value"):
        metrics.bootstrap_interval(torch.ones(0))


def test_the_interval_of_yes_and_no_is_wilsons():
    for hits, num, expected in ((512, 512, (0.9926, 1.0)), (0, 20, (0.0, 0.1611)), (8, 10, (0.4902, 0.9433)), (81, 263, (0.2553, 0.3662))):
        low, high = metrics.share_interval(torch.arange(num) < hits)  # 81 of 263: Newcombe 1998, table I
        assert (low, high) == pytest.approx(expected, abs=5e-5), (hits, num)
    assert metrics.share_interval(torch.ones(512))[1] == 1 and metrics.share_interval(torch.zeros(9))[0] == 0
    half = metrics.share_interval(torch.arange(263) < 81, level=0.5)
    assert half[1] - half[0] < 0.5 * (0.3662 - 0.2553)
    for values, words in ((torch.ones(0), "at least one value"), (torch.tensor([0.5, 1.5]), "0.5 to 1.5: expected shares")):
        with pytest.raises(ValueError, match=words):
            metrics.share_interval(values)


def test_the_interval_of_shares_of_frames_holds_the_truth_and_narrows_with_the_frames():
    """2000 sets of 60 videos of 21 frames: of each video some are right, a share that differs from video to video."""
    rng = torch.Generator().manual_seed(0)
    right = torch.rand(21, 60, 2000, generator=rng) < 0.95 * torch.rand(60, 2000, generator=rng).sqrt()  # mean 0.95 * 2/3
    of_videos, of_frames = (torch.tensor(metrics.share_interval(shares)) for shares in (right.double().mean(dim=0), right[0]))
    for intervals in (of_videos, of_frames):
        held = (intervals[:, 0] <= 0.95 * 2 / 3) & (0.95 * 2 / 3 <= intervals[:, 1])
        assert held.double().mean().item() == pytest.approx(0.95, abs=0.02)
    assert (of_videos.diff(dim=1).mean() / of_frames.diff(dim=1).mean()).item() == pytest.approx(0.53, abs=0.05)
    torch.testing.assert_close(of_videos[7], torch.tensor(metrics.share_interval(right[:, :, 7].double().mean(dim=0))))
    equal = torch.full((40,), 20 / 21)  # as many right in every video: as wide as yes or no
    low, high = metrics.share_interval(equal)
    assert high - low > 0.1


def test_a_bool_measure_has_the_interval_of_shares_and_others_the_bootstrap():
    right = torch.ones(64, 6, dtype=torch.bool)
    summary = metrics.summarise(VideoScores({"right": right, "ink": right.float()}, {"whole": right[:, 0]}))
    low = 1 / (1 + 1.959964**2 / 64)
    for interval in (summary["right_ci"], summary["whole_ci"], *summary["right_by_frame_ci"]):
        assert interval == pytest.approx([low, 1])
    assert summary["ink_ci"] == summary["ink_by_frame_ci"][0] == [1, 1] and summary["right_slope_ci"] == [0, 0]


def test_by_frame_and_by_block_and_the_slope_of_the_drift():
    values = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6], [1.0, 1, 1, 1, 1, 1, 1]])
    summary = metrics.summarise(VideoScores({"ink": values}, {"none": torch.zeros(0)}))
    assert summary["ink_by_frame"] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5] and summary["ink_by_block"] == [1, 2.5, 3.5]  # the last is short
    assert summary["ink_slope"] == pytest.approx((2.5 + 0) / 2)  # of blocks 1, 4, 6 and of a constant
    assert summary["ink_slope_ci"] == [0, 2.5]
    assert len(summary["ink_by_frame_ci"]) == 7 and summary["ink_by_frame_ci"][6] == [1, 6] and "none" not in summary
    assert "ink_slope" not in metrics.summarise(VideoScores({"ink": values[:, :3]}, {}))
    one = metrics.bootstrap_interval(values[:, 6])
    assert summary["ink_by_frame_ci"][6] == one


def test_summary_counts_direction_only_where_the_prompt_names_one(judge, batch):
    def summary(directions):
        return metrics.summarise(metrics.score_videos(judge, batch.video, batch.digits[:, 0], directions, CONFIG))

    directions = torch.full_like(batch.directions[:, 0], NO_DIRECTION)
    none = summary(directions)
    directions[:4] = batch.directions[:4, 0]
    directions[0] = (directions[0] + 4) % 8
    assert summary(directions)["direction_obeyed"] == 0.75
    assert "direction_obeyed" not in none and "direction_obeyed_ci" not in none
    for name in ("frames_right", "videos_right", "one_class", "track_within_1px", "mean_track_error", "moving",
                 "stroke_mass_ratio"):
        low, high = none[f"{name}_ci"]
        assert low <= none[name] <= high


def test_facts_of_prompts():
    prompts = ["the digit 7 moving up", "a three", "a 0 sliding down and left fast"]
    digits, directions = metrics.facts_of_prompts(prompts)
    assert digits.tolist() == [7, 3, 0] and directions.tolist() == [2, NO_DIRECTION, 5]
    for prompt in ("digits 3 and 4", "a cat"):
        with pytest.raises(ValueError, match="expected 1"):
            metrics.facts_of_prompts([prompt])


def test_what_does_not_belong_together_is_refused(judge, batch):
    video, digits, directions = batch.video[:2], batch.digits[:2, 0], batch.directions[:2, 0]
    broken = video.clone()
    broken[0, 3, 0, 5, 5] = float("nan")
    for shown, asked, config, words in (
        (video, digits, replace(CONFIG, num_digits=2), "num_digits is 2"), (video[..., :16, :16], digits, CONFIG, "shape"),
        (video, digits, replace(CONFIG, digit_size=16), "digit_size is 16"), (video, batch.digits[:2], CONFIG, "digits"),
        (broken, digits, CONFIG, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            metrics.score_videos(judge, shown, asked, directions, config)


@pytest.mark.parametrize("arguments, words", [
    (["--train_judge"], "judge.pt exists already: give --output"), (["--output", "none.pt"], "no judge at none.pt: make one with"),
])
def test_the_command_line_refuses_in_one_line_and_overwrites_nothing(arguments, words, monkeypatch):
    before = metrics.JUDGE_PATH.read_bytes()
    monkeypatch.setattr("sys.argv", ["metrics.py", *arguments])
    with pytest.raises(SystemExit, match=f"^error: .*{words}") as caught:
        metrics.main()
    assert "\n" not in caught.value.code and metrics.JUDGE_PATH.read_bytes() == before


@pytest.mark.parametrize("num_digits", [1, 2])
def test_classes_that_are_no_digits_are_not_judged(num_digits):
    config = DatasetConfig(class_names=list("abcdefghij"), num_digits=num_digits)
    with pytest.raises(ValueError, match="dataset.class_names is a, b, .*: the measures are for videos of digits"):
        make_panel(config, 8, 6)


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
    config = DatasetConfig(mnist_root=str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_foreign_digits(judge, config)
    assert len(said) == (kind != "as they are")
    assert all("of the images in dataset.mnist_root" in str(each.message) for each in said)
