"""How many digits a frame shows, and which: connected pieces of ink, each read by the judge of single digits.

Dimensions: B videos, F frames, N frames of any video, P pieces of ink, C channels, H = W frame side. Videos are (B, F, C, H, W) in [-1, 1].

For videos of two digits, `dataset=moving_mnist_64`. Digits that touch are one piece, which is no digit: such a frame is not readable, and
says nothing for or against the video. Real videos have such frames too; compare with their share.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from judging.digit_judge import DigitJudge, require_digits
from judging.ink import display_intensity, intensity_sharpness
from judging.metrics import VideoScores, read_classes, summarise
from moving_mnist import DatasetConfig
from network.text_encoder import parse_caption

INK = 0.15  # display intensity from which a pixel belongs to a piece
LEAST_PIECE = 0.35  # of the lightest class's mean mass: less is a fragment or dirt, and is ignored
LARGEST_PIECE = 0.8  # of the digit's side: MNIST digits fill 20 of their 28 pixels, more is digits that touch
LEAST_FRAMES = 2  # frames in which a count must be seen before a video is said to show it
IN_FRAME = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # neighbours: the eight in the frame, none in time


def scale_to_judge(judge: DigitJudge, config: DatasetConfig) -> int:
    """Pixels of these videos for one pixel of the judge's. Raises ValueError unless they are its digits, enlarged by a whole number."""
    require_digits(config)
    scale = config.digit_size // judge.config.digit_size
    if scale < 1 or scale * judge.config.digit_size != config.digit_size or scale * judge.config.frame_size != config.frame_size:
        raise ValueError(
            f"frames of {config.frame_size} px with digits of {config.digit_size} px: expected whole multiples of the judge's "
            f"{judge.config.frame_size} and {judge.config.digit_size}; train another one with `{judge.command}`"
        )
    return scale


@torch.no_grad()
def read_pieces(judge: DigitJudge, intensity: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Cut intensities (N, H, W), at the judge's scale, into pieces and read each, alone on black, with the judge.

    Returns whether a frame is readable, (N,) bool: there is ink and no piece is larger than a digit; and the digits of every frame, sorted:
    `NO_DIGIT` for a piece whose stroke mass is no digit's, () for a frame that is not readable."""
    labels, num_pieces = ndimage.label((intensity >= INK).numpy(), IN_FRAME)
    boxes = ndimage.find_objects(labels)
    frame = torch.tensor([box[0].start for box in boxes], dtype=torch.long)  # (P,)
    side = torch.tensor([max(rows.stop - rows.start, columns.stop - columns.start) for _, rows, columns in boxes])
    mass = torch.from_numpy(np.bincount(labels.ravel(), intensity.numpy().ravel(), num_pieces + 1)[1:]).float()
    class_mass = judge.class_mass.cpu()
    is_piece = mass >= LEAST_PIECE * class_mass.min()
    too_large = is_piece & (side > LARGEST_PIECE * judge.config.digit_size)
    readable = torch.zeros(len(intensity), dtype=torch.bool)
    readable[frame[is_piece]] = True
    readable[frame[too_large]] = False
    kept = (is_piece & readable[frame]).nonzero().squeeze(1)  # (P',)
    found: list[list[int]] = [[] for _ in range(len(intensity))]
    for part in kept.split(1024):  # every piece is one frame, in float32
        alone = intensity[frame[part]] * (torch.from_numpy(labels[frame[part].numpy()]) == (part + 1).view(-1, 1, 1))  # (P', H, W)
        probabilities = judge((2 * alone - 1).unsqueeze(1).to(judge.class_mass.device)).softmax(dim=-1).cpu()
        for index, digit in zip(frame[part].tolist(), read_classes(probabilities, mass[part], class_mass).tolist(), strict=True):
            found[index].append(digit)
    return readable, [tuple(sorted(digits)) for digits in found]


def shown_digits(classes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The digits that a video shows: those read most often among the frames that show the most digits, a number that at least
    `LEAST_FRAMES` frames show, as digits that pass each other are fewer for a while, never more. () if there are none."""
    counts = Counter(map(len, classes))
    count = max((count for count, times in counts.items() if times >= LEAST_FRAMES), default=0)
    return Counter(digits for digits in classes if len(digits) == count).most_common(1)[0][0] if count > 0 else ()


def count_digits(judge: DigitJudge, video: Tensor, prompts: list[str], config: DatasetConfig, seed: int = 0) -> dict[str, float | list]:
    """Score video (B, F, C, H, W) of one or more digits against its prompts: the figures of `summarise` for

    frames_readable, by frame: the digits do not touch, so they can be counted and read. frames_right, by frame: readable, and the digits
    are the prompt's. count_right: the video shows as many digits as the prompt names (`shown_digits`). videos_right: they are the prompt's.
    stroke_mass_ratio, sharpness_ratio, by frame, over the prompt's digits in real frames; digits that overlap have less ink.
    Raises ValueError for frames that are not the judge's, enlarged by a whole number."""
    scale, num_frames = scale_to_judge(judge, config), video.shape[1]
    asked = [tuple(sorted(parse_caption(prompt).digits)) for prompt in prompts]
    intensity = functional.avg_pool2d(display_intensity(video.cpu()), scale).flatten(0, 1)  # (N, H, W) at the judge's scale
    readable, classes = read_pieces(judge, intensity)
    by_video = [classes[first : first + num_frames] for first in range(0, len(classes), num_frames)]
    mass = torch.stack([judge.class_mass[list(digits)].sum() for digits in asked]).unsqueeze(1).cpu()  # (B, 1)
    sharpness = torch.stack([judge.class_sharpness[list(digits)].mean() for digits in asked]).unsqueeze(1).cpu()
    by_frame = {
        "frames_readable": readable.unflatten(0, (-1, num_frames)),
        "frames_right": torch.tensor([[found == digits for found in row] for row, digits in zip(by_video, asked, strict=True)]),
        "stroke_mass_ratio": intensity.sum(dim=(-2, -1)).unflatten(0, (-1, num_frames)) / mass,
        "sharpness_ratio": intensity_sharpness(intensity).unflatten(0, (-1, num_frames)) / sharpness,
    }
    shown = [(shown_digits(row), digits) for row, digits in zip(by_video, asked, strict=True)]
    of_videos = {
        "count_right": torch.tensor([len(found) == len(digits) for found, digits in shown]),
        "videos_right": torch.tensor([found == digits for found, digits in shown]),
    }
    return summarise(VideoScores(by_frame, of_videos), seed)
