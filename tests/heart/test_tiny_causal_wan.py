"""The network: cache against mask, causality, window, gradient boundaries, patches, RoPE, times, prompts, refusals."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import SMALL_SIZES, build_small_model, random_prompt, random_video
from torch import Tensor

from machine.runtime import require_compiler
from method.flow_matching import velocity_from_x_0, x_0_from_velocity
from network.attention import ContextWindow, apply_rope, attention, rope_angles
from network.int8_products import Int8Linear
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel

NUM_FRAMES = 12


def changed_frames(before: Tensor, after: Tensor) -> list[int]:
    """The frames in which two videos differ in any bit."""
    return (before != after).any(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()


def perturbed(x: Tensor, frame: int) -> Tensor:
    """The video with one frame moved."""
    x = x.clone()
    x[:, frame] += 1
    return x


@torch.no_grad()
def test_the_past_does_not_see_the_future_and_the_bidirectional_network_does(small_model):
    (x_t, t), prompt = random_video(small_model, 2, NUM_FRAMES), random_prompt(small_model, 2)
    before = small_model.forward_bidirectional(x_t, t, prompt)
    after = small_model.forward_bidirectional(perturbed(x_t, NUM_FRAMES - 1), t, prompt)
    assert changed_frames(before, after) == list(range(NUM_FRAMES))
    for block in (1, 3):
        before = small_model.forward_block_causal(x_t, t, prompt, block)
        for first in range(0, NUM_FRAMES, block):
            after = small_model.forward_block_causal(perturbed(x_t, first + block - 1), t, prompt, block)
            assert changed_frames(before, after) == list(range(first, NUM_FRAMES))


@pytest.mark.parametrize(("patch_size", "channels"), [([1, 4, 4], 1), ([1, 2, 4], 1), ([3, 2, 4], 1), ([2, 4, 2], 3), ([1, 8, 8], 3)])
def test_patchify_and_unpatchify_have_one_order_of_values(patch_size, channels):
    patch_values = channels * patch_size[0] * patch_size[1] * patch_size[2]
    model = build_small_model(width=patch_values, num_heads=1, num_layers=1, patch_size=patch_size, channels=channels)
    with torch.no_grad():
        model.patch_embedding.weight.copy_(torch.eye(patch_values).view_as(model.patch_embedding.weight))
        model.patch_embedding.bias.zero_()
        video, _ = random_video(model, 2, 6)
        tokens = model.patchify(video)
        assert tokens.shape == (2, 6 // patch_size[0], model.config.tokens_per_patch_row, patch_values)
        torch.testing.assert_close(model.unpatchify(tokens), video, rtol=0, atol=0)


@torch.no_grad()
def test_each_frame_is_modulated_by_its_own_time():
    model = build_small_model(num_layers=1)
    model.blocks[0].o.weight.zero_()  # no attention between frames: what is left is a function of the frame and its time
    model.blocks[0].o.bias.zero_()
    x_t, t = random_video(model, 2, 6)
    prompt = random_prompt(model, 2)
    before = model.forward_bidirectional(x_t, t, prompt)
    other = t.clone()
    other[:, 4] = 1.1 - other[:, 4]
    after = model.forward_bidirectional(x_t, other, prompt)
    assert changed_frames(before, after) == [4]
    guess_before, guess_after = x_0_from_velocity(x_t, before, t), x_0_from_velocity(x_t, after, other)
    assert (guess_before - guess_after)[:, 4].abs().max() > 1e-3


def test_inputs_that_do_not_fit_are_refused():
    model = build_small_model(patch_size=[3, 4, 4])
    (x_t, t), prompt, splits = random_video(model, 2, 6), random_prompt(model, 2), "expected a positive multiple of the temporal patch 3"
    shapes = [(2, 6, 3, 8, 8), (2, 6, 1, 8, 4), (2, 6, 1, 16, 16), (6, 1, 8, 8)]
    for refused, message in (
        *((partial(model.forward_bidirectional, torch.zeros(shape), torch.ones(shape[:2]), prompt), r"expected \(B, F, 1, 8, 8\) with F a "
           "multiple of the temporal patch 3") for shape in [*shapes, (2, 5, 1, 8, 8)]),
        (lambda: model.forward_bidirectional(x_t, t[:, :1], prompt), r"expected one time per frame, \(2, 6\)"),
        (lambda: model.forward_bidirectional(x_t, t, random_prompt(model, 1)), "1 prompts for 2 videos"),
        (lambda: model.forward_block_causal(x_t, t, prompt, 2), f"a block of 2 frames: {splits}"),
        (lambda: model.forward_block_causal(x_t, t, prompt, 9), "6 frames: expected a multiple of the block of 9"),
        (lambda: model.forward_block_causal(x_t, t, prompt, 3, ContextWindow(4)), f"a window of 4 frames: {splits}"),
        (lambda: model.forward_cached(x_t[:, :4], t[:, :4], prompt, model.new_cache()), f"a block of 4 frames: {splits}"),
        (lambda: model.forward_cached(x_t, t, prompt, model.new_cache(3)), "a block of 6 frames: expected at most the cache's window of 3"),
        (lambda: model.write_and_forward(x_t, t, x_t[:, :4], t[:, :4], prompt, model.new_cache()), f"a block of 4 frames: {splits}"),
        (lambda: model.forward_teacher_forced(x_t, t, x_t[:, :3], prompt, 3),
         r"clean video of shape \(2, 3, 1, 8, 8\): expected that of the noisy one, \(2, 6, 1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_tables_first_made_in_inference_mode_serve_training():
    model = build_small_model(seed=3, rope_theta=77.0)  # sizes of its own, so that no table is kept yet
    x_t, t = random_video(model, 1, 6)
    with torch.inference_mode():
        model.forward_block_causal(x_t, t, random_prompt(model, 1), 3)
    model.forward_block_causal(x_t, t, random_prompt(model, 1), 3).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_prompt_changes_its_own_video_and_no_other_by_cross_attention_and_by_its_mean(small_model):
    x_t, t = random_video(small_model, 3, 6)
    ours, theirs = random_prompt(small_model, 3, seed=0), random_prompt(small_model, 3, seed=1)
    together = small_model.forward_bidirectional(x_t, t, ours)
    by_attention = PromptContext(theirs.keys, theirs.values, theirs.mask, ours.pooled)
    by_mean = PromptContext(ours.keys, ours.values, ours.mask, theirs.pooled)
    for other in (theirs, by_attention, by_mean):
        assert (together - small_model.forward_bidirectional(x_t, t, other)).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
    for i in range(3):
        alone = PromptContext([k[i:i + 1] for k in ours.keys], [v[i:i + 1] for v in ours.values], ours.mask[i:i + 1], ours.pooled[i:i + 1])
        single = small_model.forward_bidirectional(x_t[i:i + 1], t[i:i + 1], alone)
        torch.testing.assert_close(single, together[i:i + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_does_not_matter(small_model):
    x_t, t = random_video(small_model, 2, 3)
    text = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    before = small_model.forward_bidirectional(x_t, t, small_model.encode_prompt(text, mask))
    longer = F.pad(text, (0, 0, 0, 3), value=9.0), F.pad(mask, (0, 3))
    for padded in ((torch.where(mask[..., None], text, 50.0), mask), (torch.where(mask[..., None], text, 0.0), mask), longer):
        after = small_model.forward_bidirectional(x_t, t, small_model.encode_prompt(*padded))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def rope_scores(vector: Tensor, query_row: int, key_row: int) -> Tensor:
    """Scores (S, S) of one vector (d) as every query and every key of a 3 x 2 x 4 grid that starts at the given rows."""
    x = vector.expand(1, 1, 3 * 2 * 4, -1)
    q, k = (
        apply_rope(x, *rope_angles((2, 4), vector.shape[0], 10000.0, row, 3, torch.device("cpu"))) for row in (query_row, key_row)
    )
    return (q @ k.transpose(-1, -2))[0, 0]


def test_rope_scores_depend_on_relative_positions_only():
    vector = torch.randn(24, generator=torch.Generator().manual_seed(0))
    scores = rope_scores(vector, 0, 0)
    for row in (1, 1000, 1_000_000):
        torch.testing.assert_close(rope_scores(vector, row, row), scores, rtol=1e-4, atol=1e-4)
    assert (rope_scores(vector, 1, 0) - scores).abs().max() > 0.1
    position = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4))  # (S, 3)
    offset = position[None] - position[:, None]  # (S, S, 3)
    means = []
    for step in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 3), (2, 1, -1)):
        of_step = scores[(offset == torch.tensor(step)).all(-1)]
        assert of_step.numel() > 0 and (of_step.max() - of_step.min()) < 1e-4
        means.append(of_step.mean().item())
    gaps = [abs(a - b) for a, b in itertools.combinations(means, 2)]
    assert min(gaps) > 1e-2  # every axis has its say


def test_rope_keeps_lengths_and_position_zero_is_the_identity():
    x = torch.randn(2, 3, 24, 12, generator=torch.Generator().manual_seed(0))
    rotated = apply_rope(x, *rope_angles((2, 4), 12, 10000.0, 5, 3, torch.device("cpu")))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    at_zero = apply_rope(x, *rope_angles((2, 4), 12, 10000.0, 0, 3, torch.device("cpu")))
    torch.testing.assert_close(at_zero[:, :, 0], x[:, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-12)])
def test_attention_and_its_gradient_equal_the_formula(is_masked, dtype, tolerance):
    random = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, length, 16, generator=random).to(dtype).double().requires_grad_() for length in (7, 9, 9)]
    q, k, v = exact
    mask = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    if is_masked:
        mask = torch.rand(2, 1, 7, 9, generator=random) < 0.5
        mask[..., 0] = True
    weight = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 4).exp() * mask
    formula = torch.einsum("bhqk,bhkd->bhqd", weight / weight.sum(-1, keepdim=True), v)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    ours = attention(*inputs, mask if is_masked else None)
    torch.testing.assert_close(ours.double(), formula, rtol=tolerance, atol=tolerance)
    for expected, actual in zip(*(torch.autograd.grad(out.sum(), x) for out, x in ((formula, exact), (ours, inputs))), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"patch_size": [1, 3, 4]}, r"model\.patch_size \[1, 3, 4\]: the height 3 does not divide .* 8; choose one of \[1, 2, 4, 8\]"),
    ({"patch_size": [4, 4]}, r"model\.patch_size .* expected \[temporal, height, width\]"),
    ({"width": 26}, r"model\.width 26 over model\.num_heads 2"),
    ({"channels": 2}, r"model\.channels is 2: expected 1 or 3"),
    ({"num_layers": 0}, r"model\.num_layers is 0"),
])
def test_impossible_sizes_are_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL_SIZES, **sizes})


def test_a_fresh_network_predicts_a_grey_video():
    model = TinyCausalWanModel(ModelConfig(**SMALL_SIZES))
    x_t, t = random_video(model, 2, 3)
    v = model.forward_bidirectional(x_t, t, random_prompt(model, 2))
    torch.testing.assert_close(v, velocity_from_x_0(x_t, torch.zeros_like(x_t), t))


def test_every_parameter_learns(small_model):
    x_t, t = random_video(small_model, 2, 6)
    small_model.forward_block_causal(x_t, t, random_prompt(small_model, 2), 3).square().mean().backward()
    dead = [name for name, parameter in small_model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


# Generation alone: weights kept in the format of the products, compiled passes


def cached_and_whole(model: TinyCausalWanModel, length: int, dtype: torch.dtype, num_frames: int = 9) -> list[Tensor]:
    """A pass over all frames, and one block after another through the cache in the joined pass, for a prompt of so many words."""
    generator = torch.Generator().manual_seed(length)
    text = torch.randn(2, length, model.config.text_width, generator=generator)
    x_t, t = torch.randn(2, num_frames, 1, 8, 8, generator=generator), torch.full((2, num_frames), 0.6)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        prompt, cache = model.encode_prompt(text, torch.ones(2, length, dtype=torch.bool)), model.new_cache(6)
        parts = [model.forward_cached(x_t[:, :3], t[:, :3], prompt, cache)]
        for first in range(3, num_frames, 3):
            now, past = slice(first, first + 3), slice(first - 3, first)
            parts.append(model.write_and_forward(x_t[:, past], t[:, past], x_t[:, now], t[:, now], prompt, cache))
        return [model.forward_bidirectional(x_t, t, prompt), torch.cat(parts, 1)]


def test_weights_that_are_cast_once_make_the_same_bits():
    model, cast = build_small_model(), build_small_model()
    cast.cast_products(torch.bfloat16)
    is_cast = [linear.weight.dtype == torch.bfloat16 for linear in cast.modules() if isinstance(linear, torch.nn.Linear)]
    assert sum(is_cast) == 10 * model.config.num_layers + 3 and len(is_cast) - sum(is_cast) == 3  # those of time stay in float32
    for expected, found in zip(*(cached_and_whole(network, 5, torch.bfloat16) for network in (model, cast)), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_8_bit_integers_stay_near(dtype: torch.dtype):
    model, quantized = build_small_model(), build_small_model()
    quantized.quantize_products(dtype)
    quantized.cast_products(dtype)
    assert sum(isinstance(module, Int8Linear) for module in quantized.modules()) == 10 * model.config.num_layers
    for expected, found in zip(*(cached_and_whole(network, 5, dtype) for network in (model, quantized)), strict=True):
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 1e-4 < error < 0.05, error


@pytest.mark.slow
@pytest.mark.parametrize("is_int8", [False, True])
def test_compiled_passes_differ_by_rounding_and_serve_every_prompt(is_int8: bool):
    try:
        require_compiler("this test", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    model, compiled = build_small_model(), build_small_model()
    if is_int8:
        model.quantize_products(torch.float32)
        compiled.quantize_products(torch.float32)
    compiled.compile_passes()
    torch._dynamo.utils.counters.clear()
    num_graphs, atol = [], 1e-2 if is_int8 else 1e-5  # a number that rounding moves over the middle between two integers moves by one
    for length in (5, 3):
        pair = (cached_and_whole(network, length, torch.float32, 6) for network in (model, compiled))  # two sizes of passes
        for expected, found in zip(*pair, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < num_graphs[0] == num_graphs[1]


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [
    pytest.param(None, 0, marks=pytest.mark.slow), pytest.param(9, 0, marks=pytest.mark.slow), (9, 3),
])
def test_a_compiled_pass_serves_a_past_of_every_length(window: int | None, sink: int, monkeypatch: pytest.MonkeyPatch):
    """60 frames, so that buffers grow and rows move back: never more graphs than kinds of passes: a block, a finished one and the next
    (two where the window is full), and where the sink has to move in between a finished one alone."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # graphs are found, and not compiled
    model, compiled = build_small_model(), build_small_model()
    compiled.compile_passes()
    torch._dynamo.reset()  # Dynamo's limit counts the graphs of all networks
    torch._dynamo.utils.counters.clear()
    outputs = []
    for network in (model, compiled):
        (x_t, t), prompt, cache = random_video(network, 2, 60), random_prompt(network, 2), network.new_cache(window, sink)
        blocks = list(zip(x_t.split(3, 1), t.split(3, 1), strict=True))
        parts = [network.forward_cached(*blocks[0], prompt, cache)]
        for finished, block in itertools.pairwise(blocks):
            parts.append(network.write_and_forward(*finished, *block, prompt, cache))
            parts.append(network.forward_cached(*block, prompt, cache))
        outputs.append(torch.cat(parts, 1))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if window is None else 3)
