"""Endless streams, switches of the prompt, given first frames, and independence of the batch."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.generation import generate_files, refusal
from helpers.networks import build_engine, build_small_model, random_prompt, random_video
from helpers.stages import CPU
from torch import Tensor

from clips.video_files import load_array
from dynamic_video_sf import draw_noise, make_noise_streams, split_first_frames
from method.plans import RolloutPlan, few_step_plan, many_step_plan
from network.attention import ContextWindow
from network.text_encoder import NULL_PROMPT
from sampling.samplers import sample_few_step
from sampling.streaming import PromptSchedule, stream_video
from sampling.video_io import save_array, save_video
from training.config import SelfForcingConfig

TWO_STEPS = SelfForcingConfig(denoising_steps=[1000, 500])
PLAN = few_step_plan(TWO_STEPS, ContextWindow(9, 3))
OLD, NEW = "a 7 drifting up", "the digit 3 moving left quickly"
NOISE_SHAPE = (3, 1, 8, 8)  # of a block


def take(model, text_encoder, sends: list[list[str] | None], prompts=(OLD,), seeds=(0,), plan=PLAN, **options) -> list[Tensor]:
    """As many blocks as there are sends, of which the first must be None."""
    stream = stream_video(model, text_encoder, list(prompts), list(seeds), plan, CPU, **options)
    return [stream.send(sent) for sent in sends]


def denoised(model, plan: RolloutPlan, streams, prompts, caches) -> Tensor:
    """The oracle: one block, denoised behind the caches of a prompt and, under guidance, of the null prompt."""
    x = draw_noise(streams, NOISE_SHAPE, CPU.device)
    for time, later in zip(plan.times, (*plan.times[1:], 0.0), strict=True):
        t = torch.full((1, 3), time)
        v, *uncond = (model.forward_cached(x, t, prompt, cache) for prompt, cache in zip(prompts, caches, strict=True))
        if uncond:
            v = uncond[0] + plan.guidance * (v - uncond[0])
        if plan.fresh_noise:
            x_0 = (x - time * v).clamp(-1, 1)
            x = x_0 if later == 0 else (1 - later) * x_0 + later * draw_noise(streams, NOISE_SHAPE, CPU.device)
        else:
            x = x + (later - time) * v
    return x


def write(model, x: Tensor, prompts, caches) -> None:
    for prompt, cache in zip(prompts, caches, strict=True):
        model.write_cache(x, torch.zeros(x.shape[:2]), prompt, cache)


def test_a_stream_begins_as_the_video_of_its_prompt_and_continues(small_model, small_text_encoder):
    video = sample_few_step(small_model, small_text_encoder, [OLD], [0], 21, PLAN, CPU)
    blocks = take(small_model, small_text_encoder, [None] * 12)
    assert torch.equal(torch.cat(blocks[:7], dim=1), video)
    assert not blocks[-1].requires_grad and torch.is_grad_enabled() and blocks[-1].isfinite().all()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("how", ["recache", "keep", "reset"])
def test_what_becomes_of_the_cache_at_a_switch(small_model, small_text_encoder, how, guidance):
    """Under guidance the caches of the prompt and of the null prompt are each treated as without it."""
    plan = many_step_plan(2, 3.0, 3, guidance, ContextWindow(9, 3))
    blocks = take(small_model, small_text_encoder, [None] * 5 + [[NEW], None], plan=plan, switch=how)
    plain = take(small_model, small_text_encoder, [None] * 6, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(blocks[:5], plain[:5], strict=True)) and (blocks[5] - plain[5]).abs().max() > 1e-3
    old, new, null = (small_model.encode_prompt(*small_text_encoder.encode([text])) for text in (OLD, NEW, NULL_PROMPT))
    caches = [small_model.new_cache(9, 3) for _ in range(2)]
    streams = make_noise_streams([0])
    for _ in range(5):  # one noise for each block
        draw_noise(streams, NOISE_SHAPE, CPU.device)
    with torch.no_grad():
        for block in {"recache": [0, 4], "keep": range(5), "reset": []}[how]:  # the sink, and what the next block sees
            write(small_model, blocks[block], (new if how == "recache" else old, null), caches)
        for block in (5, 6):
            x_0 = denoised(small_model, plan, streams, (new, null), caches)
            torch.testing.assert_close(blocks[block], x_0, rtol=1e-3, atol=1e-3)
            write(small_model, x_0, (new, null), caches)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("first_picture", [False, True])
@pytest.mark.parametrize("window", [None, 15])
@pytest.mark.parametrize("sink", [0, 1, 2, 3, 4])
def test_recaching_the_same_prompt_changes_nothing_before_a_frame_has_left(
    small_model, small_text_encoder, sink, window, first_picture, guidance
):
    """Also where the sink ends inside a block, whose frames must still see each other."""
    context = ContextWindow(window, sink, independent_first_frame=first_picture)
    plan = many_step_plan(2, 3.0, 3, guidance, context)
    plain = take(small_model, small_text_encoder, [None] * 4, plan=plan)
    again = take(small_model, small_text_encoder, [None, None, [OLD], None], plan=plan)
    torch.testing.assert_close(torch.cat(again, 1), torch.cat(plain, 1), rtol=0, atol=1e-5)


def test_frames_of_the_sinks_last_block_that_have_left_are_not_seen_when_the_cache_is_made_again(small_model, small_text_encoder):
    """Blocks of 3, a sink of 1, a window of 7: the sixth block sees frame 0 and the frames 12 to 14."""
    plan = few_step_plan(TWO_STEPS, ContextWindow(7, 1))
    blocks = take(small_model, small_text_encoder, [None] * 5 + [[NEW]], plan=plan)
    prompt = small_model.encode_prompt(*small_text_encoder.encode([NEW]))
    cache, streams = small_model.new_cache(7, 1), make_noise_streams([0])
    for _ in range(10):  # two passes for each block
        draw_noise(streams, NOISE_SHAPE, CPU.device)
    with torch.no_grad():
        write(small_model, blocks[0], [prompt], [cache])
        cache.forget_behind_sink(2)
        write(small_model, blocks[4], [prompt], [cache])
        x_0 = denoised(small_model, plan, streams, [prompt], [cache])
    torch.testing.assert_close(blocks[5], x_0, rtol=0, atol=1e-5)


def test_a_video_does_not_depend_on_who_shares_its_batch(small_model, small_text_encoder):
    """Prompts of different lengths, different seeds, a switch, and a window that has rolled."""
    prompts, new, seeds = [OLD, "a 7", NEW + " and the number two slowly"], ["a 3", NEW, OLD], [5, 9, 5]
    sends = [None] * 5 + [new] + [None] * 2
    together = torch.cat(take(small_model, small_text_encoder, sends, prompts, seeds), dim=1)
    for video in range(3):
        alone = [None if sent is None else [sent[video]] for sent in sends]
        single = torch.cat(take(small_model, small_text_encoder, alone, [prompts[video]], [seeds[video]]), dim=1)
        torch.testing.assert_close(together[video], single[0], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-2  # one seed, two prompts


# Given first frames


@pytest.mark.parametrize(("num_given", "context"), [
    (3, ContextWindow(9, 3)), (6, ContextWindow(None)), (1, ContextWindow(9)), (12, ContextWindow(9, 1)),
])
def test_a_continuation_is_the_rollout_behind_the_given_frames(small_model, small_text_encoder, num_given, context):
    plan = few_step_plan(TWO_STEPS, context)
    given = random_video(small_model, 1, num_given)[0].clamp(-1, 1)
    video = sample_few_step(small_model, small_text_encoder, [OLD], [0], num_given + 6, plan, CPU, first_frames=given)
    assert video.shape[1] == num_given + 6 and torch.equal(video[:, :num_given], given)
    other = sample_few_step(small_model, small_text_encoder, [OLD], [0], num_given + 6, plan, CPU, first_frames=-given)
    assert (other - video)[:, num_given:].abs().max() > 1e-3
    cache = small_model.new_cache(context.window_frames, context.sink_frames)
    prompt = small_model.encode_prompt(*small_text_encoder.encode([OLD]))
    with torch.no_grad():
        for block in split_first_frames(given, plan):
            write(small_model, block, [prompt], [cache])
        x_0 = denoised(small_model, plan, make_noise_streams([0]), [prompt], [cache])
    torch.testing.assert_close(video[:, num_given : num_given + 3], x_0, rtol=1e-4, atol=1e-4)


def test_a_model_with_an_independent_first_frame_makes_and_trains_on_such_videos():
    lengths = {"min_num_frames": 7, "max_num_frames": 7, "gradient_frames": 3, "window_frames": 6, "sink_frames": 1}
    engine = build_engine(independent_first_frame=True, **lengths)
    rollout = engine.rollout(random_prompt(engine.generator, 2), 7, with_gradient=True)
    assert rollout.x_0.shape[1] == 7 and rollout.scored.shape[1] == rollout.frame_exits.shape[1] == 3
    gradient = torch.autograd.grad(rollout.x_0[:, :4].sum(), engine.generator.head.weight, retain_graph=True)[0]
    assert not gradient.any() and torch.autograd.grad(rollout.scored.sum(), engine.generator.head.weight)[0].any()
    with pytest.raises(ValueError, match="min_num_frames is 21: expected one frame and .*independent_first_frame is true.*: 19 or 22"):
        SelfForcingConfig(independent_first_frame=True)


def test_generation_continues_a_file_and_changes_its_prompt(student_path: Path, tmp_path: Path):
    clip = random_video(build_small_model(), 1, 3)[0][0].clamp(-1, 1)
    save_array(tmp_path / "clip.npz", clip, "")
    generate_files(student_path, tmp_path / "out", "--schedule", "0: a 7", "6: a 3", "--switch", "keep", "--init",
                   str(tmp_path / "clip.npz"), "--num_frames", "9", "--format", "npz", "--window_frames", "6", "--sink_frames", "3")
    (path,) = (tmp_path / "out").glob("*.npz")
    video, prompt = load_array(path)
    assert torch.equal(video[:3], clip) and len(video) == 9 and prompt == "a 7 | 6: a 3"
    assert '"switch": "keep"' in (tmp_path / "out" / "generation.json").read_text()


def test_a_schedule_recaches_unless_told_otherwise(student_path: Path, tmp_path: Path):
    for name, wish in (("default", []), ("recache", ["--switch", "recache"]), ("keep", ["--switch", "keep"])):
        generate_files(student_path, tmp_path / name, "--schedule", "0: a 7", "3: a 3", *wish, "--num_frames", "6", "--format", "npz")
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("default", "recache", "keep")}
    assert files["default"] == files["recache"] and '"switch": "recache"' in files["default"]["generation.json"].decode()
    assert any(files["keep"][name] != content for name, content in files["recache"].items() if name.endswith(".npz"))


# Bad input


@pytest.mark.parametrize(("num_frames", "side", "message"), [
    (2, 8, r"2 frames to go on from: expected 1, or as many as blocks of 3 make up, such as 3, 6, 9"),
    (3, 12, r"frames of 12 x 12 pixels: expected 8 x 8, or a whole multiple"),
])
def test_given_frames_of_another_count_or_size_are_refused(student_path: Path, tmp_path: Path, num_frames: int, side: int, message: str):
    save_video(tmp_path / "clip.gif", torch.rand(num_frames, 1, side, side), scale=1)
    assert re.search(message, refusal("--checkpoint", str(student_path), "--init", str(tmp_path / "clip.gif")))


def test_what_training_hides_generation_shows(small_model, small_text_encoder):
    """The last block of a video is made as that block of a longer one, whatever the training hid from it."""
    hiding, plain = few_step_plan(replace(TWO_STEPS, hide_first_chunk=True)), few_step_plan(TWO_STEPS)
    video, wanted = (sample_few_step(small_model, small_text_encoder, [OLD], [0], 9, plan, CPU) for plan in (hiding, plain))
    assert torch.equal(video, wanted)
    longer = sample_few_step(small_model, small_text_encoder, [OLD], [0], 12, hiding, CPU)
    assert torch.equal(longer[:, :9], video)


def test_schedules_say_what_holds_when():
    schedule = PromptSchedule.parse(["0: a 3: slowly", " 42 :a 7", "45:"])
    assert schedule.entries == ((0, "a 3: slowly"), (42, "a 7"), (45, ""))
    for frame in (1, 3):
        with pytest.raises(ValueError, match=f"at frame {frame}, but the first frame that is made is 3: give 'a 3' as the first prompt"):
            PromptSchedule.parse(["0: a 7", f"{frame}: a 3"]).check([3, 6, 9])
