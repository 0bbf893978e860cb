"""Videos to files: GIF, MP4, PNG strips, raw arrays, and sheets that put several videos on one picture.

Dimensions: B batch, F frames, C channels (1 grey or 3 RGB), H height, W width; all sizes on paper are in pixels.

A video is a floating-point tensor `(F, C, H, W)` on any device. Pictures are made from values in [0, 1] ("display range"), clamped; only
`save_array` takes the networks' [-1, 1] ("model range"). Frames are enlarged by whole factors, nearest neighbour. All writers raise
ValueError for an unusable video (see `_checked`) and OSError for an unwritable folder; a failed write leaves the earlier file as it was.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from einops import rearrange, repeat
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from torch import Tensor

from clips.video_files import GAP
from machine.files import replacing

VIDEO_SUFFIXES = (".gif", ".mp4", ".png")
FPS = 8  # a GIF rounds the delay to 1/100 s
MP4_QUALITY = 8  # imageio's scale, 0 worst to 10 best
GREY_LEVELS_OF_ANIMATED_SHEET = 32  # rounding a network's faint background noise away keeps the GIF small

BACKGROUND = (255, 255, 255)
TEXT = (32, 32, 32)
MARGIN = 12
SMALLEST_FONT = 13
FONT_PER_FRAME_HEIGHT = 0.17  # text grows with the frames, so it stays readable when a large sheet is shown small
LETTER_WIDTH = 0.52  # of the font size, on average
PANELS_ACROSS = 2  # of a comparison sheet
SHEET_SCALE = 3  # enlargement of the frames in a sheet
NUM_SHOWN = 7  # evenly spaced frames of each video in a sheet; all where there are fewer


# --- values -----------------------------------------------------------------------------------------------------------


def to_display(video: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1], any shape, clamped. NaN stays NaN."""
    return ((video + 1) / 2).clamp(0, 1)


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """RGB bytes (F, H * scale, W * scale, 3) of a video (F, C, H, W) in [0, 1]. Raises ValueError as `_checked`."""
    pixels = (_checked(video, 4).clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)  # grey becomes RGB
    return repeat(pixels.numpy(), "f c h w -> f (h sh) (w sw) c", sh=scale, sw=scale)


def _checked(video: Tensor, num_dims: int) -> Tensor:
    """The video as float32 on the CPU. Raises ValueError for another number of dimensions or channels, no values, integers or NaN."""
    shape = tuple(video.shape)
    if not video.is_floating_point() or video.ndim != num_dims or shape[-3] not in (1, 3) or 0 in shape:
        expected = f"floating-point numbers {'(B, F, C, H, W)' if num_dims == 5 else '(F, C, H, W)'}, of 1 or 3 channels, not empty"
        raise ValueError(f"a video is {video.dtype} {shape}: expected {expected}")
    video = video.detach().to("cpu", torch.float32)
    num_nan = int(video.isnan().sum())
    if num_nan:
        raise ValueError(f"the video has NaN in {num_nan} of {video.numel()} values, expected none; check the model")
    return video


def _checked_groups(groups: list[tuple[str, Tensor]], labels: list[str]) -> list[tuple[str, Tensor]]:
    """The groups with checked videos (B, F, C, H, W), which share rows and columns. Raises ValueError where they differ."""
    checked = [(name, _checked(videos, 5)) for name, videos in groups]
    sizes = {name: (videos.shape[0], videos.shape[1], *videos.shape[3:]) for name, videos in checked}
    if len(set(sizes.values())) != 1 or len(checked[0][1]) != len(labels):
        raise ValueError(f"videos, frames, height and width are {sizes}: expected the same for all, of {len(labels)} videos, one a label")
    return checked


def _join(pieces: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate along `axis` with a white gap between neighbours."""
    widths = [(0, GAP if each == axis else 0) for each in range(pieces[0].ndim)]
    padded = [np.pad(piece, widths, constant_values=BACKGROUND[0]) for piece in pieces[:-1]]
    return np.concatenate([*padded, pieces[-1]], axis=axis)


# --- files ------------------------------------------------------------------------------------------------------------


def save_video(path: Path, video: Tensor, scale: int = 4) -> None:
    """Write a video (F, C, H, W) in [0, 1], enlarged, as an animation at `FPS` (.gif, .mp4) or a strip of frames (.png). A grey GIF keeps
    its grey levels exactly. Raises ValueError for another suffix too."""
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"unknown video format '{suffix}' in {path.name}; use one of {', '.join(VIDEO_SUFFIXES)}, or save_array for .npz")
    frames = to_uint8(video, scale)
    if suffix == ".png":
        _write_png(path, _join(list(frames), axis=1))
    elif suffix == ".gif":
        _write_gif(path, frames)
    else:
        _write_mp4(path, frames)


def _write_png(path: Path, picture: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, optimize=True)


def _write_gif(path: Path, frames: np.ndarray) -> None:
    """Write (F, H, W, 3) bytes as an endless loop, frame by frame: Pillow's `save_all` merges equal neighbours."""
    is_grey = bool((frames == frames[..., :1]).all())
    images = [Image.fromarray(frame[..., 0]) if is_grey else Image.fromarray(frame).quantize() for frame in frames]
    timing = {"duration": round(1000 / FPS), "loop": 0}  # milliseconds; loop 0: no end
    header, _ = GifImagePlugin.getheader(images[0].copy(), info=dict(timing))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(header)
        for image in images:
            file.writelines(GifImagePlugin.getdata(image, include_color_table=not is_grey, **timing))
        file.write(b";")  # the GIF trailer


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    """Write (F, H, W, 3) bytes as H.264; yuv420p needs even sides, so an odd side repeats its last row or column."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with replacing(path) as temporary:
        imageio.mimwrite(
            temporary, frames, format="FFMPEG", fps=FPS, codec="libx264", quality=MP4_QUALITY, pixelformat="yuv420p",
            macro_block_size=1,  # sides are even already: imageio must not rescale
            ffmpeg_log_level="error", output_params=["-movflags", "+faststart"],  # the index first, so browsers start at once
        )


def save_array(path: Path, video_model_range: Tensor, prompt: str) -> None:
    """Write one video and its prompt as an .npz: `video` float32 (F, C, H, W), clamped to [-1, 1], and `prompt`, a string array."""
    video = _checked(video_model_range, 4)
    with replacing(path) as temporary, temporary.open("wb") as file:  # given a name, numpy may add a suffix to it
        np.savez_compressed(file, video=video.clamp(-1, 1).numpy(), prompt=np.array(prompt))


# --- sheets -----------------------------------------------------------------------------------------------------------


def _wrapped(text: str, width: int, font_size: int) -> str:
    return textwrap.fill(text, max(int(width / (LETTER_WIDTH * font_size)), 1))


def _labelled(
    rows: list[np.ndarray], row_labels: list[str], column_labels: list[str], font_size: int, row_gap: int = GAP, title: str = ""
) -> np.ndarray:
    """Pictures (height, width, 3) of one size below each other on white: labels to their left and over their equally wide columns, and a
    title, whose height depends on its number of lines only."""
    font = ImageFont.load_default(font_size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox
    label_boxes, column_boxes = ([measure((0, 0), label, font) for label in labels] for labels in (row_labels, column_labels))
    height, width = rows[0].shape[:2]
    pitch = max(height, *(box[3] for box in label_boxes)) + row_gap
    x = round(2 * MARGIN + max(box[2] for box in label_boxes))
    y = round(2 * MARGIN + max(box[3] for box in column_boxes) + (measure((0, 0), title + "g", font)[3] + MARGIN if title else 0))
    canvas = Image.new("RGB", (x + width + MARGIN, math.ceil(y + len(rows) * pitch - row_gap + MARGIN)), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((x, MARGIN), title, TEXT, font)
    for index, label in enumerate(column_labels):
        centre = x + round((index + 0.5) * (width + GAP) / len(column_labels))
        pen.multiline_text((centre, y - MARGIN // 2), label, TEXT, font, anchor="md", align="center")
    for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        middle = round(y + index * pitch + (pitch - row_gap) / 2)
        pen.multiline_text((x - MARGIN, middle), label, TEXT, font, anchor="rm", align="right")
        canvas.paste(Image.fromarray(row), (x, middle - height // 2))
    return np.asarray(canvas)


def _chosen_frames(videos: Tensor) -> tuple[list[np.ndarray], list[str], int]:
    """`NUM_SHOWN` frames of videos (B, F, C, H, W), the first and the last included: a strip (height, width, 3) for each video, a label for
    each column, and the font size for frames of that height."""
    num_frames, (height, width) = videos.shape[1], videos.shape[-2:]
    font_size = max(SMALLEST_FONT, round(height * SHEET_SCALE * FONT_PER_FRAME_HEIGHT))
    shown = np.linspace(0, num_frames - 1, min(num_frames, NUM_SHOWN)).round().astype(int).tolist()
    labels = [_wrapped(f"frame {frame}", width * SHEET_SCALE, font_size) for frame in shown]
    return [_join(list(to_uint8(video, SHEET_SCALE)), axis=1) for video in videos[:, shown]], labels, font_size


def contact_sheet(path: Path, videos: Tensor, labels: list[str]) -> None:
    """Write a PNG with one row for each video: its label, wrapped if long, and some of its frames. videos: (B, F, C, H, W) in [0, 1].
    labels: B texts. Raises ValueError for another number of labels too."""
    ((_, videos),) = _checked_groups([("videos", videos)], labels)
    rows, columns, size = _chosen_frames(videos)
    wrapped = [_wrapped(label, max(rows[0].shape[1] // 2, 12 * size), size) for label in labels]
    _write_png(path, _labelled(rows, wrapped, columns, size, MARGIN))


def comparison_sheet(path: Path, groups: list[tuple[str, Tensor]], labels: list[str]) -> None:
    """Write a PNG that compares sources: one panel for each prompt, in it one row of frames for each source.

    groups: (source name, videos (B, F, C, H, W) in [0, 1]), all of the same B, F, H, W. labels: the B prompts, which title the panels.
    Raises ValueError if shapes or counts differ too.
    """
    chosen = [_chosen_frames(videos) for _, videos in _checked_groups(groups, labels)]
    strips, columns, size = [strips for strips, _, _ in chosen], *chosen[0][1:]
    titles = [_wrapped(label, len(columns) * groups[0][1].shape[-1] * SHEET_SCALE, size) for label in labels]
    most = max(title.count("\n") for title in titles)
    panels = [
        _labelled(list(rows), [name for name, _ in groups], columns, size, title="\n" * (most - title.count("\n")) + title)
        for rows, title in zip(zip(*strips, strict=True), titles, strict=True)
    ]
    across = min(PANELS_ACROSS, len(panels))
    panels += [np.full_like(panels[0], BACKGROUND)] * (-len(panels) % across)
    _write_png(path, rearrange(np.stack(panels), "(down across) h w c -> (down h) (across w) c", across=across))


def comparison_gif(path: Path, groups: list[tuple[str, Tensor]], labels: list[str]) -> None:
    """Write the animated comparison: a column for each prompt, a row for each source, all playing together. Arguments as those of
    `comparison_sheet`; the labels title the columns."""
    groups = _checked_groups(groups, labels)
    steps = GREY_LEVELS_OF_ANIMATED_SHEET - 1
    rows = []
    for _, videos in groups:
        rounded = (videos.clamp(0, 1) * steps).round() / steps
        rows.append(_join([to_uint8(video, SHEET_SCALE) for video in rounded], axis=2))  # (F, H * scale, grid width, 3)
    titles = [_wrapped(label, groups[0][1].shape[-1] * SHEET_SCALE, SMALLEST_FONT) for label in labels]
    names = [name for name, _ in groups]
    _write_gif(path, np.stack([_labelled(list(frame), names, titles, SMALLEST_FONT) for frame in zip(*rows, strict=True)]))
