"""Tests of `video_io`: files read back as they were written, bad input is refused, failures leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clips.video_files import load_array
from sampling import video_io

LABELS = ["a zero moving up", "a handwritten nine drifting quickly down and to the left, then back again"]


def moving_square(num_frames: int = 5, side: int = 16, channels: int = 1) -> Tensor:
    """(F, C, H, W) in [0, 1]: a square of many levels, its own in each channel, that moves one pixel a frame."""
    video = torch.zeros(num_frames, channels, side, side)
    for frame in range(num_frames):
        for channel in range(channels):
            video[frame, channel, 2:8, 1 + frame : 7 + frame] = torch.linspace(0.1, 1, 36).view(6, 6) / (1 + channel)
    return video


def batch() -> Tensor:
    return torch.stack([moving_square(7), moving_square(7).flip(-1)])  # (2, F, C, H, W)


def gif_frames(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


WRITERS = {
    "clip.gif": lambda path, video: video_io.save_video(path, video),
    "clip.mp4": lambda path, video: video_io.save_video(path, video),
    "clip.png": lambda path, video: video_io.save_video(path, video),
    "clip.npz": lambda path, video: video_io.save_array(path, video, "a two"),
    "contact.png": lambda path, video: video_io.contact_sheet(path, video[None], ["a two"]),
    "sheet.png": lambda path, video: video_io.comparison_sheet(path, [("real", video[None])], ["a two"]),
    "sheet.gif": lambda path, video: video_io.comparison_gif(path, [("real", video[None])], ["a two"]),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


def test_to_uint8_rounds_clamps_and_enlarges_by_whole_pixels():
    shown = video_io.to_display(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0]))
    torch.testing.assert_close(shown, torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0]))
    video = torch.tensor([[-1.0, 0.0, 0.499], [0.5, 1.0, 2.0]]).view(1, 1, 2, 3)
    pixels = video_io.to_uint8(video, scale=2)
    assert pixels.shape == (1, 4, 6, 3) and pixels.dtype == np.uint8
    expected = np.array([[0, 0, 127], [128, 255, 255]], dtype=np.uint8)  # 0.499 * 255 = 127.2, 0.5 * 255 = 127.5
    np.testing.assert_array_equal(pixels[0, :, :, 1], expected.repeat(2, axis=0).repeat(2, axis=1))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        coloured = torch.tensor([0, 0, 1], dtype=dtype, requires_grad=True).view(1, 3, 1, 1)
        np.testing.assert_array_equal(video_io.to_uint8(coloured)[0, 0, 0], [0, 0, 255])


def test_a_batch_is_tiled_in_reading_order_with_white_gaps():
    video = torch.tensor([0.0, 0.2, 0.4]).view(3, 1, 1, 1, 1).expand(3, 2, 1, 4, 4)
    pixels = video_io.to_uint8(video)[..., 0]
    side, gap = 4, video_io.GAP
    assert pixels.shape == (2, 2 * side + gap, 2 * side + gap)
    corners = pixels[0][[0, 0, -1, -1, side], [0, -1, 0, -1, 0]]
    np.testing.assert_array_equal(corners, [0, 51, 102, 255, 255])  # the missing fourth video and the gap are white


def test_array_round_trip_is_exact_within_the_models_range_and_other_files_are_refused(tmp_path):
    video = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4 - 2
    for prompt in ("a zero moving up", ""):
        path = tmp_path / "clip.NPZ"
        video_io.save_array(path, video, prompt)
        loaded, loaded_prompt = load_array(path)
        assert loaded.dtype == torch.float32 and torch.equal(loaded, video.clamp(-1, 1)) and loaded_prompt == prompt
    assert os.listdir(tmp_path) == ["clip.NPZ"]
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for name, words in (("text.npz", "not an .npz archive"), ("other.npz", "weights.*expected an .npz file with the array 'video'")):
        with pytest.raises(ValueError, match=words):
            load_array(tmp_path / name)


def test_grey_gif_reads_back_exactly(tmp_path):
    video = moving_square(6)
    video_io.save_video(tmp_path / "clip.gif", video, fps=10, scale=3)
    np.testing.assert_array_equal(gif_frames(tmp_path / "clip.gif"), video_io.to_uint8(video, scale=3))
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["duration"] == 100 and image.info["loop"] == 0


def test_colour_gif_reads_back_closely(tmp_path):
    video = moving_square(6, channels=3)
    video[3:] = 1 - video[3:].flip(1)  # other colours, so each frame needs its own palette
    video_io.save_video(tmp_path / "clip.gif", video)
    error = gif_frames(tmp_path / "clip.gif").astype(int) - video_io.to_uint8(video, scale=4)
    assert abs(error).max() <= 8


def test_png_strip_puts_frames_side_by_side_and_a_batch_in_rows(tmp_path):
    videos = batch()
    video_io.save_video(tmp_path / "strip.png", videos, scale=2)
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    side, pitch = 32, 32 + video_io.GAP
    assert picture.shape == (pitch + side, 6 * pitch + side, 3)
    for row, video in enumerate(videos):
        for column, frame in enumerate(video_io.to_uint8(video, scale=2)):
            cell = picture[row * pitch : row * pitch + side, column * pitch : column * pitch + side]
            np.testing.assert_array_equal(cell, frame)
    assert (picture[:, side:pitch] == 255).all()


@pytest.mark.parametrize(("side", "scale"), [(16, 4), (15, 3), (5, 1)])
def test_mp4_has_every_frame_and_odd_sizes_gain_one_pixel(tmp_path, side, scale):
    video = torch.linspace(0.1, 0.9, 9).view(9, 1, 1, 1).expand(9, 1, side, side)
    video_io.save_video(tmp_path / "clip.mp4", video, fps=8, scale=scale)
    frames = np.stack(imageio.mimread(tmp_path / "clip.mp4"))
    even = side * scale + side * scale % 2
    assert frames.shape == (9, even, even, 3)
    expected = np.linspace(0.1, 0.9, 9)[:, None, None, None] * 255
    assert abs(frames - expected).max() < 10
    assert imageio.get_reader(tmp_path / "clip.mp4").get_meta_data()["fps"] == 8


@pytest.mark.parametrize("num_frames", [1, 30])
def test_animations_of_any_length(tmp_path, num_frames):
    for suffix in (".gif", ".mp4"):
        path = tmp_path / f"clip{suffix}"
        for video in (moving_square(num_frames, side=48), torch.full((num_frames, 3, 48, 48), 0.5)):  # a still one too
            video_io.save_video(path, video, scale=1)
            assert len(imageio.mimread(path)) == num_frames


def contains(picture: np.ndarray, patch: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], patch.shape[:2])
    return bool((windows == patch[..., 0]).all(axis=(-1, -2)).any())


def test_contact_sheet_shows_the_chosen_frames_and_its_labels(tmp_path):
    videos = batch()
    video_io.contact_sheet(tmp_path / "sheet.png", videos, LABELS, num_columns_frames=3, scale=2)
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    for video in videos:
        frames = video_io.to_uint8(video, scale=2)
        assert [contains(picture, frame) for frame in frames] == [True, False, False, True, False, False, True]
    video_io.contact_sheet(tmp_path / "blank.png", videos, ["", LABELS[1]], num_columns_frames=3, scale=2)
    assert not np.array_equal(picture, np.asarray(Image.open(tmp_path / "blank.png")))


def test_comparison_sheet_shows_each_source_of_each_prompt(tmp_path):
    groups = [("Real", batch()), ("Teacher", 0.5 * batch()), ("Student", 0.25 * batch().expand(-1, -1, 3, -1, -1))]
    video_io.comparison_sheet(tmp_path / "sheet.png", groups, ["no 3", LABELS[1]], num_columns_frames=2, scale=2)  # of other heights
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    for _, videos in groups:
        for video in videos:
            frames = video_io.to_uint8(video, scale=2)
            assert contains(picture, frames[0]) and contains(picture, frames[-1]) and not contains(picture, frames[3])
    video_io.comparison_gif(tmp_path / "sheet.gif", groups, LABELS)
    assert len(gif_frames(tmp_path / "sheet.gif")) == 7


@every_writer
def test_what_is_no_video_is_refused_and_an_existing_file_survives(tmp_path, name):
    broken, path = moving_square(), tmp_path / name
    broken[2, 0, 3, 3] = float("nan")
    path.write_bytes(b"earlier")
    for video, message in (
        (broken, "NaN in 1 of"), (torch.zeros(5, 2, 8, 8), "1 or 3 channels, got 2"), (torch.zeros(0, 1, 8, 8), "must not be empty"),
        *((torch.zeros(shape), f"got {len(shape)} dimensions") for shape in ((8, 8), (1, 8, 8)) if name.startswith("clip")),
    ):
        with pytest.raises(ValueError, match=message):
            WRITERS[name](path, video)
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("call", "words"), [
    (lambda folder: video_io.to_uint8(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), "torch.uint8"),
    (lambda folder: video_io.to_uint8(np.zeros((2, 1, 4, 4))), "ndarray"),
    (lambda folder: video_io.save_array(folder / "clip.npz", batch(), "a two"), "one video"),
    (lambda folder: video_io.save_video(folder / "clip.gif", torch.zeros(1, 1, 2, 1, 8, 8)), "got 6 dimensions"),
    (lambda folder: video_io.save_video(folder / "clip.npz", moving_square()), "save_array"),
    (lambda folder: video_io.save_video(folder / "clip.avi", moving_square()), "'.avi'.*use one of .gif, .mp4, .png"),
    (lambda folder: video_io.save_array(folder / "clip.gif", moving_square(), "x"), "save_array writes .npz"),
    (lambda folder: video_io.save_video(folder / "clip.gif", moving_square(), fps=0), "fps must be"),
    (lambda folder: video_io.save_video(folder / "clip.gif", moving_square(), fps=60), "fps <= 50"),
    (lambda folder: video_io.save_video(folder / "clip.gif", moving_square(), scale=0), "scale must be"),
    (lambda folder: video_io.contact_sheet(folder / "sheet.png", batch(), ["one label"]), "each of the 1 labels"),
    (lambda folder: video_io.comparison_sheet(folder / "sheet.png", [("Real", batch()), ("Student", batch()[:1])], LABELS), "group 'Student'"),
    (lambda folder: video_io.comparison_gif(folder / "sheet.gif", [("Real", batch()), ("Student", batch()[:, :3])], LABELS),
     r"same \(frames, height, width\)"),
    (lambda folder: video_io.comparison_sheet(folder / "sheet.png", [], LABELS), "at least one group"),
])
def test_what_cannot_be_written_is_refused(tmp_path, call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(tmp_path)
    assert os.listdir(tmp_path) == []


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
