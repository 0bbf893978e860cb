"""Self-Forcing's losses: whom each one reaches, and distribution matching against closed forms."""

import math
from collections.abc import Iterable

import pytest
import torch
from helpers.networks import GaussianScore, build_engine, perturb, random_text, shift_text, texts_of
from torch import Tensor, nn

from dynamic_video_sf import SelfForcingEngine
from method.flow_matching import add_noise, projected_guidance
from method.losses import NORMALISER_FLOOR, dmd_gradient, dmd_loss, sid_loss
from training.config import SelfForcingConfig


def has_gradient(parameters: Iterable[nn.Parameter]) -> set[bool]:
    return {parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters}


@pytest.mark.parametrize("changes", [
    {}, {"loss": "sid"}, {"loss": "gan"}, {"generator_inputs": "diffusion_forced"}, {"generator_inputs": "teacher_forced"},
], ids=str)
def test_each_loss_reaches_its_own_network_alone(changes):
    engine = build_engine(**changes)
    perturb(engine.critic), perturb(engine.fake_average)
    others = [engine.real_score, engine.fake_average, engine.generator_average]
    before = [parameter.clone() for network in others for parameter in network.parameters()]
    text, x_real = random_text(engine.generator, 2), torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    passes: list[bool] = []
    for score in (engine.fake_average, engine.real_score):
        score.head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    engine.generator_loss(engine.make_videos(text, 6, True, x_real).scored, *texts_of(engine), x_real)[0].backward()
    assert passes == {"dmd": [False, False], "sid": [True, True], "gan": []}[engine.config.loss]
    assert has_gradient(engine.generator.parameters()) == {True} and has_gradient(engine.critic.parameters()) == {False}
    engine.generator.zero_grad()
    scored = engine.make_videos(text, 6, True, x_real).scored
    assert scored.requires_grad
    engine.critic_loss(scored, text, x_real).backward()
    assert has_gradient(engine.fake_score.blocks.parameters()) == {True} and True in has_gradient(engine.critic.head.parameters())
    assert has_gradient(engine.generator.parameters()) == {False}
    after = [parameter for network in others for parameter in network.parameters()]
    assert has_gradient(after) == {False} and all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_networks_share_no_storage():
    engine = build_engine()
    pointers = [parameter.data_ptr() for network in engine.networks() for parameter in network.parameters()]
    assert len(set(pointers)) == len(pointers) == 5 * len(list(engine.generator.parameters()))


def random_batch(num_tensors: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 1, 2, 2, generator=random, dtype=torch.float64) for _ in range(num_tensors)]


def test_dmd_loss_differentiates_to_the_gradient():
    x_0, gradient = random_batch(2)
    x_0.requires_grad_()
    gradient.requires_grad_()
    derivative, into_scores = torch.autograd.grad(dmd_loss(x_0, gradient).mean(), [x_0, gradient], allow_unused=True)
    torch.testing.assert_close(derivative, gradient.detach() / x_0.numel())
    assert into_scores is None


def test_dmd_gradient_is_normalised_per_sample():
    x_0, x_0_fake, x_0_real = random_batch(3)
    whole = dmd_gradient(x_0, x_0_fake, x_0_real)
    torch.testing.assert_close(whole[:1], dmd_gradient(x_0[:1], x_0_fake[:1], x_0_real[:1]))
    torch.testing.assert_close(whole * (x_0 - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True), x_0_fake - x_0_real)
    torch.testing.assert_close(dmd_gradient(10 * x_0, 10 * x_0_fake, 10 * x_0_real), whole)
    torch.testing.assert_close(dmd_gradient(x_0, x_0_fake, x_0), (x_0_fake - x_0) / NORMALISER_FLOOR)  # bounded on a perfect sample
    assert whole.any() and not dmd_gradient(x_0, x_0_real, x_0_real).any()  # zero where the scores agree


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_a_score_that_is_the_video_itself_gives_finite_gradients(loss):
    x_0, x_0_fake = random_batch(2)
    x_0.requires_grad_()
    x_0_real = x_0.detach()
    terms = dmd_loss(x_0, dmd_gradient(x_0_real, x_0_fake, x_0_real)) if loss == "dmd" else sid_loss(x_0, x_0_fake, x_0_real, 1.0)
    (derivative,) = torch.autograd.grad(terms.mean(), x_0)
    assert terms.isfinite().all() and derivative.isfinite().all() and derivative.any()


@pytest.mark.parametrize("broken", ["fake_average", "real_score"])
@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_a_score_that_is_not_a_number_gives_a_loss_that_is_not_finite(loss, broken):
    engine = build_engine(loss=loss)
    x_0 = (0.3 * torch.randn(2, 6, 1, 8, 8)).requires_grad_()
    assert engine.generator_loss(x_0, *texts_of(engine))[0].isfinite()
    with torch.no_grad():
        getattr(engine, broken).head.bias.fill_(torch.nan)
    value, figures = engine.generator_loss(x_0, *texts_of(engine))
    (derivative,) = torch.autograd.grad(value, x_0)
    assert value.isnan() and math.isnan(figures["score_distance"]) and derivative.isnan().any()


def test_guidance_of_the_real_score_keeps_the_asked_share_of_its_ink():
    x_0 = 0.3 * torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def x_0_real(guidance: float, ink_kept: float = 1.0) -> Tensor:
        engine = build_engine(guidance=guidance, guidance_ink_kept=ink_kept, guidance_interval=[0.0, 1.0])
        return engine._denoised(x_0, *texts_of(engine))[1].detach()

    cond, uncond = x_0_real(1.0), x_0_real(0.0)
    for kept in (0.0, 0.5, 1.0):
        expected = projected_guidance(cond, uncond, 2.5, cond + 1, kept)
        torch.testing.assert_close(x_0_real(2.5, kept), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_score_times_lie_at_even_distances_and_are_shifted_as_asked_and_not_by_default(shift: float):
    changes = {} if shift == 1 else {"score_time_shift": shift}
    engine = build_engine(min_score_time=0.1, max_score_time=0.9, **changes)
    state = engine.random.generator.get_state()
    _, t = engine._noised(torch.zeros(20_000, 1, 1, 1, 1))
    engine.random.generator.set_state(state)
    u = (torch.arange(20_000)[:, None] + torch.rand((), generator=engine.random.generator)) / 20_000
    torch.testing.assert_close(t, 0.1 + 0.8 * shift * u / (1 + (shift - 1) * u))
    mean = 0.5 if shift == 1 else shift / (shift - 1) - shift * math.log(shift) / (shift - 1) ** 2
    assert t.mean().item() == pytest.approx(0.1 + 0.8 * mean, abs=0.008)  # five standard errors


@pytest.mark.parametrize(("interval", "clamp"), [([0.0, 1.0], False), ([0.4, 0.7], False), ([0.0, 1.0], True)])
def test_on_gaussians_the_engines_gradient_is_the_closed_form(interval: list[float], clamp: bool):
    """Fake N(m_f, s^2), teacher N(m_u, s^2) and N(m_c, s^2) guided, inside the interval, to the mean m_u + w (m_c - m_u)."""
    s, weight = 0.6, 2.0
    config = SelfForcingConfig(guidance=weight, guidance_interval=interval, guidance_ink_kept=1.0, clamp_scores=clamp)
    engine = SelfForcingEngine(config, GaussianScore(torch.zeros(2), s * torch.eye(2)), torch.Generator().manual_seed(0))
    fake, cond, uncond = [0.8, -0.1], [-0.5, 0.4], [0.2, 0.1]
    x_0 = (torch.tensor(fake) + s * torch.randn(32, 3, 1, 1, 2, generator=engine.random.generator)).requires_grad_()
    state = engine.random.generator.get_state()
    with torch.no_grad():  # the critic reads the prompt of the teacher, and its mean is fake under it
        engine.fake_average.mean.copy_(torch.tensor(fake) - torch.tensor(cond))
    loss, figures = engine.generator_loss(x_0, shift_text(32, cond), shift_text(32, uncond))
    (derivative,) = torch.autograd.grad(loss, x_0)
    engine.random.generator.set_state(state)
    x_t, t = engine._noised(x_0.detach())
    t = t[..., None, None, None]
    spread = (1 - t) ** 2 * s**2 + t**2
    weight = torch.where((t >= interval[0]) & (t <= interval[1]), weight, 1.0)
    guided = torch.tensor(uncond) + weight * (torch.tensor(cond) - torch.tensor(uncond))
    x_0_real = guided + s**2 * (1 - t) / spread * (x_t - (1 - t) * guided)
    difference = (torch.tensor(fake) - guided) * t**2 / spread
    if clamp:
        x_0_fake = x_0_real + difference
        assert x_0_real.abs().max() > 1.1 and x_0_fake.abs().max() > 1.1
        x_0_real = x_0_real.clamp(-1, 1)
        difference = x_0_fake.clamp(-1, 1) - x_0_real
    scale = (x_0.detach() - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    closed_form = difference / scale
    torch.testing.assert_close(derivative, closed_form / x_0.numel(), rtol=1e-3, atol=1e-7)
    assert figures["score_distance"] == pytest.approx(difference.abs().mean().item(), rel=1e-3)
    assert figures["dmd_gradient_norm"] == pytest.approx(closed_form.square().mean().sqrt().item(), rel=1e-3)


def test_a_toy_generator_moves_onto_its_target():
    """An affine map of 2-D noise under the engine's own two losses."""
    target_mean, target_factor, num_steps = torch.tensor([1.5, -1.0]), torch.tensor([[0.7, 0.0], [0.4, 0.5]]), 600
    random = torch.Generator().manual_seed(0)
    engine = SelfForcingEngine(SelfForcingConfig(guidance=1.0), GaussianScore(target_mean, target_factor), random)
    text = shift_text(256, [0.0, 0.0])
    mean, factor = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))
    with torch.no_grad():  # the critic starts at what the generator makes, not at the teacher
        engine.fake_score.mean.copy_(mean)
        engine.fake_score.factor.copy_(factor)
    engine.fake_average.load_state_dict(engine.fake_score.state_dict())
    generator_optimizer = torch.optim.Adam([mean, factor], lr=0.02, betas=(0.0, 0.999))
    critic_optimizer = torch.optim.Adam(engine.fake_score.parameters(), lr=0.02, betas=(0.0, 0.999))
    for step in range(num_steps):
        decay = min(1.0, 2 * (1 - step / num_steps))
        generator_optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = 0.02 * decay, 0.02 * decay
        x_0 = (mean + torch.randn(256, 2, generator=random) @ factor.T).view(256, 1, 1, 1, 2)
        if step % 3 == 2:
            generator_optimizer.zero_grad()
            engine.generator_loss(x_0, text, text)[0].backward()
            generator_optimizer.step()
        critic_optimizer.zero_grad()
        engine.critic_loss(x_0, text).backward()
        critic_optimizer.step()
        engine.fake_average.load_state_dict(engine.fake_score.state_dict())
    torch.testing.assert_close(mean.detach(), target_mean, atol=0.04, rtol=0)
    torch.testing.assert_close((factor @ factor.T).detach(), target_factor @ target_factor.T, atol=0.04, rtol=0)


def test_every_video_of_a_critic_update_is_seen_at_noise_levels_of_its_own(monkeypatch):
    """With k draws of B videos the times are those of one grid of k B, and two parts of the batch see the halves of it."""
    engine = build_engine(noise_draws=3, min_score_time=0.1, max_score_time=0.9)
    videos, text = torch.rand(4, 3, 1, 8, 8) * 2 - 1, random_text(engine.generator, 4)
    asked = []
    forward = engine.fake_score.forward_bidirectional
    monkeypatch.setattr(
        engine.fake_score, "forward_bidirectional", lambda x, t, prompt: asked.append((x, t, prompt)) or forward(x, t, prompt)
    )
    loss = engine.critic_loss(videos, text)
    (x_t, t, prompts), = asked
    assert x_t.shape == (12, 3, 1, 8, 8) and torch.equal(prompts.pooled, engine.fake_score.encode_prompt(*text).pooled.repeat(3, 1))
    torch.testing.assert_close(t[:, 0].diff(), torch.full((11,), 0.8 / 12))
    assert torch.equal(t, t[:, :1].expand_as(t)) and loss.requires_grad
    state = engine.random.generator.get_state()
    parts = engine.random.parts([slice(0, 2), slice(2, 4)], 4)
    both = [engine._noised(videos[part].repeat(3, 1, 1, 1, 1)) for part in parts]
    engine.random.generator.set_state(state)
    whole = engine._noised(videos.repeat(3, 1, 1, 1, 1))
    for halves, expected in zip(zip(*both, strict=True), whole, strict=True):
        parts = torch.cat([half.unflatten(0, (3, 2)) for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(parts, expected)


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_the_generators_gradient_is_the_mean_over_the_noised_copies(loss, monkeypatch):
    """With k copies a video's gradient is the mean of what each of its copies says alone; each has a noise level of its own."""
    engine = build_engine(noise_draws=2, loss=loss)
    text, null_text = random_text(engine.generator, 3), random_text(engine.generator, 3)
    videos = (torch.rand(3, 3, 1, 8, 8) * 2 - 1).requires_grad_(True)
    asked, noised = [], engine._noised
    monkeypatch.setattr(engine, "_noised", lambda x_0: asked.append(noised(x_0)) or asked[-1])
    engine.generator_loss(videos, text, null_text, frame_exits=torch.zeros(3, 3, dtype=torch.long))[0].backward()
    (x_t, t), = asked
    assert len(t) == 6 and len(t[:, 0].unique()) == 6
    of_copies = []
    engine.config.noise_draws = 1
    for copy in (slice(0, 3), slice(3, 6)):
        alone = videos.detach().clone().requires_grad_(True)
        eps = (x_t[copy].detach() - (1 - t[copy])[..., None, None, None] * videos.detach()) / t[copy][..., None, None, None]
        monkeypatch.setattr(engine, "_noised", lambda x_0, eps=eps, t=t[copy]: (add_noise(x_0, eps, t), t))
        engine.generator_loss(alone, text, null_text)[0].backward()
        of_copies.append(alone.grad)
    torch.testing.assert_close(videos.grad, (of_copies[0] + of_copies[1]) / 2, atol=1e-6, rtol=1e-4)
