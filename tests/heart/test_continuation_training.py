"""Rollouts that go on from the first block of real videos: how often, from what, and where gradient flows."""

from pathlib import Path

import pytest
import torch
from helpers.networks import build_engine, random_prompt, random_text
from helpers.stages import build_self_forcing, run_config, self_forcing_config

import dynamic_video_sf
from dynamic_video_sf import make_noise_streams, rollout_blocks
from experiments.compute import flops_per_step

BLOCK, NUM_FRAMES = 3, 12


def real_videos(num_videos: int = 2, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    return torch.rand(num_videos, num_frames, 1, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.mark.parametrize("is_first_frame_alone", [False, True])
def test_what_is_given_comes_first_and_the_rest_is_what_inference_makes_of_it(is_first_frame_alone: bool, monkeypatch):
    lengths = {"min_num_frames": 10, "max_num_frames": 10} if is_first_frame_alone else {}
    engine, seeds = build_engine(independent_first_frame=is_first_frame_alone, finish_blocks=True, **lengths), []
    monkeypatch.setattr(dynamic_video_sf, "make_noise_streams", lambda drawn: seeds.append(drawn) or make_noise_streams(drawn))
    num_frames, first = (10, 1) if is_first_frame_alone else (NUM_FRAMES, BLOCK)
    given, prompt, seen = real_videos()[:, :first], random_prompt(engine.generator, 2), set()
    for _ in range(8):
        rollout = engine.rollout(prompt, num_frames, with_gradient=True, given=given)
        assert rollout.x_0.shape[1] == num_frames and torch.equal(rollout.x_0[:, :first], given)
        assert rollout.exit_steps == rollout.exit_steps[:1] * 3
        assert rollout.frame_exits.tolist() == [[-1] * first + rollout.exit_steps[:1] * 9] * 2
        with torch.no_grad():
            expected = torch.cat(list(rollout_blocks(
                engine.generator, prompt, make_noise_streams(seeds.pop()), 3, engine.plan, exit_steps=rollout.exit_steps,
                first_frames=given, finished=[],
            )), dim=1)
        torch.testing.assert_close(rollout.x_0[:, first:].detach(), expected, atol=1e-5, rtol=1e-5)
        seen |= set(rollout.exit_steps)
    assert len(seen) > 1


def test_exit_steps_of_their_own_stay_those_of_their_blocks(monkeypatch):
    engine, asked = build_engine(same_exit_step=False), []
    monkeypatch.setattr(
        dynamic_video_sf, "rollout_blocks", lambda *args, **options: asked.append(options) or rollout_blocks(*args, **options)
    )
    prompt = random_prompt(engine.generator, 2)
    while True:
        rollout = engine.rollout(prompt, NUM_FRAMES, with_gradient=True, given=real_videos()[:, :BLOCK])
        if len(set(rollout.exit_steps)) > 2:
            break
    assert asked[-1]["exit_steps"] == rollout.exit_steps
    assert rollout.frame_exits[0].tolist() == [-1] * BLOCK + [exit_step for exit_step in rollout.exit_steps for _ in range(BLOCK)]


@pytest.mark.parametrize(("gradient_frames", "blocks_with_gradient"), [(21, 3), (9, 3), (6, 2), (3, 1)])
def test_gradient_flows_in_the_last_frames_that_were_made(gradient_frames: int, blocks_with_gradient: int):
    engine, passes = build_engine(gradient_frames=gradient_frames), []
    engine.generator.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    rollout = engine.rollout(random_prompt(engine.generator, 2), NUM_FRAMES, with_gradient=True, given=real_videos()[:, :BLOCK])
    assert sum(passes) == blocks_with_gradient and rollout.scored.requires_grad
    assert torch.equal(rollout.scored, rollout.x_0[:, -min(gradient_frames, NUM_FRAMES):])


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.3, 60 - 33, 60 + 33), (1.0, 200, 200)])
def test_as_many_go_on_as_asked(probability: float, low: int, high: int, monkeypatch):
    """200 times; five standard deviations around 60."""
    engine, givens = build_engine(continuation_probability=probability), []
    if probability:
        with pytest.raises(ValueError, match=f"training.continuation_probability={probability} needs real videos: none were given"):
            engine.make_videos(random_text(engine.generator, 2), NUM_FRAMES, False)
    monkeypatch.setattr(engine, "rollout", lambda *args, given=None, **options: givens.append(given))
    x_real = real_videos()
    state = engine.random.generator.get_state()
    for _ in range(200):
        engine.make_videos(random_text(engine.generator, 2), NUM_FRAMES, False, x_real)
    going_on = [given for given in givens if given is not None]
    assert low <= len(going_on) <= high and all(torch.equal(given, x_real[:, :BLOCK]) for given in going_on)
    assert torch.equal(engine.random.generator.get_state(), state) == (probability == 0)  # 0 draws as if the option were not there


def test_a_step_goes_on_from_the_videos_of_its_own_prompts(teacher: Path, monkeypatch):
    stage = build_self_forcing(teacher, continuation_probability=1.0, min_num_frames=6, max_num_frames=6)
    assert stage.config.uses_videos and "go on from a real block, on real videos" in stage.config.summary
    criticised = []
    critic_loss = stage.engine.critic_loss
    monkeypatch.setattr(stage.engine, "critic_loss", lambda x_0, *args: criticised.append(x_0) or critic_loss(x_0, *args))
    for step in range(2):
        figures = stage.train_step(step)
        indices = range(step * stage.config.batch_size, (step + 1) * stage.config.batch_size)
        real = stage.data.sample(stage.seed, indices, figures["num_frames"])
        assert torch.equal(criticised[-1][:, :BLOCK], real.video[:, :BLOCK])
        assert not torch.equal(criticised[-1][:, BLOCK:], real.video[:, BLOCK:])


@pytest.mark.parametrize(("given", "first_frame", "num_frames"), [(6, 0, 12), (3, 3, 12), (1, 0, 12), (3, 0, 3)])
def test_what_is_no_first_block_is_not_gone_on_from(given: int, first_frame: int, num_frames: int):
    engine = build_engine()
    with pytest.raises(ValueError, match=f"^{given} frames given: expected a first block of 3, first_frame 0 and a block behind it"):
        engine.rollout(
            random_prompt(engine.generator, 2), num_frames, with_gradient=False, first_frame=first_frame, given=real_videos()[:, :given]
        )


@pytest.mark.slow
def test_flops_are_those_of_both_kinds_of_steps_in_their_shares(teacher: Path):
    short = {"denoising_steps": [1000, 500], "min_num_frames": 6, "max_num_frames": 6}
    never, always, some = (
        flops_per_step(run_config(self_forcing_config(teacher, **short, continuation_probability=probability)))
        for probability in (0.0, 1.0, 0.3)
    )
    assert always < never and some == pytest.approx(0.7 * never + 0.3 * always, rel=1e-12)
