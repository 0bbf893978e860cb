"""Pictures and clips of other programs: every kind is recognised by content, other files are refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clips.video_files import load_frames
from sampling.video_io import save_array, save_video, to_display

SIDE = 16


def noise_pictures(number: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, SIDE, SIDE), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def save_gif(path: Path, pictures: list[Image.Image], delays: int | list[int]) -> Path:
    """As Pillow writes it, which merges equal neighbours into one picture with a longer delay."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays, loop=0)
    return path


def values(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(each, dtype=np.float32) for each in pictures]))[:, None] / 127.5 - 1


def test_equal_neighbours_that_a_writer_merged_are_frames_again(tmp_path: Path):
    a, b, c, d = noise_pictures(4)
    frames = load_frames(save_gif(tmp_path / "clip.gif", [a, b, b, c, c, c, d], 120), SIDE, 1)
    torch.testing.assert_close(frames, values([a, b, b, c, c, c, d]), rtol=0, atol=1e-5)


def test_delays_that_are_no_multiples_are_said_and_every_picture_is_a_frame(tmp_path: Path):
    path = save_gif(tmp_path / "clip.gif", noise_pictures(3), [100, 130, 250])
    with pytest.warns(UserWarning, match="shows its pictures for 100, 130, 250 ms, no multiples of one frame"):
        assert len(load_frames(path, SIDE, 1)) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_picture_of_16_bits_keeps_its_levels(tmp_path: Path, channels: int):
    levels = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
    Image.fromarray(levels).save(tmp_path / "fine.png")
    frames = load_frames(tmp_path / "fine.png", SIDE, channels)
    expected = torch.from_numpy(levels.astype(np.float32) / 65535 * 2 - 1).expand(1, channels, SIDE, SIDE)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "gif", "mp4", "npz"])
@pytest.mark.parametrize("name", ["clip", "clip.gif"])
def test_a_file_is_read_for_what_it_is_whatever_its_name(tmp_path: Path, suffix: str, name: str):
    video = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / f"original.{suffix}"
    save_array(path, video, "") if suffix == "npz" else save_video(path, to_display(video))
    expected = load_frames(path, SIDE, 1)
    assert expected.shape == video.shape and (expected - video).abs().mean() < (0.1 if suffix == "mp4" else 0.005)
    path.rename(tmp_path / name)
    assert torch.equal(load_frames(tmp_path / name, SIDE, 1), expected)


ARRAYS = {
    "text": np.array("a 7"), "bytes": np.zeros((3, 1, SIDE, SIDE), np.uint8), "objects": np.array([{}], dtype=object),
    "no frames": np.zeros((0, 1, SIDE, SIDE), np.float32), "not finite": np.full((3, 1, SIDE, SIDE), np.nan),
    "0 to 255": np.full((3, 1, SIDE, SIDE), 255.0),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_of_another_type_or_shape_is_refused_by_the_name_of_its_file(tmp_path: Path, kind: str):
    np.savez(tmp_path / "clip.npz", video=ARRAYS[kind], prompt="a 7")
    with pytest.raises(ValueError, match=r"clip\.npz .*expected an \.npz file with the array 'video', floating-point numbers"):
        load_frames(tmp_path / "clip.npz", SIDE, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_without_a_prompt_is_read_in_every_floating_type(tmp_path: Path, dtype: type):
    video = np.random.default_rng(0).uniform(-1, 1, (3, 1, SIDE, SIDE)).astype(dtype)
    np.savez_compressed(tmp_path / "clip.npz", video=video)
    assert torch.equal(load_frames(tmp_path / "clip.npz", SIDE, 1), torch.from_numpy(video.astype(np.float32)))


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_an_array_is_one_line(tmp_path: Path, compress):
    """Of the header, of the compressed stream and of the checksum: numpy and zipfile raise different errors for each."""
    compress(tmp_path / "whole.npz", video=np.random.default_rng(0).uniform(-1, 1, (2, 1, SIDE, SIDE)).astype(np.float32))
    whole = (tmp_path / "whole.npz").read_bytes()
    num_refused = 0
    for place in range(0, len(whole), 41):
        (tmp_path / "clip.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        try:
            load_frames(tmp_path / "clip.npz", SIDE, 1)  # a byte of a time or a name may be any
        except ValueError as error:
            assert "clip.npz" in str(error) and "\n" not in str(error)
            num_refused += 1
    assert num_refused > len(whole) / 41 / 2


@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF89a", b"PK\x03\x04", b"\0\0\0\x20ftypisom"])
def test_what_is_no_clip_is_one_line_that_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "clip.gif").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*clip\.gif cannot be read as a picture or clip: .*expected PNG, GIF, MP4 or npz$"):
        load_frames(tmp_path / "clip.gif", SIDE, 1)
