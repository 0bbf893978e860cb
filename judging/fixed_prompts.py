"""What the judge reads in a run's videos of the same prompts and seeds at every reading.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from judging.digit_judge import DigitJudge
from judging.metrics import facts_of_prompts, score_videos, summarise
from machine.seeds import Purpose, video_seeds
from moving_mnist import NUM_CLASSES, NUM_OCTANTS, DatasetConfig
from network.text_encoder import DIRECTION_PHRASES

NUM_PROMPTS = 40  # each class four times, each direction five times; 16 read .97 of the frames right where 256 read .82
PROMPTS = tuple(f"a {index % NUM_CLASSES} moving {DIRECTION_PHRASES[index % NUM_OCTANTS][0]}" for index in range(NUM_PROMPTS))
SEEDS = tuple(video_seeds(0, range(NUM_PROMPTS), Purpose.FIXED_PROMPTS))
OF_VIDEOS = ("frames_right", "one_class", "track_within_1px", "stroke_mass_ratio")  # of `metrics.summarise`
LAST_BLOCK = {f"{name}_last_block": f"{name}_by_block" for name in ("frames_right", "stroke_mass_ratio")}  # where some faults show first
JUDGED_COLUMNS = (*OF_VIDEOS, *LAST_BLOCK)


@dataclass(frozen=True)
class FixedPrompts:
    """`PROMPTS`, every digit and every direction, from `SEEDS`: the same videos are asked for at every reading.

    sample: makes of prompts, seeds and a number of frames videos (B, F, C, H, W), and draws from the seeds alone.
    """

    judge: DigitJudge
    dataset: DatasetConfig
    num_frames: int
    sample: Callable[[list[str], list[int], int], Tensor]

    def read(self) -> dict[str, float]:
        """`JUDGED_COLUMNS` of what is made now."""
        video = self.sample(list(PROMPTS), list(SEEDS), self.num_frames)
        summary = summarise(score_videos(self.judge, video, *facts_of_prompts(list(PROMPTS)), self.dataset))
        return {name: summary[name] for name in OF_VIDEOS} | {name: summary[by_block][-1] for name, by_block in LAST_BLOCK.items()}
