"""Digits are counted and read on real videos of two, and a digit too few, too many or a wrong one is seen."""

from dataclasses import replace

import pytest
import torch

from judging.digit_count import count_digits, read_pieces, scale_to_judge, shown_digits
from judging.metrics import NO_DIGIT
from moving_mnist import DatasetConfig, MovingMNISTGenerator

PAIR = DatasetConfig(frame_size=64, digit_size=28, num_digits=2, min_speed=2.4, max_speed=4.4)
SINGLE = replace(PAIR, num_digits=1)
NUM_FRAMES = 15


@pytest.fixture(scope="module")
def pair():
    return MovingMNISTGenerator(PAIR, "test").sample(3, range(24), NUM_FRAMES)


@pytest.fixture(scope="module")
def single():
    return MovingMNISTGenerator(SINGLE, "test").sample(3, range(24), NUM_FRAMES)


def test_real_videos_of_two_digits_show_two_and_the_right_ones(judge, pair):
    figures = count_digits(judge, pair.video, pair.captions, PAIR)
    assert figures["count_right"] > 0.7 and figures["videos_right"] > 0.7
    assert 0.35 < figures["frames_right"] <= figures["frames_readable"] < 0.7  # half of the frames show digits that touch
    assert figures["frames_right"] > 0.85 * figures["frames_readable"]
    assert len(figures["frames_right_by_frame"]) == NUM_FRAMES and "frames_right_slope_ci" in figures


def test_real_videos_of_one_digit_show_one(judge, single):
    figures = count_digits(judge, single.video, single.captions, SINGLE)
    assert figures["count_right"] == 1 and figures["frames_readable"] == 1 and figures["videos_right"] > 0.9


def test_a_digit_too_few_too_many_or_another_is_wrong(judge, pair, single):
    too_few = count_digits(judge, single.video, pair.captions, PAIR)
    assert too_few["count_right"] == 0 and too_few["videos_right"] == 0
    one_asked = count_digits(judge, pair.video, single.captions, PAIR)
    assert one_asked["count_right"] < 0.2 and one_asked["videos_right"] < 0.1
    others = count_digits(judge, pair.video, pair.captions[1:] + pair.captions[:1], PAIR)
    assert others["count_right"] > 0.7 and others["videos_right"] < 0.2


def test_pieces_are_counted_apart_and_what_is_too_large_too_small_or_saturated_is_no_digit(judge, single):
    small = torch.nn.functional.avg_pool2d((single.video[0, :1] + 1) / 2, 2)[0]  # (1, 32, 32)
    rows, columns = (small[0] > 0.1).nonzero().unbind(dim=1)
    digit = small[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = digit.shape
    frames = torch.zeros(5, 32, 32)
    frames[0, 1 : 1 + height, 1 : 1 + width] = digit
    frames[1] = frames[0]
    frames[1, 30 - height : 30, 30 - width : 30] = digit  # apart
    frames[2, 1 : 1 + height, 1 : 1 + width] = digit
    frames[2, 30, 2] = 1  # dirt
    frames[3, 2:5, 2:20] = 1  # wider than a digit
    readable, classes = read_pieces(judge, frames)
    label = (single.digits[0, 0].item(),)
    assert readable.tolist() == [True, True, True, False, False]
    assert classes == [label, 2 * label, label, (), ()]
    solid = torch.zeros(1, 32, 32)
    solid[:, 4:15, 4:15] = 1
    assert read_pieces(judge, solid)[1] == [(NO_DIGIT,)]
    assert read_pieces(judge, torch.zeros(2, 32, 32))[1] == [(), ()]


def test_a_video_shows_the_most_digits_that_it_shows_twice():
    assert shown_digits([(3,), (3, 7), (3, 7), (3, 9), (3,), (3,), (1, 2, 3), ()]) == (3, 7)
    assert shown_digits([(), ()]) == shown_digits([(), (1,), (1, 2), (1, 2, 3)]) == ()


def test_frames_that_are_not_the_judges_enlarged_are_refused(judge):
    assert scale_to_judge(judge, PAIR) == 2 and scale_to_judge(judge, DatasetConfig()) == 1
    with pytest.raises(ValueError, match="64 px with digits of 20 px"):
        scale_to_judge(judge, replace(PAIR, digit_size=20))
