"""Held-out prompts and videos: which of them are new to the networks that are measured."""

from __future__ import annotations

from functools import reduce
from itertools import count

from moving_mnist import MovingMNISTGenerator
from training.checkpoint import LoadedNetworks, merge_counts

# The modules that make and judge the videos of a row, with all that these import.
JUDGED_CODE = ("sampling.samplers", "judging.panel", "judging.clip_panel", "judging.held_out")
MAX_TRIES = 1000  # candidates a prompt, before the search for new ones gives up


def prompts_drawn(networks: list[LoadedNetworks]) -> set[str]:
    """All prompts, word for word, that the trainings of these networks drew."""
    trained_on = MovingMNISTGenerator(networks[0].config.dataset, "train")
    counts = reduce(merge_counts, (item.prompts_drawn for item in networks))
    return {caption for seed, num_drawn in counts.items() for caption in trained_on.captions(seed, range(num_drawn))}


def new_indices(held_out: MovingMNISTGenerator, networks: list[LoadedNetworks], seed: int, num_videos: int) -> list[int]:
    """Indices of the first num_videos videos (seed, index) of held-out digits whose prompts none of the networks drew in training.

    Raises ValueError where there are too few.
    """
    drawn, indices = prompts_drawn(networks), []
    for index in count():
        if held_out.captions(seed, [index])[0] not in drawn:
            indices.append(index)
        if len(indices) == num_videos:
            break
        if index > MAX_TRIES * num_videos:
            raise ValueError(f"only {len(indices)} of {num_videos} prompts are new to these networks: ask for fewer videos")
    print(f"of {len(drawn)} different prompts drawn in training, none is among the {num_videos} used here")
    return indices


def who_saw_the_judges_digits(networks: dict[str, LoadedNetworks]) -> str | None:
    """One line that names the networks which learned from digits of the judges; None where none did.

    A judge reads such a network's videos better than it would read those of unseen digits.
    """
    seen = [name for name, item in networks.items() if "judge" in item.digits_seen]
    if not seen:
        return None
    return (f"{', '.join(seen)} learned from digits that the judges learned from too: their figures flatter them; train them anew with "
            "dataset.judge_fraction above 0")
