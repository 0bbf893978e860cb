"""Clips to try `dataset=videos` on: coloured shapes that bounce off the walls, as GIFs, and captions.csv with texts such as "a red square
moving left": `python -m experiments.shapes --output_dir data/shapes`."""

from __future__ import annotations

import argparse
import csv
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

from machine.interruption import refusals_in_one_line
from machine.paths import user_path
from machine.seeds import Purpose, stream
from moving_mnist import bounce
from sampling.video_io import save_video

COLOURS = {"red": (230, 60, 50), "green": (60, 200, 80), "blue": (70, 110, 250), "yellow": (240, 210, 60)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # y points down
FRAME_SIZE, SHAPE_SIZE, SPEED = 32, 10, 2.0  # pixels; pixels a frame
DETAIL = 8  # pixels are averages of so many squared


def make_clip(seed: int, index: int, num_frames: int) -> tuple[torch.Tensor, str]:
    """The video (F, 3, H, W) in [0, 1] of (seed, index), and its caption."""
    rng = stream(seed, index, Purpose.OWN_SHAPES)
    colour, shape, direction = (list(each)[int(rng.integers(len(each)))] for each in (COLOURS, SHAPES, DIRECTIONS))
    span = FRAME_SIZE - SHAPE_SIZE
    start, velocity = torch.from_numpy(rng.random(2) * span), SPEED * torch.tensor(DIRECTIONS[direction])
    frames = []
    for x, y in bounce(start + torch.arange(num_frames).unsqueeze(1) * velocity, span).tolist():
        image = Image.new("RGB", (FRAME_SIZE * DETAIL, FRAME_SIZE * DETAIL))
        canvas = ImageDraw.Draw(image)
        left, top, right, bottom = (DETAIL * value for value in (x, y, x + SHAPE_SIZE, y + SHAPE_SIZE))
        if shape == "circle":
            canvas.ellipse((left, top, right - 1, bottom - 1), fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle((left, top, right - 1, bottom - 1), fill=COLOURS[colour])
        else:
            canvas.polygon(((left + right) / 2, top, right - 1, bottom - 1, left, bottom - 1), fill=COLOURS[colour])
        frames.append(np.asarray(image.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255, f"a {colour} {shape} moving {direction}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a small set of clips with captions: coloured shapes that bounce off the walls.")
    parser.add_argument("--output_dir", type=user_path, required=True, help="a new folder")
    parser.add_argument("--num_clips", type=int, default=2000)
    parser.add_argument("--num_frames", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if min(arguments.num_clips, arguments.num_frames) < 1:
        sys.exit("error: --num_clips and --num_frames must be at least 1")
    if arguments.output_dir.exists():
        sys.exit(f"error: {arguments.output_dir} exists already: give --output_dir the name of a new folder")
    with refusals_in_one_line("the clips so far are there, most of their captions are not"):
        arguments.output_dir.mkdir(parents=True)
        with (arguments.output_dir / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("clip", "caption"))
            for index in range(arguments.num_clips):
                video, caption = make_clip(arguments.seed, index, arguments.num_frames)
                save_video(arguments.output_dir / f"{index:04d}.gif", video, scale=1)
                rows.writerow((f"{index:04d}.gif", caption))
    print(f"{arguments.num_clips} clips of {arguments.num_frames} frames, and captions.csv, in {arguments.output_dir}")


if __name__ == "__main__":
    main()
