"""Self-Forcing: one rollout, where gradient flows, and distribution matching against closed forms."""

import dataclasses

import pytest
import torch
from conftest import build_small_model, random_prompt
from torch import Tensor, nn

import dynamic_video_sf
from config import SelfForcingConfig
from dynamic_video_sf import (
    NORMALISER_FLOOR,
    RolloutPlan,
    SelfForcingEngine,
    dmd_gradient,
    dmd_loss,
    draw_noise,
    few_step_plan,
    make_noise_streams,
    many_step_plan,
    rollout_blocks,
    sample_bidirectional,
    self_test,
    warp_steps,
)
from flow_matching import euler_sampler, sampling_times, shift_time, x_0_from_velocity
from tiny_causal_wan import KVCache, PromptContext, TinyCausalWanModel

BLOCK = 3


def build_engine(**changes: object) -> SelfForcingEngine:
    return SelfForcingEngine(SelfForcingConfig(**changes), build_small_model(), torch.Generator().manual_seed(0))


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
def test_training_rollout_is_inference_bit_for_bit(monkeypatch, with_gradient: bool, context_noise: int):
    drawn: list[list[int]] = []

    def record(seeds: list[int]) -> list[torch.Generator]:
        drawn.append(seeds)
        return make_noise_streams(seeds)

    monkeypatch.setattr(dynamic_video_sf, "make_noise_streams", record)
    engine = build_engine(context_noise=context_noise)
    prompt = random_prompt(engine.generator, 2)
    last = len(engine.plan.times) - 1
    num_last = 0
    for _ in range(12):
        rollout = engine.rollout(prompt, 9, with_gradient)
        if rollout.exit_steps == [last] * 3:
            num_last += 1
            assert torch.equal(rollout.x_0, run(engine.generator, prompt, drawn[-1], 3, few_step_plan(engine.config)))
    assert num_last > 0
    assert len(set(map(tuple, drawn))) == 12  # every rollout has seeds of its own


def test_a_longer_video_begins_with_the_shorter_one(small_model, plan):
    prompt = random_prompt(small_model, 2)
    assert torch.equal(run(small_model, prompt, [1, 2], 5, plan)[:, : 2 * BLOCK], run(small_model, prompt, [1, 2], 2, plan))


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


@pytest.mark.parametrize("fresh_noise", [True, False])
def test_early_exit_is_truncated_denoising(small_model, plan, fresh_noise: bool):
    prompt = random_prompt(small_model, 2)
    plan = dataclasses.replace(plan, fresh_noise=fresh_noise)
    early = run(small_model, prompt, [1, 2], 3, plan, exit_steps=[1, 1, 1])
    truncated = run(small_model, prompt, [1, 2], 3, dataclasses.replace(plan, times=plan.times[:2]))
    assert torch.equal(early, truncated)
    assert not torch.equal(early, run(small_model, prompt, [1, 2], 3, plan))


def test_exit_step_is_shared_or_drawn_per_block_and_every_one_occurs():
    for same_exit_step in (True, False):
        engine = build_engine(same_exit_step=same_exit_step)
        prompt = random_prompt(engine.generator, 1)
        draws = [engine.rollout(prompt, 9, with_gradient=False).exit_steps for _ in range(24)]
        assert all(len(draw) == 3 for draw in draws)
        assert all(len(set(draw)) == 1 for draw in draws) == same_exit_step
        assert {step for draw in draws for step in draw} == {0, 1, 2, 3}


def test_rollout_has_the_length_asked_for_and_scores_its_last_frames():
    engine = build_engine(gradient_frames=6)
    prompt = random_prompt(engine.generator, 2)
    for num_frames, num_scored in ((3, 3), (6, 6), (12, 6)):
        rollout = engine.rollout(prompt, num_frames, with_gradient=False)
        assert rollout.x_0.shape == (2, num_frames, 1, 8, 8)
        assert torch.equal(rollout.scored, rollout.x_0[:, num_frames - num_scored:])


def test_later_blocks_see_context_noise(small_model, plan):
    prompt = random_prompt(small_model, 2)
    noisy = dataclasses.replace(plan, context_time=0.4)
    clean_video, noisy_video = run(small_model, prompt, [1, 2], 3, plan), run(small_model, prompt, [1, 2], 3, noisy)
    assert torch.equal(clean_video[:, :BLOCK], noisy_video[:, :BLOCK])
    assert (clean_video[:, BLOCK:] - noisy_video[:, BLOCK:]).abs().max() > 1e-3
    assert torch.equal(noisy_video, run(small_model, prompt, [1, 2], 3, noisy))


@pytest.mark.parametrize("context_time", [0.0, 0.4])
def test_the_cache_is_written_from_finished_blocks_at_the_context_time(small_model, plan, monkeypatch, context_time: float):
    written: list[tuple[Tensor, Tensor]] = []
    write_cache = small_model.write_cache

    def record(x: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache) -> None:
        written.append((x, t))
        write_cache(x, t, prompt, cache)

    monkeypatch.setattr(small_model, "write_cache", record)
    plan = dataclasses.replace(plan, context_time=context_time)
    video = run(small_model, random_prompt(small_model, 8), list(range(8)), 3, plan, exit_steps=[1, 1, 1])
    assert len(written) == 2  # nothing comes after the last block
    for x_0, (x, t) in zip(video.split(BLOCK, dim=1), written, strict=False):
        assert torch.equal(t, torch.full((8, BLOCK), context_time))
        noise = x - (1 - context_time) * x_0
        assert noise.std().item() == pytest.approx(context_time, rel=0.1, abs=1e-6)


def test_context_noise_is_part_of_the_plan_of_training_and_inference():
    config = SelfForcingConfig(context_noise=250)
    assert few_step_plan(config).context_time == 0.25
    assert build_engine(context_noise=250).plan == few_step_plan(config)


# Plans and samplers


def test_times_of_plans():
    assert warp_steps([1000, 750, 500, 250], 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert warp_steps([1000, 400], 1.0) == pytest.approx((1.0, 0.4))
    plan = many_step_plan(4, 3.0, BLOCK, guidance=2.5, window_frames=6)
    assert plan.times == pytest.approx((1.0, 0.9, 0.75, 0.5))  # every time but 0, which needs no forward pass
    assert (plan.fresh_noise, plan.guidance, plan.window_frames, plan.context_time) == (False, 2.5, 6, 0.0)
    few = few_step_plan(SelfForcingConfig(denoising_steps=[1000, 500], time_shift=5.0))
    assert few.fresh_noise and few.guidance == 1.0 and few.times == pytest.approx((1.0, float(shift_time(torch.tensor(0.5), 5.0))))


def test_keeping_the_noise_is_eulers_method(small_model):
    prompt = random_prompt(small_model, 2)
    noise = draw_noise(make_noise_streams([1, 2]), (BLOCK, 1, 8, 8), torch.device("cpu"))
    with torch.no_grad():
        expected = euler_sampler(lambda x, t: small_model.forward_bidirectional(x, t, prompt), noise, sampling_times(5, 3.0))
    torch.testing.assert_close(
        run(small_model, prompt, [1, 2], 1, many_step_plan(5, 3.0, BLOCK, guidance=1.0)), expected, atol=1e-4, rtol=1e-4
    )


def test_one_guided_block_is_the_bidirectional_sampler(small_model):
    prompt, null = random_prompt(small_model, 2), random_prompt(small_model, 2, seed=9)
    for guidance in (1.0, 2.5):
        block = run(small_model, prompt, [1, 2], 1, many_step_plan(5, 3.0, BLOCK, guidance), null_prompt=null)
        whole = sample_bidirectional(small_model, prompt, null, make_noise_streams([1, 2]), BLOCK, 5, 3.0, guidance)
        torch.testing.assert_close(block, whole, atol=1e-3, rtol=1e-3)


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
    """Algorithm 1 spelled out: first everything without gradient, then the exit passes alone, from a context made anew."""
    streams, exits, done = make_noise_streams(seeds), [], []
    shape, cpu = (BLOCK, 1, 8, 8), torch.device("cpu")

    def context_of(blocks: list[Tensor], prompt: PromptContext) -> KVCache:
        cache = model.new_cache()
        for block in blocks:
            model.write_cache(block, torch.zeros(block.shape[:2]), prompt, cache)
        return cache

    with torch.no_grad():
        prompt = model.encode_prompt(*text)
        for exit_step in exit_steps:
            cache, x_t = context_of(done, prompt), draw_noise(streams, shape, cpu)
            for step in range(exit_step):
                t = torch.full(x_t.shape[:2], plan.times[step])
                x_0 = x_t - plan.times[step] * model.forward_cached(x_t, t, prompt, cache)
                later = plan.times[step + 1]
                x_t = (1 - later) * x_0 + later * draw_noise(streams, shape, cpu)
            exits.append(x_t)
            t = torch.full(x_t.shape[:2], plan.times[exit_step])
            done.append(x_t - plan.times[exit_step] * model.forward_cached(x_t, t, prompt, cache))
    prompt, result = model.encode_prompt(*text), []
    for block, (x_t, exit_step) in enumerate(zip(exits, exit_steps, strict=True)):
        cache, t = context_of(done[:block], prompt), torch.full(x_t.shape[:2], plan.times[exit_step])
        with torch.set_grad_enabled(block >= first_gradient_block):
            result.append(x_t - plan.times[exit_step] * model.forward_cached(x_t, t, prompt, cache))
    return torch.cat(result, dim=1)


@pytest.mark.parametrize(("exit_steps", "first_gradient_block"), [([2, 2, 2], 0), ([3, 0, 2], 1), ([1, 1, 1], 2)])
def test_gradient_equals_that_of_the_exit_passes_alone(small_model, plan, exit_steps: list[int], first_gradient_block: int):
    random = torch.Generator().manual_seed(3)
    text = (torch.randn(2, 5, 32, generator=random), torch.ones(2, 5, dtype=torch.bool))
    weight = torch.randn(2, 9, 1, 8, 8, generator=random)
    reference = reference_rollout(small_model, text, [1, 2], exit_steps, first_gradient_block, plan)
    video = run(
        small_model, small_model.encode_prompt(*text), [1, 2], 3, plan, exit_steps=exit_steps, first_gradient_block=first_gradient_block
    )
    torch.testing.assert_close(video, reference, atol=1e-4, rtol=1e-4)
    parameters = dict(small_model.named_parameters())
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
    monkeypatch.setattr(small_model, "new_cache", lambda window: caches.append(new_cache(window)) or caches[-1])
    small_model.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    exit_steps = [2, 2, 0, 3]
    blocks = list(
        rollout_blocks(
            small_model, random_prompt(small_model, 1), make_noise_streams([1]), 4, plan, exit_steps=exit_steps, first_gradient_block=2
        )
    )
    expected = []
    for block, exit_step in enumerate(exit_steps):
        expected += [False] * exit_step + [block >= 2] + [False] * (block < 3)  # then the cache pass, but for the last block
    assert passes == expected
    assert [block.requires_grad for block in blocks] == [False, False, True, True]
    (cache,) = caches
    stored = [*cache._keys, *cache._values]
    assert len(stored) == 4 and all(not tensor.requires_grad for tensor in stored)
    assert cache.num_frames == 9


def test_no_gradient_before_the_gradient_window():
    engine = build_engine(gradient_frames=6)
    parameters = list(engine.generator.parameters())
    rollout = engine.rollout(random_prompt(engine.generator, 2), 15, with_gradient=True)
    before = torch.autograd.grad(rollout.x_0[:, :9].sum(), parameters, retain_graph=True)
    assert all(not gradient.any() for gradient in before)
    for first in (9, 12):
        inside = torch.autograd.grad(rollout.x_0[:, first: first + BLOCK].sum(), parameters, retain_graph=True)
        assert all(gradient.any() for gradient in inside)
    assert not engine.rollout(random_prompt(engine.generator, 2), 6, with_gradient=False).x_0.requires_grad


def test_gradient_survives_bfloat16_autocast(small_model, plan):
    """Autocast keeps cast weights; those made by the passes without gradient must not serve the exit pass."""
    text = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, dtype=torch.bool))
    norms = []
    for enabled in (False, True):
        small_model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            prompt = small_model.encode_prompt(*text)
            video = run(small_model, prompt, [1, 2], 3, plan, exit_steps=[3, 3, 3], first_gradient_block=0)
        video.square().mean().backward()
        norms.append(torch.stack([parameter.grad.norm() for parameter in small_model.parameters()]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.2, atol=0.1 * norms[0].median().item())


def prompts_of(engine: SelfForcingEngine) -> tuple[PromptContext, PromptContext, PromptContext]:
    return random_prompt(engine.real_score, 2), random_prompt(engine.real_score, 2, seed=9), random_prompt(engine.fake_score, 2)


def perturb(module: nn.Module) -> None:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))


def test_the_generators_loss_reaches_the_generator_alone():
    engine = build_engine()
    perturb(engine.fake_score)
    before = {name: value.clone() for name, value in engine.real_score.state_dict().items()}
    rollout = engine.rollout(random_prompt(engine.generator, 2), 6, with_gradient=True)
    score_passes: list[bool] = []
    for score in (engine.fake_score, engine.real_score):
        score.head.register_forward_hook(lambda module, args, output: score_passes.append(output.requires_grad))
    engine.generator_loss(rollout.scored, *prompts_of(engine))[0].backward()
    assert score_passes == [False, False]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in engine.generator.parameters())
    assert all(parameter.grad is None for parameter in engine.fake_score.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in engine.real_score.parameters())
    torch.testing.assert_close(dict(engine.real_score.state_dict()), before, rtol=0, atol=0)


def test_the_critics_loss_reaches_the_critic_alone():
    engine = build_engine()
    rollout = engine.rollout(random_prompt(engine.generator, 2), 6, with_gradient=True)
    assert rollout.scored.requires_grad
    engine.critic_loss(rollout.scored, random_prompt(engine.fake_score, 2)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in engine.fake_score.parameters())
    assert all(parameter.grad is None for parameter in [*engine.generator.parameters(), *engine.real_score.parameters()])


def test_the_three_networks_share_no_storage():
    engine = build_engine()
    pointers = [{p.data_ptr() for p in net.parameters()} for net in (engine.generator, engine.fake_score, engine.real_score)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2] or pointers[1] & pointers[2])


# Distribution matching


def random_batch(num_tensors: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 1, 2, 2, generator=random, dtype=torch.float64) for _ in range(num_tensors)]


def test_dmd_gradient_vanishes_where_the_scores_agree():
    x_0, x_0_real, x_0_fake = random_batch(3)
    assert not dmd_gradient(x_0, x_0_real, x_0_real).any()
    assert dmd_gradient(x_0, x_0_fake, x_0_real).any()


def test_dmd_loss_differentiates_to_the_gradient():
    x_0, gradient = random_batch(2)
    x_0.requires_grad_()
    gradient.requires_grad_()
    derivative, into_scores = torch.autograd.grad(dmd_loss(x_0, gradient), [x_0, gradient], allow_unused=True)
    torch.testing.assert_close(derivative, gradient.detach() / x_0.numel())
    assert into_scores is None


def test_descending_the_loss_moves_a_sample_toward_the_teachers():
    x_0, x_0_real = random_batch(2)
    x_0.requires_grad_()
    (derivative,) = torch.autograd.grad(dmd_loss(x_0, dmd_gradient(x_0.detach(), x_0.detach(), x_0_real)), x_0)  # the critic knows x_0
    before, after = (x_0 - x_0_real).abs(), (x_0 - 0.1 * x_0.numel() * derivative - x_0_real).abs()
    assert (after < before).all()


def test_dmd_gradient_is_normalised_per_sample():
    x_0, x_0_fake, x_0_real = random_batch(3)
    whole = dmd_gradient(x_0, x_0_fake, x_0_real)
    torch.testing.assert_close(whole[:1], dmd_gradient(x_0[:1], x_0_fake[:1], x_0_real[:1]))
    torch.testing.assert_close(whole * (x_0 - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True), x_0_fake - x_0_real)
    torch.testing.assert_close(dmd_gradient(10 * x_0, 10 * x_0_fake, 10 * x_0_real), whole)


def test_dmd_gradient_is_bounded_on_a_perfect_sample():
    x_0, x_0_fake = random_batch(2)
    torch.testing.assert_close(dmd_gradient(x_0, x_0_fake, x_0), (x_0_fake - x_0) / NORMALISER_FLOOR)
    assert not dmd_gradient(x_0, x_0, x_0).any()


def test_generator_loss_is_dmd_with_guided_teacher_and_bidirectional_scores():
    engine = build_engine(guidance=2.5)
    perturb(engine.fake_score)
    real, null, fake = prompts_of(engine)
    x_0 = engine.rollout(random_prompt(engine.generator, 2), 6, with_gradient=False).scored.requires_grad_()
    state = engine.random.get_state()
    loss, figures = engine.generator_loss(x_0, real, null, fake)
    (derivative,) = torch.autograd.grad(loss, x_0)
    engine.random.set_state(state)
    with torch.no_grad():
        x_t, t = engine._noised(x_0)
        x_0_fake = x_0_from_velocity(x_t, engine.fake_score.forward_bidirectional(x_t, t, fake), t)
        cond, uncond = (x_0_from_velocity(x_t, engine.real_score.forward_bidirectional(x_t, t, p), t) for p in (real, null))
        x_0_real = uncond + 2.5 * (cond - uncond)
    expected = dmd_gradient(x_0.detach(), x_0_fake, x_0_real)
    torch.testing.assert_close(derivative, expected / x_0.numel(), rtol=1e-3, atol=1e-3 * derivative.abs().max().item())
    assert figures["score_distance"] == pytest.approx((x_0_fake - x_0_real).abs().mean().item(), rel=1e-3)
    assert figures["dmd_gradient_norm"] == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-3)


def test_score_times_are_uniform_between_their_bounds():
    engine = build_engine(min_score_time=0.3, max_score_time=0.8)
    x_0 = torch.zeros(4000, 2, 1, 1, 1)
    x_t, t = engine._noised(x_0)
    assert t.shape == (4000, 2) and torch.equal(t[:, 0], t[:, 1])
    assert 0.3 <= t.min() < 0.31 and 0.79 < t.max() <= 0.8
    assert t.mean().item() == pytest.approx(0.55, abs=0.01)
    assert (x_t[:, 0] / t[:, 0].view(-1, 1, 1, 1)).std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(x_t[:, 0], x_t[:, 1])


class GaussianScore(nn.Module):
    """The exact denoiser of N(mean + pooled prompt, factor factor^T), in place of a network; videos are (B, F, 1, 1, D)."""

    def __init__(self, mean: Tensor, factor: Tensor):
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean), nn.Parameter(factor)

    def forward_bidirectional(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """E[x_0 | x_t] = m + (1 - t) S ((1 - t)^2 S + t^2 I)^-1 (x_t - (1 - t) m), handed out as a velocity."""
        t, mean = t[..., None, None, None], self.mean + prompt.pooled[:, None, None, None]
        covariance = self.factor @ self.factor.T
        noisy = (1 - t).square() * covariance + t.square() * torch.eye(len(self.mean), dtype=x_t.dtype)  # (B, F, 1, D, D)
        solved = torch.linalg.solve(noisy, (x_t - (1 - t) * mean).transpose(-1, -2)).transpose(-1, -2)
        return (x_t - (mean + (1 - t) * solved @ covariance)) / t


def shift_prompt(batch_size: int, shift: list[float]) -> PromptContext:
    return PromptContext([], [], torch.ones(batch_size, 1, 1, 1, dtype=torch.bool), torch.tensor([shift]).expand(batch_size, -1))


def test_on_gaussians_the_engines_gradient_is_the_closed_form():
    """Fake N(m_f, s^2), teacher N(m_u, s^2) and N(m_c, s^2) guided to the mean m_u + w (m_c - m_u)."""
    s, weight = 0.6, 2.0
    config = SelfForcingConfig(guidance=weight)
    engine = SelfForcingEngine(config, GaussianScore(torch.zeros(2), s * torch.eye(2)), torch.Generator().manual_seed(0))
    fake, cond, uncond = [0.8, -0.1], [-0.5, 0.4], [0.2, 0.1]
    x_0 = (torch.tensor(fake) + s * torch.randn(32, 3, 1, 1, 2, generator=engine.random)).requires_grad_()
    state = engine.random.get_state()
    loss, _ = engine.generator_loss(x_0, shift_prompt(32, cond), shift_prompt(32, uncond), shift_prompt(32, fake))
    (derivative,) = torch.autograd.grad(loss, x_0)
    engine.random.set_state(state)
    x_t, t = engine._noised(x_0.detach())
    t = t[..., None, None, None]
    spread = (1 - t) ** 2 * s**2 + t**2
    guided = torch.tensor(uncond) + weight * (torch.tensor(cond) - torch.tensor(uncond))
    x_0_real = guided + s**2 * (1 - t) / spread * (x_t - (1 - t) * guided)
    scale = (x_0.detach() - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    closed_form = (torch.tensor(fake) - guided) * t**2 / spread / scale
    torch.testing.assert_close(derivative, closed_form / x_0.numel(), rtol=1e-3, atol=1e-7)


def train_toy_generator(sign: float, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An affine map of 2-D noise under the engine's own two losses. Returns mean and covariance, reached and wanted."""
    monkeypatch.setattr(dynamic_video_sf, "dmd_gradient", lambda *arguments: sign * dmd_gradient(*arguments))
    target_mean, target_factor = torch.tensor([1.5, -1.0]), torch.tensor([[0.7, 0.0], [0.4, 0.5]])
    random = torch.Generator().manual_seed(0)
    engine = SelfForcingEngine(SelfForcingConfig(guidance=1.0), GaussianScore(target_mean, target_factor), random)
    prompt = shift_prompt(256, [0.0, 0.0])
    mean, factor = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))
    with torch.no_grad():  # the critic starts at what the generator makes, not at the teacher
        engine.fake_score.mean.copy_(mean)
        engine.fake_score.factor.copy_(factor)
    generator_optimizer = torch.optim.Adam([mean, factor], lr=0.02, betas=(0.0, 0.999))
    critic_optimizer = torch.optim.Adam(engine.fake_score.parameters(), lr=0.02, betas=(0.0, 0.999))
    for step in range(num_steps):
        decay = min(1.0, 2 * (1 - step / num_steps))
        generator_optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = 0.02 * decay, 0.02 * decay
        x_0 = (mean + torch.randn(256, 2, generator=random) @ factor.T).view(256, 1, 1, 1, 2)
        if step % 3 == 2:
            generator_optimizer.zero_grad()
            engine.generator_loss(x_0, prompt, prompt, prompt)[0].backward()
            generator_optimizer.step()
        critic_optimizer.zero_grad()
        engine.critic_loss(x_0, prompt).backward()
        critic_optimizer.step()
    reached = (mean.detach(), (factor @ factor.T).detach())
    return (*reached, target_mean, target_factor @ target_factor.T)


def test_a_toy_generator_moves_onto_its_target(monkeypatch):
    mean, covariance, target_mean, target_covariance = train_toy_generator(1.0, 600, monkeypatch)
    torch.testing.assert_close(mean, target_mean, atol=0.04, rtol=0)
    torch.testing.assert_close(covariance, target_covariance, atol=0.04, rtol=0)


def test_with_the_sign_flipped_the_toy_generator_flees_its_target(monkeypatch):
    mean, _, target_mean, _ = train_toy_generator(-1.0, 300, monkeypatch)
    assert (mean - target_mean).norm() > 1.3 * target_mean.norm()


def test_critic_loss_is_smallest_at_the_generators_distribution():
    """The critic's minimum is the denoiser of what the generator makes: shifted means cost more."""
    engine = SelfForcingEngine(SelfForcingConfig(), GaussianScore(torch.zeros(2), 0.5 * torch.eye(2)), torch.Generator().manual_seed(0))
    x_0 = torch.tensor([0.6, -0.3]) + 0.5 * torch.randn(4096, 1, 1, 1, 2, generator=engine.random)
    state, losses = engine.random.get_state(), {}
    for offset in (-0.2, 0.0, 0.2):
        engine.random.set_state(state)
        losses[offset] = engine.critic_loss(x_0, shift_prompt(4096, [0.6 + offset, -0.3])).item()
    assert losses[0.0] < min(losses[-0.2], losses[0.2])


def test_self_test_passes(capsys):
    assert self_test()
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == 8 and "FAIL" not in printed


def test_self_test_fails_where_a_loss_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(dynamic_video_sf, "dmd_gradient", lambda *arguments: -dmd_gradient(*arguments))
    assert not self_test()
    assert "FAIL on Gaussians" in capsys.readouterr().out
