"""Tests of `video_io`: files read back as they were written, bad input is refused, failures leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from sampling import video_io

LABELS = ["a zero moving up", "a handwritten nine drifting quickly down and to the left, then back again"]


def moving_square(num_frames: int = 5, side: int = 16, channels: int = 1) -> Tensor:
    """(F, C, H, W) in [0, 1]: a square of many levels, its own in each channel, that moves one pixel a frame."""
    video = torch.zeros(num_frames, channels, side, side)
    for frame in range(num_frames):
        for channel in range(channels):
            video[frame, channel, 2:8, 1 + frame : 7 + frame] = torch.linspace(0.1, 1, 36).view(6, 6) / (1 + channel)
    return video


def batch(num_frames: int = 7) -> Tensor:
    video = moving_square(num_frames, side=24)
    return torch.stack([video, video.flip(-1)])  # (2, F, C, H, W)


def gif_frames(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


WRITERS = {
    **dict.fromkeys(("clip.gif", "clip.mp4", "clip.png"), video_io.save_video),
    "clip.npz": lambda path, video: video_io.save_array(path, video, "a two"),
    "contact.png": lambda path, video: video_io.contact_sheet(path, video[None], ["a two"]),
    "sheet.png": lambda path, video: video_io.comparison_sheet(path, [("real", video[None])], ["a two"]),
    "sheet.gif": lambda path, video: video_io.comparison_gif(path, [("real", video[None])], ["a two"]),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


def test_to_uint8_rounds_clamps_and_enlarges_by_whole_pixels():
    video = torch.tensor([[-1.0, 0.0, 0.499], [0.5, 1.0, 2.0]]).view(1, 1, 2, 3)
    torch.testing.assert_close(video_io.to_display(2 * video - 1), video.clamp(0, 1))
    pixels = video_io.to_uint8(video, scale=2)
    assert pixels.shape == (1, 4, 6, 3) and pixels.dtype == np.uint8
    expected = np.array([[0, 0, 127], [128, 255, 255]], dtype=np.uint8)  # 0.499 * 255 = 127.2, 0.5 * 255 = 127.5
    np.testing.assert_array_equal(pixels[0, :, :, 1], expected.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_gradients_are_accepted(dtype):
    video = torch.ones(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    assert (video_io.to_uint8(video) == 255).all()


def test_grey_gif_reads_back_exactly(tmp_path):
    video_io.save_video(tmp_path / "clip.gif", moving_square(6), scale=3)
    np.testing.assert_array_equal(gif_frames(tmp_path / "clip.gif"), video_io.to_uint8(moving_square(6), scale=3))
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["duration"] == 120 and image.info["loop"] == 0  # 125 ms in whole hundredths of a second


def test_colour_gif_reads_back_closely(tmp_path):
    video = moving_square(6, channels=3)
    video[3:] = 1 - video[3:].flip(1)  # other colours, so each frame needs its own palette
    video_io.save_video(tmp_path / "clip.gif", video)
    error = gif_frames(tmp_path / "clip.gif").astype(int) - video_io.to_uint8(video, scale=4)
    assert abs(error).max() <= 8


@pytest.mark.parametrize("channels", [1, 3])
def test_a_still_gif_keeps_its_frame_count(tmp_path, channels):
    video = torch.linspace(0, 1, 16).view(1, 1, 4, 4).expand(9, channels, 4, 4)
    video_io.save_video(tmp_path / "still.gif", video)
    assert len(gif_frames(tmp_path / "still.gif")) == 9


def test_png_strip_puts_frames_side_by_side(tmp_path):
    video = moving_square(7)
    video_io.save_video(tmp_path / "strip.png", video, scale=2)
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    side, pitch = 32, 32 + video_io.GAP
    assert picture.shape == (side, 6 * pitch + side, 3)
    for column, frame in enumerate(video_io.to_uint8(video, scale=2)):
        np.testing.assert_array_equal(picture[:, column * pitch : column * pitch + side], frame)
    assert (picture[:, side:pitch] == 255).all()


@pytest.mark.parametrize(("side", "scale"), [(16, 4), (15, 3), (5, 1)])
def test_mp4_has_every_frame_and_odd_sizes_gain_one_pixel(tmp_path, side, scale):
    video = torch.linspace(0.1, 0.9, 9).view(9, 1, 1, 1).expand(9, 1, side, side)
    video_io.save_video(tmp_path / "clip.mp4", video, scale=scale)
    frames = np.stack(imageio.mimread(tmp_path / "clip.mp4"))
    even = side * scale + side * scale % 2
    assert frames.shape == (9, even, even, 3)
    expected = np.linspace(0.1, 0.9, 9)[:, None, None, None] * 255
    assert abs(frames - expected).max() < 10
    assert imageio.get_reader(tmp_path / "clip.mp4").get_meta_data()["fps"] == 8


def contains(picture: np.ndarray, patch: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], patch.shape[:2])
    return bool((windows == patch[..., 0]).all(axis=(-1, -2)).any())


def test_contact_sheet_shows_the_chosen_frames_and_its_labels(tmp_path):
    videos = batch(13)
    video_io.contact_sheet(tmp_path / "sheet.png", videos, LABELS)
    picture, margin = np.asarray(Image.open(tmp_path / "sheet.png")), video_io.MARGIN
    for video in videos:
        frames = video_io.to_uint8(video, video_io.SHEET_SCALE)
        assert [contains(picture, frame) for frame in frames] == 6 * [True, False] + [True]
    video_io.contact_sheet(tmp_path / "blank.png", videos, ["", LABELS[1]])
    assert not np.array_equal(picture, np.asarray(Image.open(tmp_path / "blank.png")))
    for edge in (picture[:margin], picture[-margin:], picture[:, :margin], picture[:, -margin:]):
        assert (edge == 255).all()


def test_comparison_gif_plays_every_source_of_every_prompt_and_stays_small(tmp_path):
    generator = torch.Generator().manual_seed(0)
    square = moving_square(21, side=32).expand(6, -1, -1, -1, -1)
    noisy = [square + level * torch.randn(square.shape, generator=generator) for level in (0, 0.02, 0.15, 0.03)]
    path = tmp_path / "sheet.gif"
    video_io.comparison_gif(path, list(zip(("Real", "Teacher", "Naive", "Student"), noisy, strict=True)), LABELS * 3)
    assert path.stat().st_size < 1_500_000
    frames = gif_frames(path)
    assert len(frames) == 21
    row = frames[:, :, -video_io.MARGIN - 96 : -video_io.MARGIN]  # the last column of prompts
    steps = video_io.GREY_LEVELS_OF_ANIMATED_SHEET - 1
    rounded = (video_io.to_uint8(square[5], scale=3) / 255 * steps).round() / steps * 255
    top = frames.shape[1] - video_io.MARGIN - 4 * 96 - 3 * video_io.GAP
    assert abs(row[:, top : top + 96] - rounded).max() <= 9  # at most one rounding step apart


@every_writer
def test_nan_is_refused_and_an_existing_file_survives(tmp_path, name):
    video = moving_square()
    video[2, 0, 3, 3] = float("nan")
    path = tmp_path / name
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match="NaN in 1 of"):
        WRITERS[name](path, video)
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == [name]


@every_writer
@pytest.mark.parametrize(("shape", "message"), [((5, 2, 8, 8), "of 1 or 3 channels"), ((0, 1, 8, 8), "not empty")])
def test_wrong_channels_and_empty_videos_are_refused(tmp_path, name, shape, message):
    with pytest.raises(ValueError, match=message):
        WRITERS[name](tmp_path / name, torch.zeros(shape))
    assert os.listdir(tmp_path) == []


def test_formats_are_checked(tmp_path):
    with pytest.raises(ValueError, match="save_array for .npz"):
        video_io.save_video(tmp_path / "clip.npz", moving_square())
    with pytest.raises(ValueError, match="'.avi'.*use one of .gif, .mp4, .png"):
        video_io.save_video(tmp_path / "clip.avi", moving_square())


def test_sheets_refuse_disagreeing_shapes(tmp_path):
    path = tmp_path / "sheet.png"
    with pytest.raises(ValueError, match="of 1 videos, one a label"):
        video_io.contact_sheet(path, batch(), ["one label"])
    with pytest.raises(ValueError, match="'Student': .2, 3, 24, 24.*the same for all"):
        video_io.comparison_gif(path, [("Real", batch()), ("Student", batch()[:, :3])], LABELS)


@every_writer
def test_a_failed_write_keeps_the_old_file_and_a_good_one_leaves_no_other(tmp_path, name, monkeypatch):
    path = tmp_path / "new" / "folder" / name
    WRITERS[name](path, moving_square())
    before = path.read_bytes()
    assert os.listdir(path.parent) == [name] and before
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](path, moving_square())
    assert path.read_bytes() == before and os.listdir(path.parent) == [name]
