"""A folder of the user's clips: every kind of file, captions, splits, and each bad input as one line that names the file."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import load_self_test
from PIL import Image

from clips.own_videos import OwnVideos, VideosConfig, held_out_names, read_clips
from experiments import shapes
from machine.seeds import Purpose
from method.settings import PretrainConfig
from network.text_encoder import TextEncoderConfig
from sampling.video_io import save_array, save_video
from training.config import Config
from training.data import open_data, with_vocabulary

NUM_FRAMES = 4


def clip(brightness: float = 1.0, num_frames: int = NUM_FRAMES, height: int = 8, width: int = 8) -> torch.Tensor:
    """A video (F, 3, H, W) in [0, 1] of a red column that moves right, frame by frame; levels that 8 bits hold exactly."""
    video = torch.zeros(num_frames, 3, height, width)
    for frame in range(num_frames):
        video[frame, 0, :, frame % width] = brightness
    return video


def write_clips(folder: Path, num_clips: int = 6, **sizes: int) -> Path:
    for number in range(num_clips):
        save_video(folder / f"clip{number}.gif", clip(**sizes), scale=1)
    return folder


def write_captions(folder: Path, entries: dict[str, str], name: str = "captions.csv") -> None:
    lines = [json.dumps({"clip": clip, "caption": caption}) for clip, caption in entries.items()]
    if name.endswith("csv"):
        lines = ["clip,caption", *(f'{clip},"{caption}"' for clip, caption in entries.items())]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(folder: Path, **changes: object) -> VideosConfig:
    return VideosConfig(**{"root": str(folder), "frame_size": 8, "test_fraction": 0.3, **changes})


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    read_clips.cache_clear()


# ------------------------------------------------------------------------------------------------------- kinds of files


def write_pictures(folder: Path, video: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(video, 7):  # 7, 8, 9, 10: in the order of numbers, not of letters
        Image.fromarray((frame.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"frame{number}.png")


def test_every_kind_of_file_is_read_exactly(tmp_path):
    video = clip()
    save_video(tmp_path / "animation.gif", video, scale=1)
    save_video(tmp_path / "enlarged" / "strip.gif", video, scale=1)
    save_array(tmp_path / "array.npz", video * 2 - 1, "")
    write_pictures(tmp_path / "pictures", video)
    save_video(tmp_path / "strip.png", video, scale=1)
    clips = read_clips(str(tmp_path), 8, 3)
    assert [each.name for each in clips] == ["animation", "array", "enlarged/strip", "pictures", "strip"]
    for each in clips:
        assert torch.equal(each.frames, (video * 255).byte()) and each.caption == "", each.name


def test_the_canonical_array_holds_many_grey_clips(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (20, 5, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", videos)
    clips = read_clips(str(tmp_path), 64, 1)
    assert [each.name for each in clips] == [f"mnist_test_seq/{number:04d}" for number in range(5)]
    assert np.array_equal(clips[3].frames[:, 0].numpy(), videos[:, 3])
    assert torch.equal(read_clips(str(tmp_path), 64, 3)[3].frames, clips[3].frames.expand(-1, 3, -1, -1))


def test_frames_are_cropped_to_their_middle_and_resized_which_is_said(tmp_path, capsys):
    for number in range(2):
        video = torch.zeros(NUM_FRAMES, 3, 16, 24)
        video[:, :, :, 4:20], video[:, 1, :8] = 0.2, 0.6  # 0.2 and 0.6 are 51 and 153 of 255
        save_array(tmp_path / f"{number}.npz", video * 2 - 1, "")
    frames = read_clips(str(tmp_path), 8, 3)[0].frames
    assert capsys.readouterr().out == (
        f"{tmp_path}: frames of 24 x 16 pixels are cropped to their middle 16 x 16 and resized to 8 x 8 (Pillow, ImageOps.fit)\n"
    )
    assert frames.shape == (NUM_FRAMES, 3, 8, 8) and (frames[:, 0] == 51).all()
    assert (frames[:, 1, :4] == 153).all() and (frames[:, 1, 4:] == 51).all()
    read_clips(str(tmp_path), 8, 3)
    assert capsys.readouterr().out == ""  # read once


def test_colour_becomes_grey_for_one_channel(tmp_path):
    frames = read_clips(str(write_clips(tmp_path)), 8, 1)[0].frames
    assert frames.shape == (NUM_FRAMES, 1, 8, 8) and frames.max() == 76  # .299 of 255


# ------------------------------------------------------------------------------------------------- captions and the splits


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_captions_make_the_vocabulary(tmp_path, name):
    write_clips(tmp_path, 4)
    captions = {"clip0.gif": "A dog, running", "clip1": "two dogs", "clip2.gif": "Zwei Hunde", "clip3.gif": "ein Löwe"}
    write_captions(tmp_path, captions, name)
    assert [(each.name, each.caption) for each in read_clips(str(tmp_path), 8, 3)] == [
        (name.removesuffix(".gif"), caption) for name, caption in captions.items()
    ]
    data = OwnVideos(settings(tmp_path))
    words = {word for each in data.clips for word in re.findall(r"\w+", each.caption.lower())}
    assert data.vocabulary() == sorted(words) and words
    assert data.captions_of_any_stretch(0, range(9)) == data.captions(0, range(9))  # not rewritten as one that names digits


def test_the_splits_share_no_clip_and_a_new_clip_moves_none(tmp_path):
    names = [f"clip{number}" for number in range(400)]
    held_out = held_out_names(names, 0.2)
    assert 50 < len(held_out) < 110 and held_out_names([*names, "more"], 0.2) - {"more"} == held_out
    assert len(held_out_names(names[:3], 1e-9)) == 1
    write_clips(tmp_path, 12)
    train, test = ([each.name for each in OwnVideos(settings(tmp_path), split).clips] for split in ("train", "test"))
    assert sorted(train + test) == sorted(f"clip{number}" for number in range(12)) and test


def test_a_video_is_named_by_seed_and_index(tmp_path):
    for number in range(6):
        save_video(tmp_path / f"clip{number}.gif", clip(brightness=(number + 1) / 6, num_frames=8), scale=1)
    write_captions(tmp_path, {f"clip{number}": f"number {'abcdef'[number]}" for number in range(6)})
    data = OwnVideos(settings(tmp_path))
    batch = data.sample(3, range(10, 30), NUM_FRAMES)
    assert batch.video.shape == (20, NUM_FRAMES, 3, 8, 8) and batch.video.min() == -1 and batch.video.dtype == torch.float32
    assert data.captions(3, range(10, 30)) == batch.captions and len(set(batch.captions)) > 2
    assert torch.equal(data.sample(3, [17], NUM_FRAMES).video[0], batch.video[7])
    assert torch.equal(data.sample(3, [17], 6).video[0, :NUM_FRAMES], batch.video[7])  # a longer video continues a shorter one
    assert data.captions(4, range(20)) != data.captions(3, range(20))
    assert OwnVideos(data.config, purpose=Purpose.RUN_SAMPLE).captions(3, range(20)) != data.captions(3, range(20))
    videos = OwnVideos(settings(tmp_path, random_start=True)).sample(0, range(40), 4).video
    starts = {int(video[0, 0].amax(dim=0).argmax()) for video in videos}
    assert starts == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: save_video(folder / "wide.gif", clip(width=10), scale=1), ["wide.gif has frames of 10 x 8 pixels", "of 8 x 8"]),
    (lambda folder: (folder / "clip3.gif").write_bytes(b"GIF89a and no more"), ["clip3.gif cannot be read"]),
    (lambda folder: np.save(folder / "many.npy", np.zeros((20, 5, 64))),
     ["many.npy holds float64 (20, 5, 64)", "uint8 (frames, videos, height, width)"]),
    (lambda folder: write_captions(folder, {f"clip{number}": "a" for number in range(5)}), ["clip5.gif has no caption", "captions.csv"]),
    (lambda folder: save_array(folder / "clip2.npz", clip() * 2 - 1, ""), ["clip2.gif and ", "clip2.npz are both named clip2"]),
    (lambda folder: (folder / "captions.jsonl").write_text('{"clip": "clip0"\n'), ["captions.jsonl: "]),
    (lambda folder: (folder / "captions.jsonl").write_text('{"clip": "clip0"}\n'), ["captions.jsonl: entry 1 is", "its text as 'caption'"]),
], ids=["sizes", "bytes", "array", "no caption", "names", "json", "entry"])
def test_bad_input_is_one_line_that_names_the_file(tmp_path, spoil, words):
    spoil(write_clips(tmp_path))
    with pytest.raises(ValueError) as caught:
        read_clips(str(tmp_path), 8, 3)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder at .*nowhere: set dataset.root"):
        read_clips(str(tmp_path / "nowhere"), 8, 3)
    with pytest.raises(ValueError, match=f"{tmp_path}: the number of clips is 0: expected at least 2"):
        read_clips(str(tmp_path), 8, 3)


def test_captions_of_no_clip_are_counted(tmp_path):
    write_captions(write_clips(tmp_path, 2), {"clip0": "a", "clip1": "b", "clip7.gif": "c"})
    with pytest.warns(UserWarning, match="1 captions in .*captions.csv belong to no clip, such as that of clip7"):
        clips = read_clips(str(tmp_path), 8, 3)
    assert [(clip.name, clip.caption) for clip in clips] == [("clip0", "a"), ("clip1", "b")]


def run_config(folder: Path, **changes: int) -> Config:
    training = PretrainConfig(**{"min_num_frames": 3, "max_num_frames": 3, **changes})
    return Config(training=training, dataset=settings(folder))


def test_clips_too_short_and_captions_too_long_are_refused_by_name(tmp_path):
    write_captions(write_clips(tmp_path), {f"clip{number}": "one two three" for number in range(6)})
    assert with_vocabulary(run_config(tmp_path)).text.vocabulary == ["one", "three", "two"]
    with pytest.raises(ValueError, match=r"clip\d.gif has 4 frames, less than training.max_num_frames=6"):
        with_vocabulary(run_config(tmp_path, max_num_frames=6))
    with pytest.raises(ValueError, match=r"text.max_tokens is 3: expected 4 for the caption of .*clip\d.gif"):
        with_vocabulary(replace(run_config(tmp_path), text=TextEncoderConfig(max_tokens=3)))
    with pytest.raises(ValueError, match="training.switch_probability is 0.5: expected 0 with dataset=videos"):
        with_vocabulary(run_config(tmp_path, switch_probability=0.5))
    with pytest.raises(ValueError, match="digit_variation is 0.1: expected 0 with dataset=videos"):
        open_data(settings(tmp_path), "train", 0.1)
    with pytest.raises(ValueError, match=r"clip\d.gif: the number of frames is 4: expected at least 5"):
        OwnVideos(settings(tmp_path)).sample(0, [0], 5)


@pytest.mark.parametrize("changes", [{"root": ""}, {"frame_size": 0}, {"channels": 2}, {"test_fraction": 0.0}])
def test_impossible_settings_are_refused_by_name(changes):
    key, = changes
    with pytest.raises(ValueError, match=f"^dataset.{key} is .*expected"):
        VideosConfig(**{"root": "DIR", **changes})


def test_the_set_of_shapes_shows_what_its_captions_say(tmp_path):
    shapes.main(["--output_dir", str(tmp_path / "shapes"), "--num_clips", "40", "--num_frames", "6"])
    clips = read_clips(str(tmp_path / "shapes"), 32, 3)
    assert len(clips) == 40 and {len(each.frames) for each in clips} == {6}
    for each in clips:
        colour, direction = each.caption.split()[1], each.caption.split()[-1]
        ink = each.frames[0].float()
        shown = (ink * ink.sum(dim=0)).sum(dim=(1, 2)) / ink.sum(dim=0).square().sum()
        colours = {name: torch.tensor(value, dtype=torch.float32) / sum(value) for name, value in shapes.COLOURS.items()}
        assert min(colours, key=lambda name: (colours[name] - shown).square().sum().item()) == colour
        place, _ = load_self_test("moving_mnist")["ink_centre"](each.frames[None].double() / 127.5 - 1)
        moved = (place[0, 1] - place[0, 0]).tolist()
        axis = 0 if direction in ("left", "right") else 1
        assert abs(moved[axis]) > abs(moved[1 - axis])  # a bounce turns it round, not aside
    with pytest.raises(SystemExit, match="exists already"):
        shapes.main(["--output_dir", str(tmp_path / "shapes")])
