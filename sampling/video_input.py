"""Pictures and clips from files, as a model reads them: what `video_io` writes, and what others do.

Dimensions: F frames, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from einops import reduce
from torch import Tensor

from sampling.video_io import GAP, load_array

INPUT_SUFFIXES = (".png", ".gif", ".mp4", ".npz")
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def load_frames(path: Path, frame_size: int, channels: int) -> Tensor:
    """The frames (F, C, H, W) in [-1, 1] of a PNG (one frame, or a strip of them side by side), GIF, MP4 or npz.

    Pictures may be enlarged by a whole factor, as `save_video` does, which is undone. Colour becomes grey for a grey
    model. Raises OSError for a file that is not there, and ValueError for one that is no video of square frames of frame_size.
    """
    path = Path(path)
    if path.suffix.lower() not in INPUT_SUFFIXES:
        raise ValueError(f"{path} cannot be gone on from: expected a file in one of {', '.join(INPUT_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give the path of a picture or a clip")
    if path.suffix.lower() == ".npz":
        video = load_array(path)[0]
        if video.ndim != 4 or tuple(video.shape[1:]) != (channels, frame_size, frame_size) or not video.shape[0]:
            raise ValueError(f"{path} holds {tuple(video.shape)}: expected frames of (F, {channels}, {frame_size}, {frame_size})")
        if not bool(torch.isfinite(video).all()):
            raise ValueError(f"{path} has values that are not finite: expected numbers in [-1, 1]")
        return video.float().clamp(-1, 1)
    try:
        pictures = [_as_rgb(np.asarray(picture)) for picture in imageio.mimread(path, memtest=False)]
    except Exception as error:  # every reader has errors of its own for bytes that are no picture
        raise ValueError(f"{path} cannot be read as a picture or clip: truncated, or another kind of file") from error
    if path.suffix.lower() == ".png" and pictures:
        pictures = _cut_strip(pictures[0])
    if not pictures or any(picture.shape != pictures[0].shape for picture in pictures):
        raise ValueError(f"{path} holds no frames of one size")
    height, width = pictures[0].shape[:2]
    if height != width or height % frame_size:
        raise ValueError(
            f"{path} has frames of {width} x {height} pixels: expected {frame_size} x {frame_size}, or a whole multiple of it"
        )
    frames = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1
    frames = reduce(frames, "f (h sh) (w sw) c -> f c h w", "mean", h=frame_size, w=frame_size)
    if channels == 1:
        frames = (frames * torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return frames.clamp(-1, 1)


def _as_rgb(picture: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) bytes as (H, W, 3)."""
    if picture.dtype != np.uint8:
        raise ValueError(f"pixels of type {picture.dtype}: expected bytes")
    if picture.ndim == 2:
        picture = picture[..., None]
    return np.broadcast_to(picture[..., :1], (*picture.shape[:2], 3)) if picture.shape[2] < 3 else picture[..., :3]


def _cut_strip(picture: np.ndarray) -> list[np.ndarray]:
    """The square frames of a strip, with the gaps of `save_video` or without; the picture itself where it is none."""
    height, width = picture.shape[:2]
    for gap in (GAP, 0):
        if width > height and (width + gap) % (height + gap) == 0:
            return [picture[:, x : x + height] for x in range(0, width, height + gap)]
    return [picture]
