"""A folder of the user's clips as a data set, with or without captions; docs/own_videos.md has the file formats.

The name of a clip is its path below the folder, without the ending.

Dimensions: B batch, F frames, C channels, H = W frame side.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clips.video_files import load_array, read_pictures
from machine.seeds import Purpose, stream
from method.choices import require
from method.settings import DataConfig
from network.text_encoder import split_words

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
CLIP_SUFFIXES = (*PICTURE_SUFFIXES, ".gif", ".webp", ".mp4", ".webm", ".mov", ".avi", ".mkv", ".npz", ".npy")
CAPTION_FILES = ("captions.csv", "captions.jsonl")
PURPOSES = {"train": Purpose.TRAINING_VIDEO, "test": Purpose.HELD_OUT_VIDEO}  # default of each split


@dataclass
class VideosConfig(DataConfig):
    """The user's clips. root: their folder. frame_size: pixels; frames are cropped to their middle square and resized. channels: 1 (grey)
    or 3. test_fraction: share of the clips that is held out, by the hash of the name. random_start: a video starts at a random frame of
    its clip, not at the first."""

    channels: int = 3
    root: str = ""
    test_fraction: float = 0.1
    random_start: bool = False

    def __post_init__(self) -> None:
        require(self.root != "", "dataset.root", "empty", "the folder of your clips")
        require(self.frame_size >= 1, "dataset.frame_size", self.frame_size, "at least 1 pixel")
        require(self.channels in (1, 3), "dataset.channels", self.channels, "1 or 3")
        require(0 < self.test_fraction < 1, "dataset.test_fraction", self.test_fraction, "more than 0 and less than 1")

    @property
    def why_no_digits(self) -> str:
        return f"dataset.root is {self.root}, one's own videos (evaluate.py has Frechet, coverage, diversity and motion)"


@dataclass(frozen=True)
class Clip:
    """path: its source. frames: (F, C, H, W) uint8. caption: empty if the folder has no captions."""

    name: str
    path: Path
    frames: Tensor
    caption: str


@dataclass(frozen=True)
class ClipBatch:
    """B videos. video: (B, F, C, H, W) float32 in [-1, 1]."""

    video: Tensor
    captions: list[str]


class OwnVideos:
    """The clips of a split, "train" or "test": (seed, index) names one video, whatever else is in the batch. purpose: each purpose has its
    own order of clips; the default depends on the split. Raises the errors of `read_clips`, and ValueError for another or empty split."""

    def __init__(self, config: VideosConfig, split: str = "train", purpose: Purpose | None = None):
        require(split in PURPOSES, "split", split, f"one of {', '.join(PURPOSES)}")
        self.config = config
        self.purpose = PURPOSES[split] if purpose is None else purpose
        clips = read_clips(config.root, config.frame_size, config.channels)
        held_out = held_out_names([clip.name for clip in clips], config.test_fraction)
        self.clips = [clip for clip in clips if (clip.name in held_out) == (split == "test")]
        expected = f"a share that leaves some of the {len(clips)} clips to learn from"
        require(bool(self.clips), "dataset.test_fraction", config.test_fraction, expected)

    def sample(self, seed: int, indices: Sequence[int], num_frames: int) -> ClipBatch:
        """The videos (seed, index) for every index, `num_frames` long. Raises ValueError naming a clip that is shorter."""
        drawn = [self._draw(seed, int(index)) for index in indices]
        videos = []
        for clip, place in drawn:
            require(len(clip.frames) >= num_frames, f"{clip.path}: the number of frames", len(clip.frames), f"at least {num_frames}")
            first = int(place * (len(clip.frames) - num_frames + 1)) if self.config.random_start else 0
            videos.append(clip.frames[first : first + num_frames])
        return ClipBatch(torch.stack(videos).float() / 127.5 - 1, [clip.caption for clip, _ in drawn])

    def captions(self, seed: int, indices: Sequence[int]) -> list[str]:
        """The captions of the videos (seed, index)."""
        return [self._draw(seed, int(index))[0].caption for index in indices]

    def captions_of_any_stretch(self, seed: int, indices: Sequence[int]) -> list[str]:
        """The same: a caption is assumed to hold for the whole clip."""
        return self.captions(seed, indices)

    def vocabulary(self) -> list[str]:
        """The words of the captions, sorted."""
        return sorted({word for clip in self.clips for word in split_words(clip.caption)})

    def _draw(self, seed: int, index: int) -> tuple[Clip, float]:
        """Draw one video: its clip, and where it starts in the clip, in [0, 1)."""
        rng = stream(seed, index, self.purpose)
        return self.clips[int(rng.integers(len(self.clips)))], rng.random()


def held_out_names(names: Sequence[str], fraction: float) -> set[str]:
    """The names whose hash, as a number in [0, 1), is below the fraction, or the one with the lowest hash. So an added clip does not move
    others between the splits, except in the latter case."""
    place = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    return {name for name in names if place[name] < fraction} or {min(names, key=place.__getitem__)}


@lru_cache(maxsize=2)
def read_clips(root: str, frame_size: int, channels: int) -> tuple[Clip, ...]:
    """All clips of a folder, sorted by name, with their captions; cached. Raises OSError for a missing folder, and ValueError naming the
    file if one cannot be read, for frames of several sizes, two clips of one name, a missing caption, and fewer than two clips."""
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: set dataset.root to the folder of your clips")
    # 1. Captions, then the clips, with frames of one size.
    file = _caption_file(folder)
    captions = {} if file is None else _read_captions(file)
    clips: dict[str, Clip] = {}
    sizes: dict[tuple[int, int], Path] = {}  # (height, width) to the first clip of that size
    for source, name in _find_sources(folder).items():
        for each, pictures in _open_source(source, name):
            if each in clips:
                raise ValueError(f"{clips[each].path} and {source} are both named {each}: rename one of them")
            frames = []
            for picture in pictures:
                sizes.setdefault(picture.shape[:2], source)
                if len(sizes) > 1:
                    (size, one), (other_size, other) = ((f"{width} x {height}", path) for (height, width), path in sizes.items())
                    raise ValueError(f"{other} has frames of {other_size} pixels, {one} of {size}: expected clips of one size")
                frames.append(_fit(picture, frame_size, channels))
            require(bool(frames), f"{source}: the number of frames", 0, "at least 1")
            if file is not None and each not in captions:
                raise ValueError(f"{source} has no caption: expected an entry for the clip {each} in {file}, or no such file")
            clips[each] = Clip(each, source, torch.from_numpy(np.stack(frames)), captions.get(each, ""))
    # 2. What does not fit, and what the user should know.
    expected = f"at least 2, as {', '.join(CLIP_SUFFIXES)} or folders of pictures"
    require(len(clips) > 1, f"{folder}: the number of clips", len(clips), expected)
    if unused := [name for name in captions if name not in clips]:
        warnings.warn(f"{len(unused)} captions in {file} belong to no clip, such as that of {unused[0]}", stacklevel=2)
    ((height, width),) = sizes
    side = min(height, width)
    if (height, width) != (frame_size, frame_size):
        crop = "" if height == width else f"cropped to their middle {side} x {side} and "
        print(f"{folder}: frames of {width} x {height} pixels are {crop}resized to {frame_size} x {frame_size} (Pillow, ImageOps.fit)")
    return tuple(clips[name] for name in sorted(clips))


def _find_sources(folder: Path) -> dict[Path, str]:
    """The files, and folders of pictures, that hold clips, with the clips' names."""
    sources: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() not in CLIP_SUFFIXES or not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        is_frame = path.suffix.lower() in PICTURE_SUFFIXES and path.parent != folder
        source = path.parent if is_frame else path
        sources[source] = below.parent.as_posix() if is_frame else _name(below.as_posix())
    return sources


def _name(path: str) -> str:
    """The name of a clip: its path without the ending."""
    ending = Path(path).suffix
    return path.removesuffix(ending) if ending.lower() in CLIP_SUFFIXES else path


def _open_source(source: Path, name: str) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """The clips of a file or folder of pictures: name and frames, float32 (H, W, 3) in [0, 1]."""
    if source.is_dir():
        pictures = [path for path in source.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")]
        ordered = sorted(pictures, key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)])
        yield name, (picture for path in ordered for picture in read_pictures(path, is_strip=False))
    elif source.suffix.lower() == ".npy":
        try:
            videos = np.load(source, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{source} cannot be read as an npy array: truncated, or another kind of file") from error
        if videos.ndim != 4 or videos.dtype != np.uint8 or 0 in videos.shape:
            wanted = "uint8 (frames, videos, height, width), as mnist_test_seq.npy does"
            raise ValueError(f"{source} holds {videos.dtype} {videos.shape}: expected {wanted}")
        for number in range(videos.shape[1]):
            yield f"{name}/{number:04d}", (np.repeat(np.float32(frame)[..., None] / 255, 3, axis=-1) for frame in videos[:, number])
    elif source.suffix.lower() == ".npz":
        video = ((load_array(source)[0].clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1)
        yield name, iter(video.permute(0, 2, 3, 1).numpy())
    else:
        yield name, read_pictures(source)


def _fit(picture: np.ndarray, frame_size: int, channels: int) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] as uint8 (C, S, S), cropped to its middle square and resized."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).convert("L" if channels == 1 else "RGB")
    if image.size != (frame_size, frame_size):
        kernel = Image.Resampling.BOX if min(image.size) >= frame_size else Image.Resampling.BICUBIC  # box undoes a whole enlargement
        image = ImageOps.fit(image, (frame_size, frame_size), kernel)
    return np.asarray(image).reshape(frame_size, frame_size, channels).transpose(2, 0, 1)


def _caption_file(folder: Path) -> Path | None:
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are both there: expected captions in one file")
    return found[0] if found else None


def _read_captions(path: Path) -> dict[str, str]:
    """Captions by clip, from a CSV file with the columns clip and caption or JSON lines with these keys."""
    captions: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            for number, row in enumerate(rows, 1):
                clip, caption = (row.get("clip"), row.get("caption")) if isinstance(row, dict) else (None, None)
                if not all(isinstance(value, str) and value.strip() for value in (clip, caption)):
                    raise ValueError(f"entry {number} is {row}")
                name = _name(Path(clip.strip()).as_posix())
                if name in captions:
                    raise ValueError(f"entry {number} is a second one for {clip}")
                captions[name] = caption.strip()
    except (ValueError, csv.Error) as error:  # JSON and encoding errors are ValueErrors
        raise ValueError(f"{path}: {error}; expected one entry a clip, with its name as 'clip' and its text as 'caption'") from error
    return captions
