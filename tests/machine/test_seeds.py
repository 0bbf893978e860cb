"""Every seed, also above 32 bits, and every purpose has its own stream."""

import re

import numpy as np
import pytest
import torch

from dynamic_video_sf import draw_noise, make_noise_streams
from machine.paths import REPOSITORY as ROOT
from machine.seeds import Purpose, seed_global_generators, stream, torch_generator, video_seeds
from moving_mnist import DatasetConfig, MovingMNISTGenerator
from training import resume

ALIKE_BELOW_32_BITS = (0, 2**32, 2**40, 2**63)


def all_differ(drawn: list[torch.Tensor]) -> bool:
    return all(not torch.equal(one, other) for number, one in enumerate(drawn) for other in drawn[:number])


def test_seeds_that_differ_only_above_32_bits_are_different_seeds():
    videos = draw_noise(make_noise_streams(list(ALIKE_BELOW_32_BITS)), (3, 1, 4, 4), torch.device("cpu"))
    assert all_differ(list(videos))
    assert all_differ([torch.rand(8, generator=torch_generator(seed, Purpose.TRAINING)) for seed in ALIKE_BELOW_32_BITS])
    generator = MovingMNISTGenerator(DatasetConfig())
    assert all_differ([generator.sample(seed, [0], 2).video for seed in ALIKE_BELOW_32_BITS])
    weights = []
    for seed in ALIKE_BELOW_32_BITS:
        seed_global_generators(seed)
        weights.append(torch.randn(8))
    assert all_differ(weights)


@pytest.mark.parametrize("change", [{"seed": 6}, {"index": 6}, {"purpose": Purpose.WEIGHTS}])
def test_a_stream_is_a_function_of_seed_index_and_purpose(change: dict):
    asked = {"seed": 5, "index": 5, "purpose": Purpose.NOISE}
    first, again, other = (stream(**each).standard_normal(64) for each in (asked, asked, {**asked, **change}))
    assert np.array_equal(first, again) and abs(np.corrcoef(first, other)[0, 1]) < 0.5


def test_no_two_purposes_share_a_stream():
    members = Purpose.__members__.values()  # aliases, which share a number, included
    assert len({stream(3, 4, purpose).integers(2**63) for purpose in members}) == len(members)


def test_splits_with_one_seed_show_other_videos():
    by_purpose = [MovingMNISTGenerator(DatasetConfig(), "test", purpose=purpose) for purpose in (Purpose.EVALUATION, Purpose.REFERENCE)]
    by_split = [MovingMNISTGenerator(DatasetConfig(), split) for split in ("train", "judge", "test")]
    starts = [generator.sample(0, range(16), 1).start for generator in (*by_purpose, *by_split)]
    assert all_differ(starts)
    assert all(not (one == other).any() for number, one in enumerate(starts) for other in starts[:number])


def test_a_generator_of_torch_is_filled_whole_and_draws_what_it_should():
    drawn = torch.randn(100_000, generator=torch_generator(1, Purpose.TRAINING))
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    states = [torch_generator(seed, Purpose.TRAINING).get_state() for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1]) and (states[0] != states[2]).float().mean() > 0.4


def test_the_global_generators_are_seeded_and_can_be_restored():
    def draw() -> tuple:
        return torch.rand(()).item(), np.random.rand(), resume.random.random()

    seed_global_generators(3)
    states = resume.global_random_states()
    first = draw()
    resume.restore_global_random_states(states)
    assert draw() == first
    seed_global_generators(4)
    assert not set(draw()) & set(first)


def test_seeds_of_videos_do_not_meet():
    seeds = [seed for purpose in (Purpose.EVALUATION_NOISE, Purpose.RUN_SAMPLE_NOISE) for seed in video_seeds(0, range(2000), purpose)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


@pytest.mark.parametrize("seed, index", [(-1, 0), (0, 2**64), (2**64, 0)])
def test_numbers_out_of_range_are_refused(seed: int, index: int):
    with pytest.raises(ValueError, match=r"expected 0 to 2\*\*64 - 1"):
        stream(seed, index, Purpose.NOISE)


def test_nothing_is_seeded_elsewhere():
    """torch's own seeding keeps 32 bits: every source draws from `seeds`."""
    sources = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "node_modules"} & set(path.parts) and path.name != "seeds.py"]
    found = [path.name for path in sources if re.search(r"manual_seed\(|default_rng\(|random\.seed\(|Philox\(", path.read_text())]
    assert found == ["mnist.py"]  # whose split is fixed
