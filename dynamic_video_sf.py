"""Self-Forcing: the engine that trains a rollout to match a distribution (Huang et al. 2025, arXiv 2506.08009).

Dimensions: B batch, F frames, C channels, H height, W width.

    python dynamic_video_sf.py    check the rollout and the losses on a small case
"""

from __future__ import annotations

import threads  # noqa: F401, I001  before torch, which reads its settings once

import copy
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice

import torch
from torch import Tensor

from batch_share import BatchShare, share_or_whole
from distribution_losses import (
    Discriminator,
    Finding,
    Verdict,
    check_gaussians,
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    relativistic_loss,
    sid_loss,
)
from flow_matching import (
    add_noise,
    classifier_free_guidance,
    expand_time,
    interval_weight,
    sample_time,
    x_0_from_velocity,
)
from objectives import x_0_prediction_loss
from recomputation import frozen
from rollout import PromptSwitch, clamp_to_data, few_step_plan, make_noise_streams, rollout_blocks
from seeds import Purpose, torch_generator
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel
from training_config import SelfForcingConfig, check_num_frames


@dataclass
class Rollout:
    """A batch of generated videos: x_0 (B, F, C, H, W), the last `gradient_frames` of it, and the exit step of each block. Where the
    rollout started earlier, x_0 is the window at its end."""

    x_0: Tensor
    scored: Tensor  # (B, min(F, gradient_frames), C, H, W): what the losses see
    exit_steps: list[int]  # of the blocks that were made; those of the first video, where each has its own; -1 of clean data
    frame_exits: Tensor  # (B, min(F, gradient_frames)): the exit step of every scored frame, -1 of one that was given or is clean data


@dataclass(frozen=True)
class ScorePrompts:
    """One batch of prompts as the generator's judges read them: encoded by the teacher, the null prompt too, and by the critic
    (its average; with the GAN loss the critic itself)."""

    real: PromptContext
    real_null: PromptContext
    fake: PromptContext


def window_starts(config: SelfForcingConfig, num_frames: int) -> range:
    """The frames of a rollout at which a scored window of num_frames may start: 0 alone without `training.rollout_frames`."""
    longest = num_frames if config.rollout_frames is None else config.rollout_frames
    return range(0, longest - num_frames + 1, config.num_frames_per_block)


def draw_window_start(config: SelfForcingConfig, num_frames: int, random: torch.Generator) -> int:
    """One of `window_starts`, uniform, one for the whole batch; draws nothing where there is no choice."""
    starts = window_starts(config, num_frames)
    return starts[int(torch.randint(len(starts), (1,), generator=random))] if len(starts) > 1 else 0


class SelfForcingEngine:
    """The three networks of Self-Forcing and the losses between them.

    generator: the student, trained by `generator_loss`. real_score: the frozen teacher. fake_score: the critic's network.
    critic: what `critic_loss` trains on what the generator makes: fake_score itself, or with the GAN loss a discriminator
    built on it. fake_average: the moving average of fake_score, which is what the generator is judged by: the critic that has
    just learned from a batch is off by far more than generator and teacher differ. The engine owns no optimizer, moves no
    average and draws all randomness from `random`. All networks start as copies of `teacher`, the generator of `start` where one is given.
    share, of its methods: which videos of a batch are at hand, all of them if not given.
    """

    def __init__(
        self, config: SelfForcingConfig, teacher: TinyCausalWanModel, random: torch.Generator, start: TinyCausalWanModel | None = None
    ):
        self.config = config
        self.plan = few_step_plan(config)
        self.random = random
        self.generator = copy.deepcopy(teacher if start is None else start).train().requires_grad_(True)
        self.fake_score = copy.deepcopy(teacher).train().requires_grad_(True)
        self.fake_average = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.real_score = copy.deepcopy(teacher).eval().requires_grad_(False)
        if config.activation_checkpointing:
            for network in self.networks():  # with SiD gradient passes through all
                network.recompute_activations()
        self.critic = Discriminator(self.fake_score).to(next(teacher.parameters()).device) if config.loss == "gan" else self.fake_score

    def networks(self) -> tuple[TinyCausalWanModel, ...]:
        """All that it holds, trained or not."""
        return self.generator, self.fake_score, self.fake_average, self.real_score

    def make_videos(
        self, prompt: PromptContext, num_frames: int, with_gradient: bool, x_real: Tensor | None = None,
        share: BatchShare | None = None, first_frame: int = 0,
    ) -> Rollout:
        """The generator's videos by the configured inputs: a self-rollout, one that goes on from the first block of real videos x_real
        with the configured probability, or x_real noised and denoised."""
        config = self.config
        if config.generator_inputs == "self_rollout" and config.continuation_probability == 0:
            return self.rollout(prompt, num_frames, with_gradient, share, first_frame)
        if x_real is None:
            key = "generator_inputs" if config.generator_inputs != "self_rollout" else "continuation_probability"
            raise ValueError(f"training.{key}={vars(config)[key]} needs real videos: none were given")
        if config.generator_inputs != "self_rollout":
            return self.denoise_real(prompt, x_real, with_gradient, share)
        goes_on = torch.rand((), generator=self.random).item() < config.continuation_probability
        given = x_real[:, : config.context.block_sizes(num_frames, config.num_frames_per_block)[0]] if goes_on else None
        return self.rollout(prompt, num_frames, with_gradient, share, given=given)

    def rollout(
        self, prompt: PromptContext, num_frames: int, with_gradient: bool, share: BatchShare | None = None, first_frame: int = 0,
        given: Tensor | None = None,
    ) -> Rollout:
        """Generate from noise as inference does, stopping at a random exit step (Algorithm 1).

        given: the first block (B, F_block, C, H, W), which is then not made but gone on from; it counts among num_frames.
        first_frame, whole blocks: the num_frames frames are a window that starts there, of a longer rollout that ends with it
        (the idea of Self-Forcing++, arXiv 2510.02283). The blocks before it carry no gradient and walk all steps, whatever the
        exit step: an early exit makes blurred frames, and what is to be corrected is what the window goes on from at
        inference. They are forgotten as they leave the cache, so memory does not grow with first_frame where the cache rolls.
        """
        config = self.config
        check_num_frames("num_frames", num_frames, config.num_frames_per_block, config.independent_first_frame)
        sizes = config.context.block_sizes(num_frames, config.num_frames_per_block)
        num_earlier, rest = divmod(first_frame, config.num_frames_per_block)
        if first_frame < 0 or rest:
            raise ValueError(f"first_frame is {first_frame}: expected 0 or more, a multiple of the block of {config.num_frames_per_block}")
        if given is not None and (first_frame or given.shape[1] != sizes[0] or len(sizes) == 1):
            raise ValueError(f"{given.shape[1]} frames given: expected a first block of {sizes[0]}, first_frame 0 and a block behind it")
        num_given = 0 if given is None else 1  # of the window's blocks
        num_made = num_earlier + len(sizes) - num_given
        num_exits = 1 if config.same_exit_step else len(sizes)
        exits = torch.randint(len(self.plan.times), (num_exits,), generator=self.random).tolist()
        exit_steps = (exits * len(sizes) if config.same_exit_step else exits)[num_given:]
        share = share_or_whole(share, prompt.pooled.shape[0])
        seeds = share.draw(lambda total: torch.randint(2**62, (total,), generator=self.random)).tolist()
        first_scored = max(num_frames - config.gradient_frames, 0)
        first_with_gradient = num_earlier + max(sum(end <= first_scored for end in accumulate(sizes)) - num_given, 0)
        blocks = rollout_blocks(
            self.generator, prompt, make_noise_streams(seeds), num_made, self.plan,
            exit_steps=[len(self.plan.times) - 1] * num_earlier + exit_steps,
            gradient_blocks=range(first_with_gradient, num_made if with_gradient else 0), first_frames=given,
        )
        with torch.set_grad_enabled(with_gradient):
            x_0 = torch.cat([*([] if given is None else [given]), *islice(blocks, num_earlier, None)], dim=1)
            frame_exits = torch.tensor([[-1] * num_given + exit_steps] * len(x_0)).repeat_interleave(torch.tensor(sizes), 1)
            return Rollout(x_0, x_0[:, first_scored:], exit_steps, frame_exits[:, first_scored:])

    def stream(
        self, prompt: PromptContext, seed: int, switch: str = "recache"
    ) -> Generator[Tensor, PromptContext | None, None]:
        """The generator's video of each prompt for ever, one block (B, F_block, C, H, W) at a time, without gradient.

        A prompt that is sent holds from the next block on, which is what `send` returns; switch: see `PromptSwitch`. Video k of
        the batch has the seed `seed` + k. Memory is constant where training has a window, which is that of the length otherwise.
        """
        window = self.config.max_num_frames if self.config.window_frames is None else self.config.window_frames
        plan = replace(self.plan, context=replace(self.plan.context, window_frames=window, hide_first_block=False))
        seeds = list(range(seed, seed + len(prompt.pooled)))
        blocks = rollout_blocks(self.generator, prompt, make_noise_streams(seeds), None, plan)
        sent: PromptContext | None = None
        while True:
            with torch.no_grad():  # closed before the yield: it must not hold for whoever consumes the stream
                block = blocks.send(None if sent is None else PromptSwitch(sent, switch))
            sent = yield block

    def denoise_real(self, prompt: PromptContext, x_real: Tensor, with_gradient: bool, share: BatchShare | None = None) -> Rollout:
        """Noise real videos (B, F, C, H, W), every block to a few-step time of its own, and denoise them in one pass.

        What a block sees of the past is noised too ("diffusion_forced": CausVid, arXiv 2412.07772, section 4.2) or clean
        ("teacher_forced"): in both cases data, never what the generator made, which is what Self-Forcing changes.

        A diffusion-forced block may also be left clean, as the published steps include 0: at that time inference writes finished blocks
        into the cache. Its x_0 is x_real and carries no gradient, as x_0 = x_t - t v, and its exit step is -1.
        """
        block, num_frames = self.config.num_frames_per_block, x_real.shape[1]
        context, share, num_exits = self.config.context, share_or_whole(share, len(x_real)), len(self.plan.times)
        sizes = torch.tensor(context.block_sizes(num_frames, block))
        clean = () if self.config.generator_inputs == "teacher_forced" else (self.plan.context_time,)  # 0: see training_config
        times = torch.tensor([*self.plan.times, *clean])
        exits = share.draw(lambda total: torch.randint(len(times), (total, len(sizes)), generator=self.random))
        t = times[exits.repeat_interleave(sizes, 1)].to(x_real.device)  # (B, F)
        exits = torch.where(exits < num_exits, exits, -1)
        frame_exits = exits.repeat_interleave(sizes, 1)
        x_t = add_noise(x_real, share.draw_normal(tuple(x_real.shape[1:]), self.random).to(x_real.device), t)
        with torch.set_grad_enabled(with_gradient):
            if self.config.generator_inputs == "teacher_forced":
                v = self.generator.forward_teacher_forced(x_t, t, x_real, prompt, block, context)
            else:
                v = self.generator.forward_block_causal(x_t, t, prompt, block, context)
            x_0 = x_0_from_velocity(x_t, v, t)
            x_0 = clamp_to_data(x_0) if self.config.clamp_x_0 else x_0
        scored = slice(max(num_frames - self.config.gradient_frames, 0), None)
        return Rollout(x_0, x_0[:, scored], exits[0].tolist(), frame_exits[:, scored])

    def generator_loss(
        self, x_0: Tensor, prompts: ScorePrompts, x_real: Tensor | None = None, share: BatchShare | None = None
    ) -> tuple[Tensor, Verdict]:
        """The loss that pulls x_0 (B, F, C, H, W) toward the teacher's distribution, or with "gan" that of x_real."""
        if self.config.loss == "gan":
            return self._gan_generator_loss(x_0, prompts.fake, x_real, share)
        if self.config.loss == "sid":
            x_0_fake, x_0_real, t = self._denoised(x_0, prompts, share)  # gradient passes through both scores, which are frozen
            terms, figures = sid_loss(x_0, x_0_fake, x_0_real, self.config.sid_alpha), {}
        else:
            with torch.no_grad():  # the two scores only supply a direction
                x_0_fake, x_0_real, t = self._denoised(x_0.detach(), prompts, share)
                gradient = self.config.dmd_sign * dmd_gradient(x_0.detach(), x_0_fake, x_0_real)
            terms, figures = dmd_loss(x_0, gradient), {"dmd_gradient_norm": gradient.square().mean().sqrt().item()}
        figures["score_distance"] = (x_0_fake - x_0_real).abs().mean().item()
        return terms.mean(), Verdict(terms.detach(), t, figures, x_0.detach(), x_0_fake.detach(), x_0_real.detach())

    def _denoised(self, x_0: Tensor, prompts: ScorePrompts, share: BatchShare | None) -> tuple[Tensor, Tensor, Tensor]:
        """What averaged critic and guided teacher make of x_0 (B, F, C, H, W), noised: x_0_fake and x_0_real; and t (B,)."""
        x_t, t = self._noised(x_0, share)
        x_0_fake = x_0_from_velocity(x_t, self.fake_average.forward_bidirectional(x_t, t, prompts.fake), t)
        cond, uncond = self.real_score.forward_bidirectional(
            torch.cat([x_t, x_t]), torch.cat([t, t]), prompts.real.concatenate(prompts.real_null)
        ).chunk(2)
        weight = expand_time(interval_weight(t, self.config.guidance, self.config.guidance_interval), x_t)
        x_0_real = x_0_from_velocity(x_t, classifier_free_guidance(cond, uncond, weight), t)
        if self.config.clamp_real_score:  # static thresholding (Imagen, arXiv 2205.11487, section 2.3): guidance overshoots
            x_0_real = x_0_real.clamp(-1, 1)
        return x_0_fake, x_0_real, t[:, 0]

    def critic_loss(
        self, x_0: Tensor, fake_prompt: PromptContext, x_real: Tensor | None = None, share: BatchShare | None = None
    ) -> Tensor:
        """Flow matching of the critic on the generator's own videos x_0 (B, F, C, H, W); with "gan" the discriminator's loss."""
        x_0 = x_0.detach()  # the critic's loss must not reach the generator
        if self.config.loss == "gan":
            (fake_t, real_t), t = self._noised_pair(x_0, x_real, share)
            config, logits = self.config, partial(self.critic, t=t, prompt=fake_prompt)
            return discriminator_loss(logits, real_t, fake_t, config.gan_penalty, config.gan_penalty_sigma, self.random, share)
        x_t, t = self._noised(x_0, share)
        v = self.fake_score.forward_bidirectional(x_t, t, fake_prompt)
        return x_0_prediction_loss(v, x_t, x_0, t, self.config.loss_time_floor)

    def _gan_generator_loss(
        self, x_0: Tensor, prompt: PromptContext, x_real: Tensor | None, share: BatchShare | None
    ) -> tuple[Tensor, Verdict]:
        with frozen(self.critic):
            (fake_t, real_t), t = self._noised_pair(x_0, x_real, share)
            fake, real = self.critic(fake_t, t, prompt), self.critic(real_t, t, prompt)
        terms = relativistic_loss(fake, real)
        return terms.mean(), Verdict(terms.detach(), t[:, 0], {"logit_distance": (real - fake).mean().item()})

    def _noised_pair(self, x_0: Tensor, x_real: Tensor | None, share: BatchShare | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Generated and real videos of the same prompts, with noise of their own at the same times."""
        if x_real is None:
            raise ValueError("training.loss=gan compares with real videos: none were given")
        x_t, t = self._noised(x_0, share)
        real = x_real[:, x_real.shape[1] - x_0.shape[1]:]  # the frames that are scored
        eps = share_or_whole(share, len(real)).draw_normal(tuple(real.shape[1:]), self.random).to(real.device)
        return (x_t, add_noise(real, eps, t)), t

    def _noised(self, x_0: Tensor, share: BatchShare | None = None) -> tuple[Tensor, Tensor]:
        """x_t and t, one time per video: uniform, shifted by score_time_shift, scaled into [min_score_time, max_score_time].

        The public code draws a timestep of 1000 and shifts it by 5 for both scores and the critic (its timestep_shift), then clamps
        it into the interval. The default here departs from it: no shift, and never a clamp, which would heap times at the ends.
        """
        low, high = self.config.min_score_time, self.config.max_score_time
        share = share_or_whole(share, len(x_0))
        t = share.draw(lambda total: sample_time((total, 1), self.config.score_time_shift, self.random))
        t = (low + (high - low) * t).to(x_0.device).expand(x_0.shape[:2])
        eps = share.draw_normal(tuple(x_0.shape[1:]), self.random).to(x_0.device)
        return add_noise(x_0, eps, t), t


def self_test() -> bool:
    """Check the rollout and the losses on a small network, print every finding, and say whether all is well."""
    random = torch_generator(0, Purpose.SELF_TEST)
    teacher = TinyCausalWanModel(ModelConfig(frame_size=16, width=48, num_layers=2, num_heads=2, text_width=32))
    with torch.no_grad():
        for parameter in teacher.parameters():  # a fresh network's head and gates are 0, which would hide every error
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=random))
    config = SelfForcingConfig(gradient_frames=6, guidance=1.0)
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
        state = engine.random.get_state()
        rollout = engine.rollout(prompt, 12, with_gradient=True)
        final = engine.random.get_state()
        engine.random.set_state(state)
        torch.randint(len(engine.plan.times), (1,), generator=engine.random)  # the exit step comes first
        seeds = torch.randint(2**62, (2,), generator=engine.random).tolist()
        engine.random.set_state(final)
        plan = replace(engine.plan, times=engine.plan.times[: rollout.exit_steps[0] + 1])
        video = torch.cat(list(rollout_blocks(engine.generator, prompt, make_noise_streams(seeds), 4, plan)), dim=1)
        num_equal += torch.equal(rollout.x_0, video)
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
    null = engine.real_score.encode_prompt(torch.zeros_like(text), mask)
    before = [parameter.clone() for parameter in engine.real_score.parameters()]

    def generator_gradient() -> tuple[float, float]:
        prompts = [score.encode_prompt(text, mask) for score in (engine.real_score, engine.fake_average)]
        x_0 = engine.rollout(engine.generator.encode_prompt(text, mask), 6, with_gradient=True).scored
        loss, verdict = engine.generator_loss(x_0, ScorePrompts(prompts[0], null, prompts[1]))
        loss.backward()
        return _total_gradient(engine.generator), verdict.figures["score_distance"]

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
    engine.critic_loss(x_0, engine.fake_score.encode_prompt(text, mask)).backward()
    own, other = _total_gradient(engine.fake_score), _total_gradient(engine.generator)
    finding = f"the critic's loss gives the critic {own:.1e} and the generator {other:.0f}"
    findings.append((own > 1e-3 and other == 0, finding))
    is_same = all(torch.equal(a, b) for a, b in zip(before, engine.real_score.parameters(), strict=True))
    findings.append((is_same, "the teacher is unchanged, bit for bit"))
    return findings


def _total_gradient(model: TinyCausalWanModel) -> float:
    return sum(parameter.grad.abs().sum().item() for parameter in model.parameters() if parameter.grad is not None)


if __name__ == "__main__":
    raise SystemExit(0 if self_test() else 1)
