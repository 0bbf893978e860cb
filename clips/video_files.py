"""Pictures and clips from files as tensors: the files of `sampling.video_io` and of other programs.

Dimensions: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from einops import reduce
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

GAP = 2  # pixels between the frames of a strip, as `save_video` leaves them
LARGEST_STORED = 2.0  # absolute value in an array: a network may overshoot 1; bytes are larger
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
DELAY_TOLERANCE = 0.1  # of a frame: how far a picture's delay may be from a whole number of frames
MAX_FRAMES_OF_A_PICTURE = 1000  # a longer delay is a pause, not repeated frames


def load_frames(path: Path, frame_size: int, channels: int) -> Tensor:
    """The frames (F, C, H, W) in [-1, 1] of an npz from `save_array`, a picture (a frame or a strip), an animation such as a GIF, or a film
    such as an MP4, told by content, not by name. Enlargement by a whole factor, as by `save_video`, is undone. Colour becomes grey for
    one channel. Raises OSError for a missing file, ValueError for one that is not a video of square frames of frame_size."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give the path of a picture or a clip")
    if zipfile.is_zipfile(path):
        video = load_array(path)[0]
        if tuple(video.shape[1:]) != (channels, frame_size, frame_size):
            raise ValueError(f"{path} holds {tuple(video.shape)}: expected frames of (F, {channels}, {frame_size}, {frame_size})")
        return video.clamp(-1, 1)
    pictures = list(read_pictures(path))
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise ValueError(f"{path} holds frames of several sizes: expected one")
    height, width = pictures[0].shape[:2]
    if height != width or height % frame_size:
        raise ValueError(
            f"{path} has frames of {width} x {height} pixels: expected {frame_size} x {frame_size}, or a whole multiple of it"
        )
    frames = torch.from_numpy(np.stack(pictures)) * 2 - 1
    frames = reduce(frames, "f (h sh) (w sw) c -> f c h w", "mean", h=frame_size, w=frame_size)
    if channels == 1:
        frames = (frames * torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return frames.clamp(-1, 1)


def load_array(path: Path) -> tuple[Tensor, str]:
    """Video float32 (F, C, H, W), about [-1, 1], and prompt from an npz of `save_array`; the prompt is empty if the file has none. Loads no
    pickles. Raises FileNotFoundError, or ValueError for another kind of file."""
    wanted = "expected an .npz file with the array 'video', floating-point numbers (F, C, H, W) in [-1, 1]"
    if not zipfile.is_zipfile(path) and path.exists():
        raise ValueError(f"{path} is not an .npz archive: {wanted}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("video", "prompt") if name in arrays.files}
            names = sorted(arrays.files)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises many kinds: for a checksum, a compression, a header, pickles
        raise ValueError(f"{path} cannot be read, it is damaged or holds objects: {wanted}") from error
    if "video" not in found:
        raise ValueError(f"{path} holds the arrays {names}: {wanted}")
    video, prompt = found["video"], str(found.get("prompt", ""))
    if video.ndim != 4 or video.size == 0 or video.dtype.kind != "f":
        raise ValueError(f"{path} has a 'video' of shape {video.shape} and type {video.dtype}: {wanted}")
    if not np.isfinite(video).all() or np.abs(video).max() > LARGEST_STORED:
        raise ValueError(f"{path} has values from {video.min():g} to {video.max():g}: {wanted}")
    return torch.from_numpy(video.astype(np.float32)), prompt


def read_pictures(path: Path, is_strip: bool = True) -> Iterator[np.ndarray]:
    """Yield the frames of a picture, animation or film, at least one, float32 (H, W, 3) in [0, 1]. A picture of an animation, shown k times
    as long as the shortest one, gives k frames. is_strip: cut a single wide picture into square frames. Raises ValueError naming the
    file if it cannot be read."""
    unreadable = f"{path} cannot be read as a picture or clip: truncated, or another kind of file; expected PNG, GIF, MP4 or npz"
    try:
        with Image.open(path) as image:
            delays = [page.info.get("duration", 0) for page in ImageSequence.Iterator(image)]
            repeats = [1] if len(delays) == 1 else _frames_of_each(delays, path)
            for page, times in zip(ImageSequence.Iterator(image), repeats, strict=True):
                picture = _as_rgb(page)
                yield from _cut_strip(picture) if is_strip and len(delays) == 1 else [picture] * times
    except UnidentifiedImageError:
        try:
            yield from _read_film(path)
        except Exception as error:
            raise ValueError(unreadable) from error
    except Exception as error:  # each picture format raises its own kinds
        raise ValueError(unreadable) from error


def _read_film(path: Path) -> Iterator[np.ndarray]:
    """Yield what ffmpeg decodes, float32 (H, W, 3) in [0, 1]. Raises if that is nothing."""
    frames = imageio_ffmpeg.read_frames(str(path))  # not by imageio, which goes by the file's ending
    width, height = next(frames)["size"]
    for frame in chain([next(frames)], frames):  # raises here if there is none
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3).astype(np.float32) / 255


def _as_rgb(image: Image.Image) -> np.ndarray:
    """float32 (H, W, 3) in [0, 1]; 16-bit grey keeps its levels."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow reads 16-bit colour as 8-bit
        grey = np.asarray(image, dtype=np.float32) / 65535
        return np.broadcast_to(grey[..., None], (*grey.shape, 3)).clip(0, 1)
    return np.float32(image.convert("RGB")) / 255


def _frames_of_each(delays: list[float], path: Path) -> list[int]:
    """How many frames each picture of an animation stands for: writers merge equal neighbours into one picture with a longer delay."""
    shortest = min(delays)
    if shortest <= 0:
        return [1] * len(delays)
    ratios = [delay / shortest for delay in delays]
    if any(abs(ratio - round(ratio)) > DELAY_TOLERANCE or ratio > MAX_FRAMES_OF_A_PICTURE for ratio in ratios):
        shown = ", ".join(f"{delay:g}" for delay in sorted(set(delays)))
        warnings.warn(f"{path} shows its pictures for {shown} ms, no multiples of one frame: each is taken as one frame", stacklevel=2)
        return [1] * len(delays)
    return [round(ratio) for ratio in ratios]


def _cut_strip(picture: np.ndarray) -> list[np.ndarray]:
    """The square frames of a strip, with or without the gaps of `save_video`; or else the picture itself."""
    height, width = picture.shape[:2]
    for gap in (GAP, 0):
        if width > height and (width + gap) % (height + gap) == 0:
            return [picture[:, x : x + height] for x in range(0, width, height + gap)]
    return [picture]
