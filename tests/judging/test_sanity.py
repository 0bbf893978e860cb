"""Every fault moves the figure that it must, through the whole panel; a figure that stays put is named."""

import pytest

from judging.panel import Panel
from judging.sanity import IMITATION_KEEPS, MUST_MOVE, REAL_LIMITS, SMALLEST_CHANGE, find_failures, judge_faults, moved
from moving_mnist import DatasetConfig, MovingMNISTGenerator

CONFIG = DatasetConfig()
NUM_VIDEOS, NUM_FRAMES = 96, 12


@pytest.fixture(scope="module")
def batch():
    return MovingMNISTGenerator(CONFIG, "test").sample(seed=5, indices=range(NUM_VIDEOS), num_frames=NUM_FRAMES)


@pytest.fixture(scope="module")
def panel():
    return Panel(CONFIG, NUM_VIDEOS, NUM_FRAMES)


@pytest.fixture(scope="module")
def figures(panel, batch):
    return judge_faults(panel, batch)


@pytest.mark.parametrize("fault", MUST_MOVE)
def test_a_fault_moves_what_it_must(figures, fault):
    assert {name: moved(figures[fault], figures["real"], name) for name in MUST_MOVE[fault]} == MUST_MOVE[fault]


def test_faults_leave_alone_what_they_do_not_touch(figures):
    real = figures["real"]
    for fault, untouched in {
        "wrong digits": ("one_class", "track_within_1px", "direction_obeyed", "frechet_distance", "coverage"),
        "wrong directions": ("frames_right", "track_within_1px", "frechet_distance"),
        "shuffled": ("frames_right", "stroke_mass_ratio", "sharpness_ratio"),
        "softened": ("track_within_1px", "direction_obeyed", "stroke_mass_ratio"),
        "brightened": ("track_within_1px", "direction_obeyed"),
        "collapsed": ("one_class", "track_within_1px"),
        "one digit a class": ("track_within_1px", "frechet_distance", "coverage"),  # what the glyphs are for
        "class means": ("track_within_1px", "frechet_distance", "coverage"),
    }.items():
        assert {name: moved(figures[fault], real, name) for name in untouched} == dict.fromkeys(untouched, 0), fault


def test_real_videos_stand_at_the_floor_and_shuffled_ones_at_the_ceiling(panel, batch, figures):
    beside = panel.yardsticks(batch.video, batch.captions)
    floor, ceiling = figures["real"]["frechet_distance"], beside["real, frames shuffled"]["frechet_distance"]
    assert max(floor, beside["real, training digits"]["frechet_distance"]) < 0.15 * ceiling
    for name in ("track_within_1px", "moving", "stroke_mass_ratio", "sharpness_ratio", "frames_right_slope"):
        low, high = REAL_LIMITS[name]
        assert low <= figures["real"][name] <= high, name


def test_failures_are_named(figures):
    broken = {**figures, "frozen": figures["real"], "real": {**figures["real"], "stroke_mass_ratio": 1.3}}
    text = "\n".join(find_failures(broken))
    assert "moving is 1.000 on frozen videos, 1.000 on real ones: expected a fall" in text
    assert "stroke_mass_ratio is 1.300 on real videos: expected 0.9 to 1.1" in text
    assert set(REAL_LIMITS) <= set(SMALLEST_CHANGE) and all(set(must) <= set(SMALLEST_CHANGE) for must in MUST_MOVE.values())


def test_perfect_imitation_is_no_fault_and_is_named_where_it_moves_a_figure(figures):
    assert not any(moved(figures["imitation"], figures["real"], name) for name in IMITATION_KEEPS)
    copied = {**figures, "imitation": figures["one digit a class"]}
    assert any(line.startswith("glyph_diversity is 0.0") and "on imitation" in line for line in find_failures(copied))


def test_moved_needs_both_enough_and_intervals_apart():
    real = {"one_class": 0.9, "one_class_ci": [0.85, 0.95]}
    for value, interval, expected in ((0.7, [0.65, 0.75], -1), (0.7, [0.5, 0.86], 0), (0.92, [0.96, 0.97], 0), (0.99, [0.98, 1.0], 1)):
        assert moved({"one_class": value, "one_class_ci": interval}, real, "one_class") == expected
