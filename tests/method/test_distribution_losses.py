"""DMD's relatives: SiD and the GAN against closed forms, whom they reach, and generator inputs made of real videos."""

import pytest
import torch
import torch.nn.functional as F
from helpers import networks
from helpers.networks import perturb, random_prompt, random_text, texts_of
from torch import Tensor, nn

from dynamic_video_sf import SelfForcingEngine
from method.flow_matching import add_noise, x_0_from_velocity
from method.losses import discriminator_loss, distance_to_teacher, gradient_penalty, relativistic_loss, sid_loss
from network.discriminator import Discriminator
from network.weights import frozen


def real_videos(num_frames: int = 6) -> Tensor:
    return torch.randn(2, num_frames, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def build_engine(**changes: object) -> SelfForcingEngine:
    """An engine whose critic has moved away from the teacher."""
    torch.manual_seed(0)
    engine = networks.build_engine(**changes)
    perturb(engine.critic)
    engine.fake_average.load_state_dict(engine.fake_score.state_dict())
    return engine


# SiD


def denoised(x_0: Tensor, eps: Tensor, t: float, mean: float, s: float) -> Tensor:
    """E[x_0 | x_t] of N(mean, s^2)."""
    x_t = (1 - t) * x_0 + t * eps
    return mean + s**2 * (1 - t) / ((1 - t) ** 2 * s**2 + t**2) * (x_t - (1 - t) * mean)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize(("m_fake", "m_real"), [(0.8, -0.5), (-0.2, 0.4), (0.3, 0.3)])
def test_on_gaussians_sids_gradient_is_the_closed_form_and_points_to_the_teacher(alpha, m_fake, m_real):
    """Equal spreads: x_0_real - x_0_fake = (m_real - m_fake) c is constant, and the rest moves with x_0 at the rate -c."""
    s, t, random = 0.6, 0.7, torch.Generator().manual_seed(0)
    x_0 = (m_fake + s * torch.randn((16, 3, 1, 4, 4), generator=random, dtype=torch.float64)).requires_grad_()
    eps = torch.randn(x_0.shape, generator=random, dtype=torch.float64)
    x_0_fake, x_0_real = (denoised(x_0, eps, t, mean, s) for mean in (m_fake, m_real))
    (gradient,) = torch.autograd.grad(sid_loss(x_0, x_0_fake, x_0_real, alpha).mean(), x_0)
    c = t**2 / ((1 - t) ** 2 * s**2 + t**2)
    expected = (m_fake - m_real) * c**2 / distance_to_teacher(x_0, x_0_real).detach() / x_0.numel()
    torch.testing.assert_close(gradient, expected.expand_as(gradient), atol=1e-12, rtol=1e-9)
    assert gradient.sum().sign() == torch.tensor(m_fake - m_real).sign()  # descending moves x_0 toward the teacher's mean


def test_sid_is_the_papers_loss_in_other_words():
    x_0, fake, real = torch.randn(3, 4, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (0.5, 1.0):
        papers = ((1 - alpha) * (real - fake).square() + (real - fake) * (fake - x_0)) / distance_to_teacher(x_0, real)
        torch.testing.assert_close(sid_loss(x_0, fake, real, alpha).mean(), papers.mean())


def test_the_engines_sid_gradient_passes_through_both_scores():
    engine = build_engine(loss="sid", guidance=2.0, guidance_ink_kept=1.0)
    x_0 = real_videos().requires_grad_()
    state, (text, null_text) = engine.random.generator.get_state(), texts_of(engine)
    loss, figures = engine.generator_loss(x_0, text, null_text)
    (whole,) = torch.autograd.grad(loss, x_0)
    engine.random.generator.set_state(state)
    x_t, t = engine._noised(x_0)
    critic, teacher = engine.fake_average, engine.real_score
    with torch.no_grad():
        prompt, of_teacher = critic.encode_prompt(*text), [teacher.encode_prompt(*each) for each in (text, null_text)]
    fake = x_0_from_velocity(x_t, critic.forward_bidirectional(x_t, t, prompt), t)
    cond, null = (x_0_from_velocity(x_t, teacher.forward_bidirectional(x_t, t, each), t) for each in of_teacher)
    real = null + 2.0 * (cond - null)
    (expected,) = torch.autograd.grad(sid_loss(x_0, fake, real, 1.0).mean(), x_0)
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    (constant,) = torch.autograd.grad(sid_loss(x_0, fake.detach(), real.detach(), 1.0).mean(), x_0)
    assert (whole - constant).abs().max() > 0.1 * whole.abs().max()  # the scores' own derivatives matter
    assert figures["score_distance"] == pytest.approx((fake - real).abs().mean().item(), rel=1e-3)


# GAN


def test_relativistic_loss_compares_pairs():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    expected = (F.softplus(torch.tensor(-3.0)) + F.softplus(torch.tensor(1.0))) / 2
    torch.testing.assert_close(relativistic_loss(real, fake).mean(), expected)
    assert torch.equal(relativistic_loss(real + 5, fake + 5), relativistic_loss(real, fake))  # only the difference counts
    assert (relativistic_loss(real + 1, fake) < relativistic_loss(real, fake)).all()
    assert (relativistic_loss(real, fake) < relativistic_loss(real, fake + 1)).all()


def test_the_penalty_is_the_squared_slope_and_zero_for_a_constant():
    x, eps = torch.randn(2, 20000, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)

    def linear(x: Tensor) -> Tensor:
        return (x @ slope).squeeze(1) + 4

    penalty = gradient_penalty(linear, x, linear(x), eps, 0.01)
    assert penalty.item() == pytest.approx(slope.square().sum().item(), rel=0.05)
    assert gradient_penalty(lambda x: torch.full((len(x),), 3.0), x, torch.full((len(x),), 3.0), eps, 0.01) == 0


def test_the_discriminators_loss_is_relativistic_plus_both_penalties():
    real, fake, slope = torch.tensor([[1.0]] * 5000), torch.tensor([[-1.0]] * 5000), torch.tensor(2.0, requires_grad=True)
    noises = torch.randn(2, 5000, 1, generator=torch.Generator().manual_seed(0))
    loss = discriminator_loss(lambda x: slope * x.squeeze(1), real, fake, *noises, 0.01, 0.1)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-4.0)).item() + 0.1 * 2 * 4, rel=0.05)
    (without,) = torch.autograd.grad(discriminator_loss(lambda x: slope * x.squeeze(1), real, fake, *noises, 0.01, 0.0), slope)
    (penalised,) = torch.autograd.grad(loss, slope)
    assert without < 0 < penalised  # it wants to tell them apart, and the penalty holds it back


def test_the_discriminator_sees_noised_real_and_generated_videos_of_the_same_prompts_and_times():
    engine = build_engine(loss="gan", gradient_frames=3)
    x_0, x_real, prompt = torch.zeros(2, 3, 1, 8, 8), real_videos(), random_prompt(engine.fake_score, 2)
    fake_t, real_t, t = engine._noised_pair(x_0, x_real)
    time = t[..., None, None, None]
    noises = fake_t / time, (real_t - (1 - time) * x_real[:, 3:]) / time  # the scored, last frames
    assert all(0.7 < noise.std() < 1.3 for noise in noises) and not torch.allclose(*noises)
    logits = engine.critic(real_t, t, prompt)
    assert isinstance(engine.critic, Discriminator) and logits.shape == (2,) and logits.dtype == torch.float32
    assert not torch.equal(logits, engine.critic(real_t, t, random_prompt(engine.fake_score, 2, seed=4)))
    with pytest.raises(ValueError, match="training.loss=gan compares with real videos"):
        engine.critic_loss(x_0, random_text(engine.fake_score, 2))


def test_the_two_players_pull_the_logits_apart_and_together():
    engine, x_real = build_engine(loss="gan", gan_penalty=0.0), real_videos()
    text, null_text = texts_of(engine)
    x_0 = torch.zeros(2, 6, 1, 8, 8, requires_grad=True)

    def distance(at: Tensor) -> float:  # the same noise and times at every call
        engine.random.generator.manual_seed(1)
        return engine.generator_loss(at, text, null_text, x_real)[1]["logit_distance"]

    start = distance(x_0)
    engine.random.generator.manual_seed(1)
    (gradient,) = torch.autograd.grad(engine.generator_loss(x_0, text, null_text, x_real)[0], x_0)
    assert distance(x_0.detach() - 1e-2 * gradient / gradient.norm()) < start  # generated videos look more real
    engine.random.generator.manual_seed(1)
    engine.critic_loss(x_0, text, x_real).backward()
    with torch.no_grad():
        norm = torch.cat([p.grad.flatten() for p in engine.critic.parameters() if p.grad is not None]).norm()
        for parameter in engine.critic.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad / norm
    assert distance(x_0) > start  # the discriminator tells them apart better


def test_frozen_restores_what_it_switched_even_after_an_error():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), frozen(module):
        assert not module.weight.requires_grad
        raise RuntimeError("inside")
    assert module.weight.requires_grad and not module.bias.requires_grad


@pytest.mark.parametrize("inputs", ["diffusion_forced", "teacher_forced"])
def test_real_videos_are_noised_per_block_to_few_step_times_and_denoised_in_one_pass(inputs, monkeypatch):
    engine, x_real = build_engine(generator_inputs=inputs, gradient_frames=6), real_videos(9).repeat(8, 1, 1, 1, 1)
    seen = []
    name = "forward_teacher_forced" if inputs == "teacher_forced" else "forward_block_causal"
    forward = getattr(engine.generator, name)
    monkeypatch.setattr(engine.generator, name, lambda *arguments: seen.append(arguments) or forward(*arguments))
    text = random_text(engine.generator, 16)
    rollout = engine.make_videos(text, 9, True, x_real)
    ((x_t, t, *rest),) = seen
    *clean_past, prompt, block, context = rest
    assert clean_past == ([x_real] if inputs == "teacher_forced" else []) and (block, context) == (3, engine.config.context)
    assert torch.equal(prompt.pooled, engine.generator.encode_prompt(*text).pooled)
    of_block = t.unflatten(1, (3, 3))
    assert (of_block == of_block[..., :1]).all() and of_block.std(dim=1).max() > 0
    clean = [] if inputs == "teacher_forced" else [0.0]  # at which inference writes the cache
    assert set(t.flatten().tolist()) == set(torch.tensor([*engine.plan.times, *clean]).tolist())  # 48 draws meet all of them
    assert torch.equal(x_t[t == 0], x_real[t == 0]) and torch.equal(rollout.frame_exits == -1, t[:, 3:] == 0)
    eps = (x_t - (1 - t)[..., None, None, None] * x_real)[t > 0] / t[t > 0][:, None, None, None]
    torch.testing.assert_close(add_noise(x_real[t > 0][None], eps[None], t[t > 0][None])[0], x_t[t > 0])
    assert 0.95 < eps.std() < 1.05
    torch.testing.assert_close(rollout.x_0, x_0_from_velocity(x_t, forward(*seen[0]), t).clamp(-1, 1))
    assert torch.equal(rollout.scored, rollout.x_0[:, 3:]) and not engine.make_videos(text, 9, False, x_real).x_0.requires_grad
    with pytest.raises(ValueError, match=f"generator_inputs={inputs} needs real videos"):
        engine.make_videos(text, 9, True)
