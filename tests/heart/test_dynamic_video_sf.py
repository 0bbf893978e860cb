"""Self-Forcing: one rollout, and where gradient flows in it. Its losses: test_dynamic_video_sf_losses.py."""

import dataclasses
from functools import partial

import pytest
import torch
from helpers.networks import build_engine, load_self_test, random_prompt, random_text
from torch import Tensor

from dynamic_video_sf import clamp_to_data, draw_noise, make_noise_streams, rollout_blocks, sample_bidirectional
from method.flow_matching import projected_guidance
from method.losses import dmd_gradient
from method.plans import BidirectionalPlan, RolloutPlan, few_step_plan, many_step_plan, warp_steps
from network.attention import ContextWindow
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training.config import SelfForcingConfig

BLOCK = 3


def run(
    model: TinyCausalWanModel, prompt: PromptContext, seeds: list[int], num_blocks: int, plan: RolloutPlan, **options: object
) -> Tensor:
    return torch.cat(list(rollout_blocks(model, prompt, make_noise_streams(seeds), num_blocks, plan, **options)), dim=1)


@pytest.fixture
def plan() -> RolloutPlan:
    return few_step_plan(SelfForcingConfig())


# One rollout


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("context_noise", [0, 300])
def test_training_rollout_is_inference_bit_for_bit(drawn_seeds, with_gradient: bool, context_noise: int):
    for finish_blocks in (False, True):
        engine = build_engine(context_noise=context_noise, finish_blocks=finish_blocks)
        prompt = random_prompt(engine.generator, 2)
        last = len(engine.plan.times) - 1
        num_compared, exits = 0, set()
        for _ in range(12):
            rollout = engine.rollout(prompt, 9, with_gradient)
            exits |= set(rollout.exit_steps)
            if finish_blocks or rollout.exit_steps == [last] * 3:
                num_compared += 1
                assert torch.equal(rollout.finished, run(engine.generator, prompt, drawn_seeds[-1], 3, few_step_plan(engine.config)))
                assert not rollout.finished.requires_grad
        assert num_compared > 0 and (len(exits) > 1) == (with_gradient or not finish_blocks)
        assert len(set(map(tuple, drawn_seeds))) == 12  # every rollout draws other seeds
        drawn_seeds.clear()


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_finished_blocks_are_what_later_blocks_see_and_the_exit_step_is_predicted_from_them(small_model, plan, exit_step: int):
    """Gradient reaches the exit step's prediction alone, which is the one that inference makes on its way."""
    prompt, finished, walks = random_prompt(small_model, 2), [], []
    passes: list[bool] = []
    small_model.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    predicted = run(small_model, prompt, [1, 2], 3, plan, exit_steps=[exit_step] * 3, gradient_blocks=range(1, 3), finished=finished)
    assert sum(passes) == 2 and not any(block.requires_grad for block in finished)
    with torch.no_grad():
        inferred = list(rollout_blocks(small_model, prompt, make_noise_streams([1, 2]), 3, plan, trace=walks))
    assert all(torch.equal(made, wanted) for made, wanted in zip(finished, inferred, strict=True))
    cache = small_model.new_cache()
    for index, block in enumerate(predicted.split(BLOCK, 1)):
        x_t = walks[index][exit_step]
        t = torch.full(x_t.shape[:2], plan.times[exit_step])
        with torch.no_grad():
            x_0 = clamp_to_data(x_t - plan.times[exit_step] * small_model.forward_cached(x_t, t, prompt, cache))
            small_model.write_cache(inferred[index], torch.zeros(x_t.shape[:2]), prompt, cache)
        torch.testing.assert_close(block.detach(), x_0, atol=1e-5, rtol=1e-5)


def test_noise_and_video_depend_on_the_own_seed_only(small_model, plan):
    shape, cpu = (3, 1, 8, 8), torch.device("cpu")
    together = draw_noise(make_noise_streams([5, 6, 7]), shape, cpu)
    assert torch.equal(together[1:2], draw_noise(make_noise_streams([6]), shape, cpu))
    assert not torch.equal(together[0], together[1])
    prompt = random_prompt(small_model, 1)
    pair = prompt.concatenate(prompt)
    swapped = run(small_model, pair, [6, 5], 3, plan).flip(0)
    torch.testing.assert_close(run(small_model, pair, [5, 6], 3, plan), swapped)
    torch.testing.assert_close(run(small_model, prompt, [5], 3, plan), swapped[:1], atol=1e-4, rtol=1e-4)


def test_exit_step_is_shared_or_drawn_per_block_and_every_one_occurs():
    for same_exit_step in (True, False):
        engine = build_engine(same_exit_step=same_exit_step)
        prompt = random_prompt(engine.generator, 1)
        draws = [engine.rollout(prompt, 9, with_gradient=True).exit_steps for _ in range(24)]
        assert all(len(draw) == 3 for draw in draws)
        assert all(len(set(draw)) == 1 for draw in draws) == same_exit_step
        assert {step for draw in draws for step in draw} == {0, 1, 2, 3}


# Plans and samplers


def test_times_of_plans():
    assert warp_steps([1000, 750, 500, 250], 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert warp_steps([1000, 400], 1.0) == pytest.approx((1.0, 0.4))
    many = many_step_plan(4, 3.0, BLOCK, guidance=2.5)
    assert many.times == pytest.approx((1.0, 0.9, 0.75, 0.5))  # every time but 0, which needs no forward pass
    few = few_step_plan(SelfForcingConfig(context_noise=250, window_frames=6, sink_frames=3, clamp_x_0=False))
    assert few.fresh_noise and not many.fresh_noise and (few.guidance, many.guidance) == (1.0, 2.5)
    assert (few.context_time, few.context, few.clamp_x_0) == (0.25, ContextWindow(6, 3), False)


def test_one_guided_block_is_the_bidirectional_sampler(small_model):
    prompt, null = random_prompt(small_model, 2), random_prompt(small_model, 2, seed=9)
    for guidance in (1.0, 2.5):
        block = run(small_model, prompt, [1, 2], 1, many_step_plan(5, 3.0, BLOCK, guidance), null_prompt=null)
        whole = sample_bidirectional(small_model, prompt, null, make_noise_streams([1, 2]), BLOCK, BidirectionalPlan(5, 3.0, guidance))
        torch.testing.assert_close(block, whole, atol=1e-3, rtol=1e-3)


def test_the_bidirectional_sampler_projects_its_guidance_off_the_ink(small_model):
    prompt, null = random_prompt(small_model, 2), random_prompt(small_model, 2, seed=9)

    def x_0_of(guidance: float, ink_kept: float = 1.0) -> Tensor:  # one step from t = 1 ends at the guided x_0
        plan = BidirectionalPlan(1, 3.0, guidance, ink_kept=ink_kept)
        return sample_bidirectional(small_model, prompt, null, make_noise_streams([1, 2]), BLOCK, plan)

    cond, uncond = x_0_of(1.0), x_0_of(0.0)
    for kept in (0.0, 0.5, 1.0):
        expected = projected_guidance(cond, uncond, 3.0, cond + 1, kept)
        torch.testing.assert_close(x_0_of(3.0, kept), expected, atol=1e-3, rtol=1e-3)


def test_guidance_weights_one_and_zero(small_model, plan):
    prompt, null = random_prompt(small_model, 2), random_prompt(small_model, 2, seed=9)
    conditional, unconditional = run(small_model, prompt, [1, 2], 3, plan), run(small_model, null, [1, 2], 3, plan)
    assert torch.equal(run(small_model, prompt, [1, 2], 3, plan, null_prompt=null), conditional)

    def guided(weight: float, null_prompt: PromptContext) -> Tensor:
        return run(small_model, prompt, [1, 2], 3, dataclasses.replace(plan, guidance=weight), null_prompt=null_prompt)

    close = {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(guided(1.0 + 1e-6, null), conditional, **close)
    torch.testing.assert_close(guided(0.0, null), unconditional, **close)
    torch.testing.assert_close(guided(2.5, prompt), conditional, **close)  # nothing to tell apart: weight has no effect
    assert (guided(2.5, null) - conditional).abs().max() > 0.1
    with pytest.raises(ValueError, match="null prompt"):
        run(small_model, prompt, [1, 2], 3, dataclasses.replace(plan, guidance=2.0))


# Where gradient flows


def reference_rollout(
    model: TinyCausalWanModel, text: tuple[Tensor, Tensor], seeds: list[int], exit_steps: list[int], first_gradient_block: int,
    plan: RolloutPlan,
) -> Tensor:
    """Algorithm 1 spelled out: everything without gradient, then the exit passes alone, each from a new cache."""
    streams, window, inputs, past = make_noise_streams(seeds), plan.context, [], []
    draw = partial(draw_noise, streams, (BLOCK, 1, 8, 8), torch.device("cpu"))

    def x_0_of(x_t: Tensor, time: float, blocks: list[Tensor], prompt: PromptContext) -> Tensor:
        cache, times = model.new_cache(window.window_frames, window.sink_frames), torch.ones(x_t.shape[:2])
        for block in blocks:
            model.write_cache(block, plan.context_time * times, prompt, cache)
        x_0 = x_t - time * model.forward_cached(x_t, time * times, prompt, cache)
        return x_0 + (x_0.clamp(-1, 1) - x_0).detach() if plan.clamp_x_0 else x_0  # clamped, with the gradient of x_0

    with torch.no_grad():
        prompt = model.encode_prompt(*text)
        for exit_step in exit_steps:
            x_t = draw()
            for time, later in zip(plan.times[:exit_step], plan.times[1:], strict=False):
                x_t = (1 - later) * x_0_of(x_t, time, past, prompt) + later * draw()
            inputs.append((x_t, plan.times[exit_step]))
            x_0, noise = x_0_of(*inputs[-1], past, prompt), plan.context_time
            past = [*past, (1 - noise) * x_0 + noise * draw() if noise else x_0]
    prompt, result = model.encode_prompt(*text), []
    for block, (x_t, time) in enumerate(inputs):
        with torch.set_grad_enabled(block >= first_gradient_block):
            result.append(x_0_of(x_t, time, past[:block], prompt))
    return torch.cat(result, dim=1)


@pytest.mark.parametrize(("exit_steps", "first_gradient_block", "changes"), [
    ([2, 2, 2], 0, {}), ([3, 0, 2], 1, {"clamp_x_0": False}), ([1, 1, 1], 2, {}), ([0, 1, 3], 0, {"context_time": 0.4}),
    ([2] * 6, 1, {"context": ContextWindow(6)}), ([2] * 6, 1, {"context": ContextWindow(9, 3)}),
])
def test_video_and_gradient_equal_those_of_the_algorithm_spelled_out(small_model, plan, exit_steps, first_gradient_block, changes):
    """With a window later writes in place change no graph."""
    plan, num_blocks = dataclasses.replace(plan, **changes), len(exit_steps)
    weight = torch.randn(2, num_blocks * BLOCK, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    text, parameters = random_text(small_model, 2), dict(small_model.named_parameters())
    reference = reference_rollout(small_model, text, [1, 2], exit_steps, first_gradient_block, plan)
    prompt, blocks = small_model.encode_prompt(*text), range(first_gradient_block, num_blocks)
    video = run(small_model, prompt, [1, 2], num_blocks, plan, exit_steps=exit_steps, gradient_blocks=blocks)
    assert torch.equal(video, run(small_model, prompt, [1, 2], num_blocks, plan, exit_steps=exit_steps))  # with gradient and without
    torch.testing.assert_close(video, reference, atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad((reference * weight).sum(), list(parameters.values()))
    gradients = torch.autograd.grad((video * weight).sum(), list(parameters.values()))
    for name, gradient, wanted in zip(parameters, gradients, expected, strict=True):
        scale = wanted.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradient, wanted, atol=1e-3 * scale, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_only_the_exit_pass_builds_a_graph_and_the_cache_holds_none(small_model, plan, monkeypatch):
    passes: list[bool] = []
    caches = []
    new_cache = small_model.new_cache
    monkeypatch.setattr(small_model, "new_cache", lambda *window: caches.append(new_cache(*window)) or caches[-1])
    small_model.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    exit_steps = [2, 2, 0, 3]
    video = run(small_model, random_prompt(small_model, 1), [1], 4, plan, exit_steps=exit_steps, gradient_blocks=range(2, 4))
    expected = []
    for block, exit_step in enumerate(exit_steps):
        expected += [False] * (block > 0 and exit_step == 0)  # the cache pass of the block before, which else joins the first step
        expected += [False] * exit_step + [block >= 2]
    assert passes == expected
    assert video.requires_grad
    (cache,) = caches
    assert not cache._keys.requires_grad and not cache._values.requires_grad
    assert cache.num_frames == 9


@pytest.mark.parametrize("first_frame", [0, 6])
def test_no_gradient_before_the_gradient_window(first_frame: int):
    engine = build_engine(gradient_frames=6)
    parameters = list(engine.generator.parameters())
    rollout = engine.rollout(random_prompt(engine.generator, 2), 15, with_gradient=True, first_frame=first_frame)
    before = torch.autograd.grad(rollout.x_0[:, :9].sum(), parameters, retain_graph=True)
    assert all(not gradient.any() for gradient in before)
    for first in (9, 12):
        inside = torch.autograd.grad(rollout.x_0[:, first: first + BLOCK].sum(), parameters, retain_graph=True)
        assert all(gradient.any() for gradient in inside)
    assert rollout.x_0.shape == (2, 15, 1, 8, 8) and torch.equal(rollout.scored, rollout.x_0[:, 9:])
    assert not engine.rollout(random_prompt(engine.generator, 2), 6, with_gradient=False).x_0.requires_grad


def test_gradient_survives_bfloat16_autocast(small_model, plan):
    """Autocast keeps cast weights; those made by the passes without gradient must not serve the exit pass."""
    text, norms = random_text(small_model, 2), []
    for enabled in (False, True):
        small_model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            prompt = small_model.encode_prompt(*text)
            video = run(small_model, prompt, [1, 2], 3, plan, exit_steps=[3, 3, 3], gradient_blocks=range(3))
        video.square().mean().backward()
        norms.append(torch.stack([parameter.grad.norm() for parameter in small_model.parameters()]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.2, atol=0.1 * norms[0].median().item())


def test_self_test_passes(capsys):
    assert load_self_test("dynamic_video_sf")["self_test"]()
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == 8 and "FAIL" not in printed


def test_self_test_fails_where_a_loss_is_wrong(capsys):
    checks = load_self_test("dynamic_video_sf")
    checks["self_test"].__globals__["dmd_gradient"] = lambda *arguments: -dmd_gradient(*arguments)
    assert not checks["self_test"]()
    assert "FAIL on Gaussians" in capsys.readouterr().out
