"""Videos to files: GIF, MP4, PNG strips, raw arrays, and sheets that put several videos on one picture.

Dimensions: B batch, F frames, C channels (1 grey or 3 RGB), H height, W width; all sizes on paper are in pixels.

A video is a floating-point tensor `(F, C, H, W)` on any device. Pictures are made from values in [0, 1] ("display range"): anything
outside is clamped, NaN is refused. Networks work in [-1, 1] ("model range"), which `to_display` maps to [0, 1]; only `save_array`
speaks the model range. Frames are enlarged by whole factors with nearest-neighbour, so a pixel of the video stays a crisp square.

Every writer creates the parent folder and replaces the file in one step: an interrupted or failed write leaves whatever was there.
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
FPS = 8  # frames a second; a GIF rounds the delay to 1/100 s
MP4_QUALITY = 8  # imageio's scale, 0 worst to 10 best
GREY_LEVELS_OF_ANIMATED_SHEET = 32  # rounding a network's faint background noise away keeps the GIF small

BACKGROUND = (255, 255, 255)
TEXT = (32, 32, 32)
MARGIN = 12
SMALLEST_FONT = 13
FONT_PER_FRAME_HEIGHT = 0.17  # text grows with the frames, so it stays readable when a large sheet is shown small
LETTER_WIDTH = 0.52  # of the font size, on average
PANELS_ACROSS = 2  # of a comparison sheet


# --- values -----------------------------------------------------------------------------------------------------------


def to_display(video: Tensor) -> Tensor:
    """Map model range to display range: (..., ) in [-1, 1] -> the same shape in [0, 1], clamped. NaN stays NaN."""
    return ((video + 1) / 2).clamp(0, 1)


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """RGB bytes (F, H * scale, W * scale, 3) of a video (F, C, H, W) in [0, 1]. Raises ValueError as `_checked` does."""
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
    gap_shape = list(pieces[0].shape)
    gap_shape[axis] = GAP
    gap = np.full(gap_shape, BACKGROUND[0], dtype=np.uint8)
    with_gaps = [part for piece in pieces for part in (gap, piece)]
    return np.concatenate(with_gaps[1:], axis=axis)


# --- files ------------------------------------------------------------------------------------------------------------


def save_video(path: Path, video: Tensor, scale: int = 4) -> None:
    """Write a video (F, C, H, W) in [0, 1], enlarged, in the format its suffix names.

    .gif and .mp4 are animations at `FPS` (grey levels are exact in a grey GIF; an MP4 is H.264 yuv420p, its last row or column repeated
    where a side is odd). .png is one strip, frames side by side.

    Raises ValueError for an unknown suffix or an unusable video; OSError for an unwritable folder.
    """
    path = Path(path)
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
    """Write (F, H, W, 3) bytes as an endless loop; grey frames keep their exact levels. Frames are encoded one at a time, because Pillow's
    `save_all` merges equal neighbours and so loses frames of a still video."""
    is_grey = bool((frames == frames[..., :1]).all())
    images = [Image.fromarray(frame[..., 0]) if is_grey else Image.fromarray(frame).quantize() for frame in frames]
    timing = {"duration": round(1000 / FPS), "loop": 0}  # milliseconds; loop 0 repeats for ever
    header, _ = GifImagePlugin.getheader(images[0].copy(), info=dict(timing))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(header)
        for image in images:
            file.writelines(GifImagePlugin.getdata(image, include_color_table=not is_grey, **timing))
        file.write(b";")  # the GIF trailer


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    """Write (F, H, W, 3) bytes as H.264; yuv420p needs even sides, so an odd side repeats its last row or column."""
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    with replacing(path) as temporary, imageio.get_writer(
        temporary, format="FFMPEG", fps=FPS, codec="libx264", quality=MP4_QUALITY, pixelformat="yuv420p", ffmpeg_log_level="error",
        macro_block_size=1,  # sides are even already: imageio must not rescale
        output_params=["-movflags", "+faststart"],  # the index first, so browsers start at once
    ) as writer:
        for frame in frames:
            writer.append_data(frame)


def save_array(path: Path, video_model_range: Tensor, prompt: str) -> None:
    """Write one video and its prompt as an .npz: `video` float32 (F, C, H, W), clamped to [-1, 1], and `prompt`, a string array. Raises
    ValueError for an unusable video; OSError for an unwritable folder."""
    video = _checked(video_model_range, 4)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:  # given a name, numpy may add a suffix to it
        np.savez_compressed(file, video=video.clamp(-1, 1).numpy(), prompt=np.array(prompt))


# --- sheets -----------------------------------------------------------------------------------------------------------


def _wrapped(text: str, width: int, font_size: int) -> str:
    return textwrap.fill(text, max(int(width / (LETTER_WIDTH * font_size)), 1))


def _labelled(
    rows: list[np.ndarray], row_labels: list[str], column_labels: list[str], font_size: int, row_gap: int = GAP, title: str = ""
) -> np.ndarray:
    """Pictures (height, width, 3) of one size under each other on white, with a label at the left of each, labels over their equally wide
    columns and a title over all, whose height hangs on its number of lines alone."""
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


def _chosen_frames(videos: Tensor, num_shown: int, scale: int) -> tuple[list[np.ndarray], list[str], int]:
    """Of videos (B, F, C, H, W) `num_shown` evenly spaced frames, the first and the last included, or all where there are fewer: a strip
    (height, width, 3) for each video, a label for each column, and the size of the font beside frames of that height."""
    font_size = max(SMALLEST_FONT, round(videos.shape[-2] * scale * FONT_PER_FRAME_HEIGHT))
    num_frames = videos.shape[1]
    shown = np.linspace(0, num_frames - 1, min(num_frames, num_shown)).round().astype(int).tolist()
    labels = [_wrapped(f"frame {frame}", videos.shape[-1] * scale, font_size) for frame in shown]
    return [_join(list(to_uint8(video, scale)), axis=1) for video in videos[:, shown]], labels, font_size


def contact_sheet(path: Path, videos: Tensor, labels: list[str], num_shown: int = 7, scale: int = 3) -> None:
    """Write a PNG with one row a video: its label at the left, `num_shown` evenly spaced frames at the right, frame numbers on top. videos:
    (B, F, C, H, W) in [0, 1]. labels: B texts, wrapped where long. Raises ValueError where labels and videos differ in number or a video is
    unusable; OSError for an unwritable folder."""
    ((_, videos),) = _checked_groups([("videos", videos)], labels)
    rows, columns, size = _chosen_frames(videos, num_shown, scale)
    wrapped = [_wrapped(label, max(rows[0].shape[1] // 2, 12 * size), size) for label in labels]
    _write_png(Path(path), _labelled(rows, wrapped, columns, size, MARGIN))


def comparison_sheet(path: Path, groups: list[tuple[str, Tensor]], labels: list[str], num_shown: int = 7, scale: int = 3) -> None:
    """Write a PNG that compares sources: a panel a prompt, in it one row a source, evenly spaced frames along the row.

    groups: (source name, videos (B, F, C, H, W) in [0, 1]), all of the same B, F, H, W. labels: the B prompts, which
    title the panels. Raises ValueError where shapes or counts disagree or a video is unusable; OSError for an unwritable folder.
    """
    chosen = [_chosen_frames(videos, num_shown, scale) for _, videos in _checked_groups(groups, labels)]
    strips, columns, size = [strips for strips, _, _ in chosen], *chosen[0][1:]
    titles = [_wrapped(label, len(columns) * groups[0][1].shape[-1] * scale, size) for label in labels]
    most = max(title.count("\n") for title in titles)
    panels = [
        _labelled(list(rows), [name for name, _ in groups], columns, size, title="\n" * (most - title.count("\n")) + title)
        for rows, title in zip(zip(*strips, strict=True), titles, strict=True)
    ]
    across = min(PANELS_ACROSS, len(panels))
    panels += [np.full_like(panels[0], BACKGROUND)] * (-len(panels) % across)
    _write_png(Path(path), rearrange(np.stack(panels), "(down across) h w c -> (down h) (across w) c", across=across))


def comparison_gif(path: Path, groups: list[tuple[str, Tensor]], labels: list[str], scale: int = 3) -> None:
    """Write the animated comparison: a column a prompt, a row a source, all playing together, in `GREY_LEVELS_OF_ANIMATED_SHEET` levels a
    channel to keep the file small. groups, labels, errors: as of `comparison_sheet`; the labels title the columns."""
    groups = _checked_groups(groups, labels)
    steps = GREY_LEVELS_OF_ANIMATED_SHEET - 1
    rows = []
    for _, videos in groups:
        rounded = (videos.clamp(0, 1) * steps).round() / steps
        rows.append(_join([to_uint8(video, scale) for video in rounded], axis=2))  # (F, H * scale, grid width, 3)
    titles = [_wrapped(label, groups[0][1].shape[-1] * scale, SMALLEST_FONT) for label in labels]
    names = [name for name, _ in groups]
    frames = [_labelled(list(frame), names, titles, SMALLEST_FONT) for frame in zip(*rows, strict=True)]
    _write_gif(Path(path), np.stack(frames))
