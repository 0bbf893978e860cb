"""What `python dynamic_video_sf.py` checks: the rollout and the losses, on a small case."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamic_video_sf import SelfForcingEngine, make_noise_streams, rollout_blocks
from machine.seeds import Purpose, torch_generator
from method.losses import dmd_gradient, dmd_loss
from method.settings import SelfForcingConfig
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel

Finding = tuple[bool, str]  # whether a check holds, and what was seen


def self_test() -> bool:
    """Check the rollout and the losses on a small network, print every finding, and say whether all is well."""
    random = torch_generator(0, Purpose.SELF_TEST)
    teacher = TinyCausalWanModel(ModelConfig(frame_size=16, width=48, num_layers=2, num_heads=2, text_width=32))
    with torch.no_grad():
        for parameter in teacher.parameters():  # a fresh network's head and gates are 0, which would hide every error
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=random))
    config = SelfForcingConfig(gradient_frames=6, guidance=1.0, finish_blocks=True)
    engine = SelfForcingEngine(config, teacher, random)
    text, mask = torch.randn(2, 4, 32, generator=random), torch.ones(2, 4, dtype=torch.bool)
    findings = [
        _check_one_rollout(engine, engine.generator.encode_prompt(text, mask)),
        _check_gradient_passes(engine, engine.generator.encode_prompt(text, mask)),
        *_check_losses(engine, text, mask),
        *check_gaussians(random),
    ]
    for is_ok, finding in findings:
        print(f"{'ok  ' if is_ok else 'FAIL'} {finding}")
    return all(is_ok for is_ok, _ in findings)


def _check_one_rollout(engine: SelfForcingEngine, prompt: PromptContext) -> Finding:
    """The rollouts of training, from all exit steps drawn, against inference from the same random state."""
    num_equal, num_rollouts, seen = 0, 16, set()
    for _ in range(num_rollouts):
        state = engine.random.generator.get_state()
        rollout = engine.rollout(prompt, 12, with_gradient=True)
        final = engine.random.generator.get_state()
        engine.random.generator.set_state(state)
        torch.randint(len(engine.plan.times), (1,), generator=engine.random.generator)  # the exit step comes first
        seeds = torch.randint(2**62, (2,), generator=engine.random.generator).tolist()
        engine.random.generator.set_state(final)
        video = torch.cat(list(rollout_blocks(engine.generator, prompt, make_noise_streams(seeds), 4, engine.plan)), dim=1)
        num_equal += torch.equal(rollout.finished, video[:, -rollout.finished.shape[1]:])
        seen.add(rollout.exit_steps[0])
    return (
        num_equal == num_rollouts and len(seen) == len(engine.plan.times),
        f"{num_equal} of {num_rollouts} training rollouts equal inference bit for bit, with exit steps {sorted(seen)}",
    )


def _check_gradient_passes(engine: SelfForcingEngine, prompt: PromptContext) -> Finding:
    """12 frames, of which the last 6 carry gradient: 2 of 4 blocks, one forward pass each."""
    passes: list[bool] = []
    head = engine.generator.head  # every forward pass ends here
    handle = head.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    rollout = engine.rollout(prompt, 12, with_gradient=True)
    handle.remove()
    parameters = list(engine.generator.parameters())
    past, scored = (
        sum(g.abs().sum().item() for g in torch.autograd.grad(frames.sum(), parameters, retain_graph=True))
        for frames in (rollout.x_0[:, :-6], rollout.scored)
    )
    return (
        sum(passes) == 2 and past == 0 and scored > 0,
        f"{sum(passes)} of {len(passes)} forward passes carry gradient: 1 in each block of the last 6 frames; "
        f"earlier frames give {past:.0f}, the last {scored:.3g}",
    )


def _check_losses(engine: SelfForcingEngine, text: Tensor, mask: Tensor) -> list[Finding]:
    """Who feels which loss, before and after the critic moves away from the teacher."""
    before = [parameter.clone() for parameter in engine.real_score.parameters()]

    def generator_gradient() -> tuple[float, float]:
        x_0 = engine.rollout(engine.generator.encode_prompt(text, mask), 6, with_gradient=True).scored
        loss, figures = engine.generator_loss(x_0, (text, mask), (torch.zeros_like(text), mask))
        loss.backward()
        return _total_gradient(engine.generator), figures["score_distance"]

    agreeing, distance = generator_gradient()
    findings = [(agreeing < 1e-4, f"scores {distance:.1e} apart give the generator a gradient of {agreeing:.1e}")]
    with torch.no_grad():
        for parameter in engine.fake_average.parameters():
            parameter.mul_(1.1)
    moved, distance = generator_gradient()
    felt = sum(_total_gradient(score) for score in (engine.fake_score, engine.fake_average, engine.real_score))
    finding = f"scores {distance:.1e} apart give it {moved:.1e}; teacher and critic feel {felt:.0f}"
    findings.append((moved > 1e-3 and felt == 0, finding))
    engine.generator.zero_grad()
    x_0 = engine.rollout(engine.generator.encode_prompt(text, mask), 6, with_gradient=True).scored
    engine.critic_loss(x_0, (text, mask)).backward()
    own, other = _total_gradient(engine.fake_score), _total_gradient(engine.generator)
    finding = f"the critic's loss gives the critic {own:.1e} and the generator {other:.0f}"
    findings.append((own > 1e-3 and other == 0, finding))
    is_same = all(torch.equal(a, b) for a, b in zip(before, engine.real_score.parameters(), strict=True))
    findings.append((is_same, "the teacher is unchanged, bit for bit"))
    return findings


def _total_gradient(model: TinyCausalWanModel) -> float:
    return sum(parameter.grad.abs().sum().item() for parameter in model.parameters() if parameter.grad is not None)


def check_gaussians(random: torch.Generator) -> list[Finding]:
    """DMD between N(m_fake, s^2) and N(m_real, s^2), whose denoised estimates are known exactly."""
    m_fake, m_real, s, t = 0.8, -0.5, 0.6, 0.7
    x_0 = (m_fake + s * torch.randn((64, 3, 1, 4, 4), generator=random, dtype=torch.float64)).requires_grad_()
    x_t = (1 - t) * x_0.detach() + t * torch.randn(x_0.shape, generator=random, dtype=torch.float64)
    shrink = s**2 * (1 - t) / ((1 - t) ** 2 * s**2 + t**2)
    x_0_fake, x_0_real = (m + shrink * (x_t - (1 - t) * m) for m in (m_fake, m_real))  # E[x_0 | x_t]
    loss = dmd_loss(x_0, dmd_gradient(x_0.detach(), x_0_fake, x_0_real)).mean()
    (gradient,) = torch.autograd.grad(loss, x_0)
    scale = (x_0.detach() - x_0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    closed_form = (m_fake - m_real) * t**2 / ((1 - t) ** 2 * s**2 + t**2) / scale / x_0.numel()
    error = ((gradient - closed_form) / closed_form).abs().max().item()
    start, stepped = x_0.mean().item(), (x_0 - 0.5 * x_0.numel() * gradient).mean().item()
    return [
        (error < 1e-12, f"on Gaussians the DMD gradient is the closed form to {error:.1e}"),
        (m_real < stepped < start, f"a step moves their mean from {start:.2f} to {stepped:.2f}, toward {m_real}"),
    ]


if __name__ == "__main__":
    raise SystemExit(0 if self_test() else 1)
