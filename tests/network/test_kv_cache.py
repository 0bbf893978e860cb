"""The rolling cache: window, sink, positions for ever, gradient, and the same past under the mask and in a rollout."""

import dataclasses
import itertools

import pytest
import torch
from helpers.networks import build_small_model, random_prompt, random_video
from torch import Tensor

from dynamic_video_sf import make_noise_streams, rollout_blocks
from method.plans import few_step_plan
from network.attention import ContextWindow
from network.kv_cache import KVCache
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training.config import SelfForcingConfig

NUM_FRAMES = 27


def run_cached(model: TinyCausalWanModel, x_t: Tensor, t: Tensor, prompt: PromptContext, sizes: list[int], cache: KVCache) -> Tensor:
    """The video block by block, each block written to the cache as it came in."""
    parts = []
    for x, time in zip(x_t.split(sizes, 1), t.split(sizes, 1), strict=True):
        parts.append(model.forward_cached(x, time, prompt, cache))
        model.write_cache(x, time, prompt, cache)
    return torch.cat(parts, dim=1)


def assert_same_x_0(actual: Tensor, expected: Tensor, t: Tensor, tolerance: float = 1e-5) -> None:
    """Two velocities that stand for the same x_0."""
    assert (t[..., None, None, None] * (actual - expected)).abs().max() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize(("block", "window", "sink", "first_alone", "batch", "patch_size", "channels"), [
    *((*case, False, 2, [1, 4, 4], 1) for case in (*itertools.product((1, 3), (None, 3, 6, 9, 21), (0,)), (3, 8, 2), (1, 2, 1))),
    *((*case, False, 2, [1, 4, 4], 1) for case in itertools.product((1, 3), (None, 6, 9, 21), (1, 3))),
    *((3, *case, True, 2, [1, 4, 4], 1) for case in ((None, 0), (6, 0), (9, 1), (9, 3))),
    *((3, window, 0, False, 1, patch, 3) for window in (None, 3, 6) for patch in ([3, 4, 4], [1, 2, 4])),
    (3, 9, 0, False, 3, [3, 8, 8], 1), (6, 6, 0, False, 1, [2, 4, 2], 1), (6, None, 0, False, 2, [2, 4, 4], 1),
    (3, 3, 0, False, 3, [1, 8, 8], 3),
])
def test_cached_blocks_equal_the_full_pass_under_the_mask(block, window, sink, first_alone, batch, patch_size, channels):
    sizes = [1] * first_alone + [block] * ((NUM_FRAMES - first_alone) // block)
    model, num_frames = build_small_model(patch_size=patch_size, channels=channels), sum(sizes)
    (x_t, t), prompt = random_video(model, batch, num_frames), random_prompt(model, batch)

    def under_mask(window: int | None, sink: int = 0) -> Tensor:
        return model.forward_block_causal(x_t, t, prompt, block, ContextWindow(window, sink, independent_first_frame=first_alone))

    cached, masked = run_cached(model, x_t, t, prompt, sizes, model.new_cache(window, sink)), under_mask(window, sink)
    assert_same_x_0(cached, masked, t)
    assert window is not None and window <= block or (masked - under_mask(block))[:, block:].abs().max() > 1e-3  # the past matters
    if window is not None and sink:
        by_sink, last_unrolled = masked - under_mask(window), max(end for end in itertools.accumulate(sizes) if end <= window)
        assert by_sink[:, window:].abs().max() > 1e-3 and by_sink[:, :last_unrolled].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("block", "window", "sink", "first_alone"), [
    *((block, window, sink, False) for block, window, sink in itertools.product((1, 3), (None, 3, 6, 9, 21), (0, 1, 3))
      if window is None or sink <= window - block), (3, 8, 2, False), (1, 2, 1, False), (3, 4, 0, True), (3, 6, 0, True),
])
def test_a_joined_pass_is_the_cache_pass_and_then_the_first_step(small_model, block, window, sink, first_alone):
    """60 frames, so that the window moves back several times: as both ways one after the other, and reading writes nothing."""
    sizes = [1] * first_alone + [block] * (60 // block)
    videos = *random_video(small_model, 2, sum(sizes)), random_video(small_model, 2, sum(sizes))[0]
    prompt, apart, joined, num_passes = random_prompt(small_model, 2), *(small_model.new_cache(window, sink) for _ in range(2)), []
    small_model.head.register_forward_hook(lambda *_: num_passes.append(1))
    finished = None
    for x_t, t, x_0 in zip(*(video.split(sizes, 1) for video in videos), strict=True):
        expected, zero = small_model.forward_cached(x_t, t, prompt, apart), torch.zeros_like(t)
        num_passes.clear()
        if finished is None:
            found = small_model.forward_cached(x_t, t, prompt, joined)
        else:
            found = small_model.write_and_forward(*finished, x_t, t, prompt, joined)
        assert len(num_passes) == 1 or (sink and joined.num_frames + block > window)  # two where the sink has to move between them
        assert_same_x_0(found, expected, t)
        assert_same_x_0(small_model.forward_cached(x_t, t, prompt, joined), expected, t)  # a second step sees the same past
        small_model.write_cache(x_0, zero, prompt, apart)
        assert joined.num_frames == apart.num_frames - x_0.shape[1]
        finished = x_0, zero


@torch.no_grad()
@pytest.mark.parametrize(("block", "window", "sink"), [
    (1, None, 0), (3, None, 0), (1, 3, 0), (3, 3, 0), (3, 9, 3), (3, 6, 1), (1, 6, 3), (3, 8, 0), (3, 6, 3),
])
def test_a_block_is_what_a_short_video_of_its_visible_frames_makes_of_it(block, window, sink):
    """An oracle without cache or mask. One layer: keys of the past depend on the past frame alone."""
    model = build_small_model(num_layers=1)
    x_t, t = random_video(model, 2, NUM_FRAMES)
    prompt = random_prompt(model, 2)
    masked = model.forward_block_causal(x_t, t, prompt, block, ContextWindow(window, sink))
    for end in range(block, NUM_FRAMES + 1, block):
        first = 0 if window is None else max(end - (window - sink if end > window else window), 0)
        visible = sorted({*range(min(sink, end)), *range(first, end)})
        assert window is None or len(visible) <= window
        alone = model.forward_bidirectional(x_t[:, visible], t[:, visible], prompt)[:, -block:]
        assert_same_x_0(masked[:, end - block: end], alone, t[:, end - block: end])


@torch.no_grad()
@pytest.mark.parametrize(("block", "window", "sink", "hide", "first_alone", "patch_size"), [
    (1, None, 0, False, False, [1, 4, 4]), (3, 6, 0, False, False, [1, 4, 4]), (1, 4, 0, False, False, [1, 4, 4]),
    (3, 9, 0, False, False, [3, 4, 4]), (3, 9, 3, False, False, [1, 4, 4]), (1, 6, 1, False, False, [1, 4, 4]),
    (3, None, 0, True, False, [1, 4, 4]), (3, 9, 0, True, False, [1, 4, 4]), (3, None, 0, False, True, [1, 4, 4]),
])
def test_teacher_forcing_equals_decoding_on_a_cache_of_the_clean_blocks(block, window, sink, hide, first_alone, patch_size):
    model, context = build_small_model(patch_size=patch_size), ContextWindow(window, sink, hide, first_alone)
    num_frames = 16 if first_alone else 15
    sizes = context.block_sizes(num_frames, block)
    (x_t, t), (x_clean, _) = random_video(model, 2, num_frames), random_video(model, 2, num_frames, seed=1)
    prompt, cache, parts = random_prompt(model, 2), model.new_cache(window, sink), []
    for x, time, clean in zip(x_t.split(sizes, 1), t.split(sizes, 1), x_clean.split(sizes, 1), strict=True):
        if hide and len(parts) == len(sizes) - 1:
            cache.forget_first(block)
        parts.append(model.forward_cached(x, time, prompt, cache))
        model.write_cache(clean, torch.zeros_like(time), prompt, cache)
    forced = model.forward_teacher_forced(x_t, t, x_clean, prompt, block, context)
    assert_same_x_0(forced, torch.cat(parts, dim=1), t)
    assert (forced - model.forward_block_causal(x_t, t, prompt, block, context))[:, block:].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("hides", [False, True])
def test_the_last_block_of_training_does_not_see_the_first(hides, monkeypatch):
    model = build_small_model(num_layers=1)
    prompt = random_prompt(model, 2)
    plan = dataclasses.replace(few_step_plan(SelfForcingConfig()), context=ContextWindow(hide_first_block=hides))

    forgotten: list[tuple[int, int]] = []
    monkeypatch.setattr(KVCache, "forget_first", lambda cache, num_frames: forgotten.append((cache.num_frames, num_frames)))
    list(rollout_blocks(model, prompt, make_noise_streams([1, 2]), 3, plan))
    assert forgotten == ([(6, 3)] if hides else [])
    x_t, t = random_video(model, 2, 9)
    masked, plain = (model.forward_block_causal(x_t, t, prompt, 3, ContextWindow(hide_first_block=hide)) for hide in (True, False))
    assert torch.equal(masked[:, :6], plain[:, :6]) and (masked - plain)[:, 6:].abs().max() > 1e-3
    alone = model.forward_block_causal(x_t[:, 3:], t[:, 3:], prompt, 3)
    assert_same_x_0(masked[:, 6:], alone[:, 3:], t[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(9, 0), (9, 3), (7, 1)])
def test_frame_one_million_equals_frame_one_hundred(small_model, window, sink):
    """The same context gives the same block, however far the stream has come: only the last frames and the sink count."""
    model = build_small_model(num_layers=1)  # deeper keys would remember what has left the window
    x_t, t = random_video(model, 1, 15)
    prompt, blocks = random_prompt(model, 1), [*zip(x_t.split(3, 1), t.split(3, 1), strict=True)]
    outputs = []
    for num_between in (0, 1, 5, 100):
        cache = model.new_cache(window, sink)
        for x, time in [blocks[0], *[blocks[1]] * num_between, *blocks[1:4]]:
            model.write_cache(x, time, prompt, cache)
        cache.num_frames += 1_000_000 * num_between  # the count of frames is not a position
        outputs.append(model.forward_cached(*blocks[4], prompt, cache))
        assert cache.next_row <= 2 * window
    for output in outputs[1:]:
        assert_same_x_0(output, outputs[0], blocks[4][1])


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(6, 0), (9, 3), (21, 3)])
def test_memory_is_constant_and_rows_move_rarely(small_model, window, sink):
    cache, prompt = small_model.new_cache(window, sink), random_prompt(small_model, 1)
    x_t, t = random_video(small_model, 1, 3)
    moves: list[int] = []
    move_back = cache._move_back
    cache._move_back = lambda: (moves.append(cache.num_frames), move_back())
    sizes = set()
    for block in range(120):
        small_model.write_cache(x_t, t, prompt, cache)
        if 3 * block > 2 * window:
            sizes.add((cache._keys.data_ptr(), cache._keys.shape, cache._values.data_ptr()))
    assert len(sizes) == 1 and cache._capacity == 2 * window  # written in place
    assert all(later - earlier >= window - 3 for earlier, later in itertools.pairwise(moves)) and len(moves) > 5
    assert cache._end - cache._first == window  # rows of one frame


@pytest.mark.parametrize(("context", "message"), [
    (ContextWindow(2), r"window_frames is 2: a block counts itself, so expected at least num_frames_per_block=3"),
    (ContextWindow(9, 7), r"sink_frames is 7: expected 0 to 6, window_frames=9 less a block of 3; a sink is part of the window"),
    (ContextWindow(9, 3, hide_first_block=True), r"sink_frames is 3: expected 0 where the first block is hidden"),
])
def test_windows_that_do_not_fit_are_refused(small_model, context, message):
    x_t, t = random_video(small_model, 1, 6)
    with pytest.raises(ValueError, match=message):
        small_model.forward_block_causal(x_t, t, random_prompt(small_model, 1), 3, context)
    with pytest.raises(ValueError, match="training." + message):
        SelfForcingConfig(window_frames=context.window_frames, sink_frames=context.sink_frames, hide_first_chunk=context.hide_first_block)


def test_the_cache_carries_no_gradient(small_model):
    x_t, t = random_video(small_model, 2, 6)
    x_t.requires_grad_()
    prompt, cache, records = random_prompt(small_model, 2), small_model.new_cache(), []
    hook = small_model.head.register_forward_hook(lambda module, inputs, output: records.append(output.requires_grad))
    small_model.write_cache(x_t[:, :3], t[:, :3], prompt, cache)
    hook.remove()
    assert records == [False]  # writing builds no graph, which would cost memory
    v = small_model.forward_cached(x_t[:, 3:], t[:, 3:], prompt, cache)
    (gradient,) = torch.autograd.grad(v.square().sum(), x_t)
    assert not gradient[:, :3].any() and gradient[:, 3:].any(dim=(0, 2, 3, 4)).all()
