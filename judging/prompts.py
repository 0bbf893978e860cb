"""The prompts that networks are judged on: the same ones at every reading while a run trains, and held-out ones afterwards.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from judging.digit_judge import DigitJudge
from judging.metrics import facts_of_prompts, score_videos, summarise
from machine.seeds import Purpose, video_seeds
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig, MovingMNISTGenerator
from network.text_encoder import DIRECTION_PHRASES
from training.checkpoint import LoadedNetworks, merge_counts

NUM_PROMPTS = 40  # each class four times, each direction five times; 16 read .97 of the frames right where 256 read .82
PROMPTS = tuple(f"a {index % NUM_CLASSES} moving {DIRECTION_PHRASES[index % NUM_OCTANTS][0]}" for index in range(NUM_PROMPTS))
SEEDS = tuple(video_seeds(0, range(NUM_PROMPTS), Purpose.FIXED_PROMPTS))
OF_VIDEOS = ("frames_right", "one_class", "track_within_1px", "stroke_mass_ratio")  # of `metrics.summarise`
LAST_BLOCK = {f"{name}_last_block": f"{name}_by_block" for name in ("frames_right", "stroke_mass_ratio")}  # where some faults show first
JUDGED_COLUMNS = (*OF_VIDEOS, *LAST_BLOCK)
# The modules that make and judge the videos of a row, with all that these import.
JUDGED_CODE = ("sampling.samplers", "judging.panel", "judging.clip_panel", "judging.prompts")
MAX_TRIES = 1000  # candidates a prompt, before the search for new ones gives up


@dataclass(frozen=True)
class FixedPrompts:
    """`PROMPTS`, every digit and every direction, from `SEEDS`: every reading asks for the same videos. sample: makes videos of prompts,
    seeds and a number of frames, (B, F, C, H, W), and draws from the seeds alone."""

    judge: DigitJudge
    dataset: DatasetConfig
    num_frames: int
    sample: Callable[[list[str], list[int], int], Tensor]

    def read(self) -> dict[str, float]:
        """`JUDGED_COLUMNS` of videos made now."""
        video = self.sample(list(PROMPTS), list(SEEDS), self.num_frames)
        summary = summarise(score_videos(self.judge, video, *facts_of_prompts(list(PROMPTS)), self.dataset))
        return {name: summary[name] for name in OF_VIDEOS} | {name: summary[by_block][-1] for name, by_block in LAST_BLOCK.items()}


def new_indices(held_out: MovingMNISTGenerator, networks: list[LoadedNetworks], seed: int, num_videos: int) -> list[int]:
    """Indices of the first num_videos videos (seed, index) of held-out digits whose prompts, word for word, none of the networks drew in
    training. Raises ValueError if there are too few."""
    trained_on = MovingMNISTGenerator(networks[0].config.dataset, "train")
    counts = reduce(merge_counts, (item.prompts_drawn for item in networks))
    drawn = {caption for drawn_seed, num in counts.items() for caption in trained_on.captions(drawn_seed, range(num))}
    indices = []
    for index in range(MAX_TRIES * num_videos):
        if held_out.captions(seed, [index])[0] not in drawn:
            indices.append(index)
        if len(indices) == num_videos:
            print(f"of {len(drawn)} different prompts drawn in training, none is among the {num_videos} used here")
            return indices
    raise ValueError(f"only {len(indices)} of {num_videos} prompts are new to these networks: ask for fewer videos")


def say_who_saw_the_judges_digits(networks: dict[str, LoadedNetworks]) -> None:
    """Print the names of networks that trained on digits of the judges."""
    seen = [name for name, item in networks.items() if "judge" in item.digits_seen]
    if seen:
        print(f"note: {', '.join(seen)} learned from digits that the judges learned from too: their figures flatter them; retrain with "
              "dataset.judge_fraction above 0")
