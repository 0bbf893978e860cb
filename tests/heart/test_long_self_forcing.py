"""Training past the horizon: windows of long self-rollouts, wherever they start, and what before them is simulated."""

import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.networks import build_engine, random_prompt, random_text
from helpers.stages import assert_same, build_self_forcing, run_config, self_forcing_config
from torch import Tensor

import dynamic_video_sf
from dynamic_video_sf import PromptSwitch, make_noise_streams, rollout_blocks
from experiments import compute
from method.choices import SWITCHES
from network.text_encoder import parse_caption
from training.config import SelfForcingConfig
from training.data import draw_window_start, window_starts
from training.stages import SelfForcingStage

BLOCK = 3
LONG = {"window_frames": 6, "rollout_frames": 21, "min_num_frames": 9, "max_num_frames": 9}


def test_windows_start_anywhere_alike_the_first_and_the_last_place_included():
    config, random = SelfForcingConfig(**LONG), torch.Generator().manual_seed(0)
    assert list(window_starts(config, 9)) == [0, 3, 6, 9, 12] and list(window_starts(config, 21)) == [0]
    assert list(window_starts(SelfForcingConfig(), 21)) == [0]
    drawn = Counter(draw_window_start(config, 9, random) for _ in range(2000))
    assert set(drawn) == {0, 3, 6, 9, 12}
    assert all(abs(count - 400) < 5 * 18 for count in drawn.values()), drawn  # five standard deviations
    state = random.get_state()
    assert draw_window_start(config, 21, random) == 0 == draw_window_start(SelfForcingConfig(), 21, random)
    assert torch.equal(random.get_state(), state)  # where there is no choice nothing is drawn


def test_steps_draw_their_windows_and_say_where_they_start(teacher: Path):
    stage = build_self_forcing(teacher, **LONG)
    starts = [stage.train_step(step)["first_frame"] for step in range(24)]
    assert set(starts) == {0, 3, 6, 9, 12} and "first_frame" in stage.columns
    assert "first_frame" not in build_self_forcing(teacher).columns


@pytest.mark.parametrize(("first_frame", "sink_frames"), [(0, 0), (3, 0), (12, 0), (12, 3), (30, 0)])
def test_frames_before_the_window_are_those_of_inference_and_carry_no_gradient(
    monkeypatch, drawn_seeds, first_frame: int, sink_frames: int
):
    engine = build_engine(**LONG, sink_frames=sink_frames, finish_blocks=True)
    prompt, last, num_before = random_prompt(engine.generator, 2), len(engine.plan.times) - 1, first_frame // BLOCK
    passes: list[bool] = []
    made: list[Tensor] = []

    def recording_blocks(*arguments: object, **options: object) -> Iterator[Tensor]:
        for block in rollout_blocks(*arguments, **options):
            made.append(block)
            yield block

    monkeypatch.setattr(dynamic_video_sf, "rollout_blocks", recording_blocks)
    engine.generator.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    seen = set()
    for _ in range(6):
        passes.clear(), made.clear()
        rollout = engine.rollout(prompt, 9, with_gradient=True, first_frame=first_frame)
        assert sum(passes) == 3  # the exit steps of the window's three blocks
        assert len(made) == num_before + 3 and not any(block.requires_grad for block in made[:num_before])  # and nothing after it
        with torch.no_grad():
            expected = list(rollout_blocks(
                engine.generator, prompt, make_noise_streams(drawn_seeds[-1]), num_before + 3, engine.plan,
                exit_steps=[last] * num_before + rollout.exit_steps, finished=[],
            ))
        assert all(torch.equal(block, wanted) for block, wanted in zip(made[:num_before], expected, strict=False))
        torch.testing.assert_close(rollout.x_0, torch.cat(expected[num_before:], dim=1), atol=1e-5, rtol=1e-5)
        assert rollout.scored.shape == (2, 9, 1, 8, 8) and rollout.frame_exits.tolist() == [rollout.exit_steps[:1] * 9] * 2
        seen |= set(rollout.exit_steps)
    assert len(seen) > 1  # so a window that exits early does follow frames that do not


def test_a_window_after_a_switch_is_what_inference_shows_after_one(drawn_seeds):
    """Frames before it under the other prompt, then its own with the cache kept or recomputed: both come up."""
    engine = build_engine(**LONG, finish_blocks=True)
    text, other_text = random_text(engine.generator, 2), random_text(engine.generator, 2, seed=1)
    prompt, other = (engine.generator.encode_prompt(*each) for each in (text, other_text))

    def shown(how: str) -> Tensor:
        blocks = rollout_blocks(engine.generator, other, make_noise_streams(drawn_seeds[-1]), 5, engine.plan)
        next(blocks), next(blocks)
        return torch.cat([blocks.send(PromptSwitch(prompt, how)), *blocks], dim=1)

    seen = set()
    for _ in range(8):
        rollout = engine.make_videos(text, 9, with_gradient=True, first_frame=6, earlier_text=other_text)
        with torch.no_grad():
            found = {how for how in SWITCHES if torch.allclose(rollout.finished, shown(how), atol=1e-5)}
        assert len(found) == 1 and rollout.scored.requires_grad
        seen |= found
    assert seen == {"keep", "recache"}


def test_memory_does_not_grow_with_what_is_before(monkeypatch):
    """Of the blocks before the window only those are kept from which the cache could be recomputed."""
    living: list[int] = []

    def counting_blocks(*arguments: object, **options: object) -> Iterator[Tensor]:
        made: list[weakref.ref] = []
        for block in rollout_blocks(*arguments, **options):
            made.append(weakref.ref(block.untyped_storage()))
            living.append(sum(reference() is not None for reference in made))
            yield block
            del block

    monkeypatch.setattr(dynamic_video_sf, "rollout_blocks", counting_blocks)
    engine = build_engine(**LONG)
    prompt, sizes = random_prompt(engine.generator, 1), []
    new_cache = engine.generator.new_cache
    monkeypatch.setattr(engine.generator, "new_cache", lambda *window: sizes.append(new_cache(*window)) or sizes[-1])
    engine.rollout(prompt, 9, with_gradient=True, first_frame=60)
    (cache,) = sizes
    assert cache.num_frames == 66 and cache._end - cache._first <= 6
    assert max(living[:20]) <= 3 < len(living)
    for first_frame in (-3, 4):
        with pytest.raises(ValueError, match=f"first_frame is {first_frame}: expected 0 or more, a multiple of the block of 3"):
            engine.rollout(prompt, 9, with_gradient=False, first_frame=first_frame)


def test_as_long_as_the_video_it_is_ordinary_self_forcing_bit_for_bit(teacher: Path):
    stages = [build_self_forcing(teacher, **(LONG | {"rollout_frames": frames})) for frames in (None, 9, 12)]
    for step in range(6):
        plain, same, longer = (stage.train_step(step) for stage in stages)
        assert {**plain, "first_frame": 0} == same != longer
    plain, same, longer = (stage.state_dict() for stage in stages)
    assert_same(same, plain, "state")
    assert not torch.equal(longer["random_state"], plain["random_state"])


@pytest.mark.parametrize("gradient_frames", [9, 3])
def test_scores_of_a_later_window_are_asked_for_the_digit_alone(teacher: Path, monkeypatch, gradient_frames):
    """A caption's direction is that of a video's first frames; the generator is asked for all of it, as at inference."""
    stage = build_self_forcing(teacher, **(LONG | {"batch_size": 8, "gradient_frames": gradient_frames}))
    asked: list[list[str]] = []
    encode = stage.text_encoder.encode
    monkeypatch.setattr(stage.text_encoder, "encode", lambda prompts: asked.append(prompts) or encode(prompts))
    for first_frame in (0, 6):
        is_start = first_frame == 0 and gradient_frames == 9
        asked.clear()
        captions = stage.data.captions(0, range(stage.num_prompts_seen, stage.num_prompts_seen + 8))
        stage.train_on_window(3, 9, first_frame)
        facts = [[parse_caption(prompt) for prompt in prompts] for prompts in asked if any(prompts)]  # but for the null prompt
        assert asked[0] == captions and len(facts) == (1 if is_start else 2)
        assert [fact.digits for fact in facts[-1]] == [parse_caption(caption).digits for caption in captions]
        assert any(direction for fact in facts[0] for direction in fact.directions)
        assert is_start or not any(any(fact.directions) or any(fact.speeds) for fact in facts[-1])


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_switch_comes_from_the_prompt_of_the_next_video_of_which_the_critic_is_told(teacher: Path, monkeypatch, accumulation_steps):
    stage = build_self_forcing(teacher, **(LONG | {"batch_size": 4, "switch_probability": 1.0, "accumulation_steps": accumulation_steps}))
    engine = stage.engine
    for name in ("make_videos", "generator_loss", "critic_loss"):
        monkeypatch.setattr(engine, name, Mock(wraps=getattr(engine, name)))
    captions = stage.data.captions(0, range(4))
    stage.train_on_window(3, 9, 6, switches=True)
    encoded = stage.text_encoder.encode(captions)[0]
    before = encoded.roll(-1, 0)
    both = torch.cat([encoded, -before], dim=1)
    for loss, place, expected in (
        (engine.make_videos, 0, encoded), (engine.make_videos, -1, before), (engine.generator_loss, 1, encoded),
        (engine.generator_loss, -1, both), (engine.critic_loss, 1, both),
    ):
        torch.testing.assert_close(torch.cat([call.args[place][0] for call in loss.call_args_list]), expected)
    assert len(set(captions)) > 1 and engine.make_videos.call_count == accumulation_steps


@pytest.mark.slow
def test_flops_are_the_mean_over_all_starts_and_exit_steps(teacher: Path):
    short = {"denoising_steps": [1000, 500], "min_num_frames": 3, "max_num_frames": 3, "window_frames": 3, "dfake_gen_update_ratio": 1}
    config = self_forcing_config(teacher, **(short | {"rollout_frames": 15, "batch_size": 1}))
    stage = SelfForcingStage(run_config(config), compute.CPU, torch.Generator().manual_seed(1))
    seen: dict[tuple[int, int], int] = {}
    for start in window_starts(config, 3):
        while len([key for key in seen if key[0] == start]) < 2:
            flops, exit_step = compute._count_step(stage, 3, start)
            seen[start, exit_step] = flops
    assert len(seen) == 10 and len(set(seen.values())) == 10
    assert compute.flops_per_step(run_config(config)) == pytest.approx(sum(seen.values()) / 10, rel=1e-12)
