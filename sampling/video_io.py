"""Videos to files: GIF, MP4, PNG strips, raw arrays, and sheets that put several videos on one picture.

Dimensions: B batch, F frames, C channels (1 grey or 3 RGB), H height, W width; all sizes on paper are in pixels.

Conventions. A video is a floating-point tensor `(F, C, H, W)`, or a batch `(B, F, C, H, W)`, on any device. Pictures
are made from values in [0, 1] ("display range"): anything outside is clamped, NaN is refused. Networks work in [-1, 1]
("model range"), which `to_display` maps to [0, 1]; only `save_array` speaks the model range. Frames are
enlarged by whole factors with nearest-neighbour, so a pixel of the video stays a crisp square.

Every writer creates the parent folder, writes a temporary file beside the target and renames it over the target at the
end: an interrupted or failed write leaves whatever was there before.
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

CHANNELS = (1, 3)
VIDEO_SUFFIXES = (".gif", ".mp4", ".png")
MAX_GIF_FPS = 50  # a GIF counts delays in 1/100 s, and browsers play a delay below 2/100 s at 10 frames a second
MP4_QUALITY = 8  # imageio's scale, 0 worst to 10 best
GREY_LEVELS_OF_ANIMATED_SHEET = 32  # rounding a network's faint background noise away keeps the GIF small

BACKGROUND = (255, 255, 255)
TEXT = (32, 32, 32)
MARGIN = 12
SMALLEST_FONT = 13
FONT_PER_FRAME_HEIGHT = 0.17  # text grows with the frames, so it stays readable when a large sheet is shown small
LETTER_WIDTH = 0.52  # of the font size, on average


# --- values -----------------------------------------------------------------------------------------------------------


def to_display(video: Tensor) -> Tensor:
    """Map model range to display range: (..., ) in [-1, 1] -> the same shape in [0, 1], clamped. NaN stays NaN."""
    return ((video + 1) / 2).clamp(0, 1)


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """Turn a video into RGB bytes, enlarged `scale` times by nearest-neighbour.

    video: (F, C, H, W) in [0, 1]; a batch (B, F, C, H, W) is tiled into one near-square grid with white gaps.
    Returns uint8 (F, H * scale, W * scale, 3), or the grid's height and width for a batch.
    Raises TypeError for non-float input and ValueError for a wrong rank, channel count, scale, or for NaN.
    """
    video = _checked(video)
    if video.ndim == 4:
        return _frames_to_uint8(video, scale)
    num_columns = math.ceil(math.sqrt(video.shape[0]))
    cells = [_frames_to_uint8(sample, scale) for sample in video]
    rows = [_join(cells[i : i + num_columns], axis=2) for i in range(0, len(cells), num_columns)]
    missing = rows[0].shape[2] - rows[-1].shape[2]
    rows[-1] = np.pad(rows[-1], ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=BACKGROUND[0])
    return _join(rows, axis=1)


def _checked(video: Tensor) -> Tensor:
    """A float32 copy on the CPU, after the checks of rank, channels, emptiness and NaN. No values are changed."""
    if not isinstance(video, Tensor) or not video.is_floating_point():
        found = f"a {video.dtype} tensor" if isinstance(video, Tensor) else f"a {type(video).__name__}"
        raise TypeError(f"a video must be a floating-point torch tensor, got {found}; convert it with .float()")
    shape = tuple(video.shape)
    if video.ndim not in (4, 5):
        raise ValueError(f"a video must be (F, C, H, W) or (B, F, C, H, W), got {len(shape)} dimensions: {shape}")
    if shape[-3] not in CHANNELS:
        raise ValueError(f"a video must have 1 or 3 channels, got {shape[-3]} in {shape}; expected (..., C, H, W)")
    if 0 in shape:
        raise ValueError(f"a video must not be empty, got shape {shape}")
    video = video.detach().to("cpu", torch.float32)
    num_nan = int(video.isnan().sum())
    if num_nan:
        raise ValueError(f"the video has NaN in {num_nan} of {video.numel()} values, expected none; check the model")
    return video


def _checked_batch(name: str, videos: Tensor, labels: list[str]) -> Tensor:
    videos = _checked(videos)
    if videos.ndim != 5 or videos.shape[0] != len(labels):
        raise ValueError(
            f"{name} must be (B, F, C, H, W) with one video for each of the {len(labels)} labels,"
            f" got shape {tuple(videos.shape)}"
        )
    return videos


def _checked_groups(groups: list[tuple[str, Tensor]], labels: list[str]) -> list[tuple[str, Tensor]]:
    """The groups with checked videos; all must agree in B, F, H and W, since they share rows and columns."""
    if not groups or not labels:
        raise ValueError(f"a comparison needs at least one group and one label, got {len(groups)} and {len(labels)}")
    checked = [(name, _checked_batch(f"group '{name}'", videos, labels)) for name, videos in groups]
    sizes = {name: (videos.shape[1], *videos.shape[3:]) for name, videos in checked}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all groups must have the same (frames, height, width), got {sizes}; cut them alike")
    return checked


def _checked_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _frames_to_uint8(video: Tensor, scale: int) -> np.ndarray:
    _checked_count("scale", scale)
    video = (video.clamp(0, 1) * 255).round().to(torch.uint8)  # (F, C, H, W)
    video = video.expand(-1, 3, -1, -1)  # grey becomes RGB
    return repeat(video.numpy(), "f c h w -> f (h sh) (w sw) c", sh=scale, sw=scale)


def _join(pieces: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate along `axis` with a white gap between neighbours."""
    gap_shape = list(pieces[0].shape)
    gap_shape[axis] = GAP
    gap = np.full(gap_shape, BACKGROUND[0], dtype=np.uint8)
    with_gaps = [part for piece in pieces for part in (gap, piece)]
    return np.concatenate(with_gaps[1:], axis=axis)


# --- files ------------------------------------------------------------------------------------------------------------


def save_video(path: Path, video: Tensor, fps: int = 8, scale: int = 4) -> None:
    """Write a video in the format its suffix names.

    .gif and .mp4 are animations at `fps` frames a second (a GIF rounds each delay to 1/100 s; grey levels are exact in
    a grey GIF; an MP4 is H.264 yuv420p, its last row or column repeated where a side is odd). .png is one strip,
    frames side by side. A batch becomes a grid in animations and one row a video in a strip.

    video: (F, C, H, W) or (B, F, C, H, W) in [0, 1]. scale: nearest-neighbour enlargement.
    Raises ValueError for an unknown suffix or an unusable video, fps or scale; OSError for an unwritable folder.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        raise ValueError(f"save_video does not write raw arrays ({path.name}); use save_array, which keeps [-1, 1]")
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"unknown video format '{suffix}' in {path.name}; use one of {', '.join(VIDEO_SUFFIXES)}")
    _checked_count("fps", fps)
    if suffix == ".png":
        _write_png(path, _strips(_checked(video), scale))
    elif suffix == ".gif":
        _write_gif(path, to_uint8(video, scale), fps)
    else:
        _write_mp4(path, to_uint8(video, scale), fps)


def _strips(video: Tensor, scale: int) -> np.ndarray:
    """(F, C, H, W) or (B, F, C, H, W) -> one picture (height, width, 3): a row a video, a column a frame."""
    batch = video if video.ndim == 5 else video[None]  # (B, F, C, H, W)
    return _join([_join(list(_frames_to_uint8(sample, scale)), axis=1) for sample in batch], axis=0)


def _write_png(path: Path, picture: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, optimize=True)


def _write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write (F, H, W, 3) bytes as an endless loop; grey frames keep their exact levels.

    Frames are encoded one at a time, because Pillow's `save_all` merges equal neighbours and so loses frames of a still
    video.
    """
    if fps > MAX_GIF_FPS:
        raise ValueError(f"a GIF cannot play {fps} frames a second; use fps <= {MAX_GIF_FPS}, or write an .mp4")
    is_grey = bool((frames == frames[..., :1]).all())
    images = [Image.fromarray(frame[..., 0]) if is_grey else Image.fromarray(frame).quantize() for frame in frames]
    timing = {"duration": round(1000 / fps), "loop": 0}  # milliseconds; loop 0 repeats for ever
    header, _ = GifImagePlugin.getheader(images[0].copy(), info=dict(timing))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(header)
        for image in images:
            file.writelines(GifImagePlugin.getdata(image, include_color_table=not is_grey, **timing))
        file.write(b";")  # the GIF trailer


def _write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write (F, H, W, 3) bytes as H.264; yuv420p needs even sides, so an odd side repeats its last row or column."""
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    with replacing(path) as temporary:
        writer = imageio.get_writer(
            temporary,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=MP4_QUALITY,
            pixelformat="yuv420p",
            macro_block_size=1,  # sides are even already: imageio must not rescale
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],  # the index first, so browsers start at once
        )
        with writer:
            for frame in frames:
                writer.append_data(frame)


def save_array(path: Path, video_model_range: Tensor, prompt: str) -> None:
    """Write one video and its prompt as an .npz: `video` float32 (F, C, H, W) in [-1, 1] and `prompt`, a string array.

    Values outside [-1, 1] are clamped. Raises ValueError for another suffix, a batch or an unusable video; OSError for
    an unwritable folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"save_array writes .npz files, got {path.name}; pictures are written by save_video")
    video = _checked(video_model_range)
    if video.ndim != 4:
        raise ValueError(f"save_array takes one video (F, C, H, W), got {tuple(video.shape)}; call it for each video")
    with replacing(path) as temporary, temporary.open("wb") as file:  # given a name, numpy may add a suffix to it
        np.savez_compressed(file, video=video.clamp(-1, 1).numpy(), prompt=np.array(prompt))


# --- sheets -----------------------------------------------------------------------------------------------------------


def _font_size(frame_height: int) -> int:
    return max(SMALLEST_FONT, round(frame_height * FONT_PER_FRAME_HEIGHT))


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


def _evenly_spaced(num_frames: int, num_shown: int) -> list[int]:
    """`num_shown` frame numbers from the first to the last, both included (all of them where there are fewer)."""
    return np.linspace(0, num_frames - 1, min(num_frames, num_shown)).round().astype(int).tolist()


def _frame_labels(shown: list[int], width: int, font_size: int) -> list[str]:
    return [_wrapped(f"frame {frame}", width, font_size) for frame in shown]


def contact_sheet(
    path: Path, videos: Tensor, labels: list[str], num_columns_frames: int = 7, scale: int = 3
) -> None:
    """Write a PNG with one row a video: its label at the left, evenly spaced frames at the right, frame numbers on top.

    videos: (B, F, C, H, W) in [0, 1]. labels: B texts, wrapped where long. num_columns_frames: frames shown of each.
    Raises ValueError where labels and videos differ in number or a video is unusable; OSError for an unwritable folder.
    """
    _checked_count("num_columns_frames", num_columns_frames)
    videos = _checked_batch("videos", videos, labels)
    shown = _evenly_spaced(videos.shape[1], num_columns_frames)
    rows = [_strips(video, scale) for video in videos[:, shown]]  # each (H * scale, strip width, 3)
    size = _font_size(videos.shape[-2] * scale)
    wrapped = [_wrapped(label, max(rows[0].shape[1] // 2, 12 * size), size) for label in labels]
    _write_png(Path(path), _labelled(rows, wrapped, _frame_labels(shown, videos.shape[-1] * scale, size), size, MARGIN))


def comparison_sheet(
    path: Path,
    groups: list[tuple[str, Tensor]],
    labels: list[str],
    num_columns_frames: int = 7,
    scale: int = 3,
    num_panels_across: int = 2,
) -> None:
    """Write a PNG that compares sources: a panel a prompt, in it one row a source, evenly spaced frames along the row.

    groups: (source name, videos (B, F, C, H, W) in [0, 1]), all of the same B, F, H, W. labels: the B prompts, which
    title the panels. Raises ValueError where shapes or counts disagree or a video is unusable; OSError for an unwritable folder.
    """
    _checked_count("num_columns_frames", num_columns_frames)
    _checked_count("num_panels_across", num_panels_across)
    groups = _checked_groups(groups, labels)
    shown = _evenly_spaced(groups[0][1].shape[1], num_columns_frames)
    height, width = (side * scale for side in groups[0][1].shape[-2:])
    size = _font_size(height)
    titles = [_wrapped(label, len(shown) * width, size) for label in labels]
    most = max(title.count("\n") for title in titles)
    panels = [
        _labelled([_strips(videos[index, shown], scale) for _, videos in groups], [name for name, _ in groups],
                  _frame_labels(shown, width, size), size, title="\n" * (most - title.count("\n")) + title)
        for index, title in enumerate(titles)
    ]
    across = min(num_panels_across, len(panels))
    panels += [np.full_like(panels[0], BACKGROUND)] * (-len(panels) % across)
    _write_png(Path(path), rearrange(np.stack(panels), "(down across) h w c -> (down h) (across w) c", across=across))


def comparison_gif(
    path: Path, groups: list[tuple[str, Tensor]], labels: list[str], fps: int = 8, scale: int = 3
) -> None:
    """Write the animated comparison: a column a prompt, a row a source, all playing together.

    groups: (source name, videos (B, F, C, H, W) in [0, 1]), all of the same B, F, H, W. labels: the B prompts, which
    title the columns. Values are rounded to `GREY_LEVELS_OF_ANIMATED_SHEET` levels a channel to keep the file small.
    Raises ValueError where shapes or counts disagree, fps is unusable or a video is; OSError for an unwritable folder.
    """
    _checked_count("fps", fps)
    groups = _checked_groups(groups, labels)
    steps = GREY_LEVELS_OF_ANIMATED_SHEET - 1
    rows = []
    for _, videos in groups:
        rounded = (videos.clamp(0, 1) * steps).round() / steps
        rows.append(_join([_frames_to_uint8(video, scale) for video in rounded], axis=2))  # (F, H * scale, grid width, 3)
    titles = [_wrapped(label, groups[0][1].shape[-1] * scale, SMALLEST_FONT) for label in labels]
    names = [name for name, _ in groups]
    frames = [_labelled(list(frame), names, titles, SMALLEST_FONT) for frame in zip(*rows, strict=True)]
    _write_gif(Path(path), np.stack(frames), fps)
