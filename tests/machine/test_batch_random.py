"""Draws of a batch in parts are those of the whole batch, whoever makes them."""

from itertools import accumulate

import pytest
import torch

from machine.batch_random import BatchRandom


def draw_all(random: BatchRandom, num_videos: int) -> list[torch.Tensor]:
    """One of every kind of draw, each with the videos along its first dimension."""
    return [
        random.draw(num_videos, lambda total: torch.rand(total, 2, generator=random.generator)),
        random.draw(num_videos, lambda total: torch.rand(3, total, generator=random.generator), dim=1).T,
        random.normal_like(torch.zeros(num_videos, 5, dtype=torch.float64)),
        torch.tensor(random.seeds(num_videos)),
    ]


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_parts_draw_what_the_whole_batch_draws_and_leave_the_generator_as_it_does(sizes: tuple[int, ...]):
    whole, random = BatchRandom(torch.Generator().manual_seed(0)), BatchRandom(torch.Generator().manual_seed(0))
    expected, slices = draw_all(whole, 4), [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    drawn = [draw_all(random, part.stop - part.start) for part in random.parts(slices, 4)]
    for parts, wanted in zip(zip(*drawn, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(parts), wanted)
    assert torch.equal(random.generator.get_state(), whole.generator.get_state())
    assert draw_all(random, 2)[0].shape == (2, 2)  # after the parts every batch is a whole one again


def test_videos_that_are_not_the_part_in_work_are_refused():
    random = BatchRandom(torch.Generator())
    for _ in random.parts([slice(0, 2), slice(2, 4)], 4):
        assert random.batch_size(2) == 4
        with pytest.raises(ValueError, match="3 videos: expected 2, the size of this part of a batch of 4"):
            random.draw(3, torch.rand)
