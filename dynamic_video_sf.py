"""Self-Forcing: the rollout, and the losses that need no video data (Huang et al. 2025, arXiv 2506.08009).

Dimensions: B batch, F frames, C channels, H height, W width; a rollout makes F frames in blocks of
`num_frames_per_block`.

There is one rollout, `rollout_blocks`. Training, generation and evaluation all call it; training only adds an exit step
and says which blocks carry gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import SelfForcingConfig
from flow_matching import (
    add_noise, classifier_free_guidance, eps_from_velocity, euler_sampler, sampling_times, shift_time, timestep_to_time,
    x_0_from_velocity,
)
from objectives import x_0_prediction_loss
from tiny_causal_wan import KVCache, PromptContext, TinyCausalWanModel

NORMALISER_FLOOR = 1e-3  # of mean |x_0 - x_0_real| in the DMD gradient: no division by zero on a perfect sample


@dataclass(frozen=True)
class RolloutPlan:
    """How a block is denoised. times: descending, each in (0, 1]; one forward pass of the network at each.

    fresh_noise: between two times re-noise the predicted x_0 with new noise (few-step models, as in Self-Forcing's
    Algorithm 1); otherwise keep the predicted noise, which is Euler's method.
    context_time: the time in [0, 1] at which finished blocks enter the cache. window_frames: how many frames a block
    may see, itself included; None for all. guidance: weight of classifier-free guidance, 1 for none.
    """

    times: tuple[float, ...]
    num_frames_per_block: int
    fresh_noise: bool = True
    context_time: float = 0.0
    window_frames: int | None = None
    guidance: float = 1.0


def few_step_plan(config: SelfForcingConfig, window_frames: int | None = None) -> RolloutPlan:
    """The plan of a Self-Forcing model: its denoising steps, warped by the time shift."""
    return RolloutPlan(
        warp_steps(config.denoising_steps, config.time_shift), config.num_frames_per_block,
        context_time=config.context_noise / 1000, window_frames=window_frames,
    )


def warp_steps(denoising_steps: list[int], time_shift: float) -> tuple[float, ...]:
    """Timesteps 1..1000 to shifted times: [1000, 750, 500, 250] at shift 3 are (1, .9, .75, .5)."""
    return tuple(shift_time(timestep_to_time(torch.tensor(denoising_steps)), time_shift).tolist())


def many_step_plan(num_steps: int, time_shift: float, num_frames_per_block: int, guidance: float, window_frames: int | None = None) -> RolloutPlan:
    """Euler's method with num_steps steps a block: how a causal network is sampled that was not distilled."""
    times = tuple(sampling_times(num_steps, time_shift)[:-1].tolist())
    return RolloutPlan(times, num_frames_per_block, fresh_noise=False, window_frames=window_frames, guidance=guidance)


def make_noise_streams(seeds: list[int]) -> list[torch.Generator]:
    """One random stream per video, on the CPU: a video's noise depends on its seed alone, not on batch or device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(streams: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, *shape) standard normal, one slice from each stream."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)


def rollout_blocks(
    model: TinyCausalWanModel, prompt: PromptContext, streams: list[torch.Generator], num_blocks: int, plan: RolloutPlan,
    null_prompt: PromptContext | None = None, exit_steps: list[int] | None = None, first_gradient_block: int | None = None,
) -> Iterator[Tensor]:
    """Make a video block by block (Self-Forcing, Algorithm 1); yields x_0 of each block, (B, F_block, C, H, W).

    exit_steps: per block, the index into `plan.times` whose prediction is the result; None for the last.
    first_gradient_block: from this block on, the exit step's forward pass carries gradient; None for no gradient.
    null_prompt: the unconditional branch, needed where plan.guidance is not 1.
    """
    if plan.guidance != 1.0:
        if null_prompt is None:
            raise ValueError(f"guidance {plan.guidance} needs the null prompt")
        prompt = prompt.concatenate(null_prompt)
    device = next(model.parameters()).device
    config = model.config
    shape = (plan.num_frames_per_block, config.channels, config.frame_size, config.frame_size)
    cache = model.new_cache(plan.window_frames)
    for block in range(num_blocks):
        carries_gradient = first_gradient_block is not None and block >= first_gradient_block
        exit_step = len(plan.times) - 1 if exit_steps is None else exit_steps[block]
        x_t = draw_noise(streams, shape, device)
        for step in range(exit_step + 1):
            t = torch.full(x_t.shape[:2], plan.times[step], device=device)
            # Only the exit step's pass builds a graph: the steps before it are inference, simulated.
            with torch.set_grad_enabled(carries_gradient and step == exit_step):
                v = _guided_velocity(model, x_t, t, prompt, cache, plan.guidance)
                x_0 = x_0_from_velocity(x_t, v, t)
            if step < exit_step:
                eps = draw_noise(streams, shape, device) if plan.fresh_noise else eps_from_velocity(x_t, v, t)
                x_t = add_noise(x_0, eps, torch.full_like(t, plan.times[step + 1]))
        yield x_0
        if block + 1 < num_blocks:
            _write_context(model, x_0.detach(), prompt, cache, plan, streams)


def _guided_velocity(
    model: TinyCausalWanModel, x_t: Tensor, t: Tensor, prompt: PromptContext, cache: KVCache, guidance: float
) -> Tensor:
    if guidance == 1.0:
        return model.forward_cached(x_t, t, prompt, cache)
    cond, uncond = model.forward_cached(torch.cat([x_t, x_t]), torch.cat([t, t]), prompt, cache).chunk(2)
    return classifier_free_guidance(cond, uncond, guidance)


def _write_context(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, cache: KVCache, plan: RolloutPlan, streams: list[torch.Generator]
) -> None:
    """Run the finished block once more at the context time to append its keys and values."""
    t = torch.full(x_0.shape[:2], plan.context_time, device=x_0.device)
    x = x_0 if plan.context_time == 0 else add_noise(x_0, draw_noise(streams, tuple(x_0.shape[1:]), x_0.device), t)
    if plan.guidance != 1.0:
        x, t = torch.cat([x, x]), torch.cat([t, t])
    model.write_cache(x, t, prompt, cache)


@torch.no_grad()
def sample_bidirectional(
    model: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[torch.Generator], num_frames: int,
    num_steps: int, time_shift: float, guidance: float,
) -> Tensor:
    """The teacher's own sampler: all frames at once, Euler's method with guidance. Returns (B, F, C, H, W)."""
    both = prompt.concatenate(null_prompt)

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        if guidance == 1.0:
            return model.forward_bidirectional(x, t, prompt)
        cond, uncond = model.forward_bidirectional(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return classifier_free_guidance(cond, uncond, guidance)

    config = model.config
    shape = (num_frames, config.channels, config.frame_size, config.frame_size)
    noise = draw_noise(streams, shape, next(model.parameters()).device)
    return euler_sampler(velocity_fn, noise, sampling_times(num_steps, time_shift))


def dmd_gradient(x_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """(x_0_fake - x_0_real) / mean |x_0 - x_0_real|, the mean over each sample (DMD, arXiv 2311.18828, Eqs. 7 and 8).

    All (B, ...). The difference of the two scores' denoised estimates points away from the teacher's distribution.
    """
    normaliser = (x_0 - x_0_real).abs().flatten(1).mean(1).clamp(min=NORMALISER_FLOOR)
    return torch.nan_to_num((x_0_fake - x_0_real) / normaliser.view(-1, *(1,) * (x_0.ndim - 1)))


def dmd_loss(x_0: Tensor, gradient: Tensor) -> Tensor:
    """0.5 MSE(x_0, stop_grad(x_0 - gradient)): its derivative by x_0 is gradient / numel (arXiv 2405.14867)."""
    target = (x_0 - gradient).detach()  # the scores are constants here: no gradient into teacher or critic
    return 0.5 * (x_0 - target).square().mean()


@dataclass
class Rollout:
    """A batch of self-generated videos: x_0 (B, F, C, H, W), the last `gradient_frames` of it, and the exit steps."""

    x_0: Tensor
    scored: Tensor  # (B, min(F, gradient_frames), C, H, W): what the losses see
    exit_steps: list[int]


class SelfForcingEngine:
    """The three networks of Self-Forcing and the losses between them.

    generator: the student, trained by `generator_loss`. real_score: the frozen teacher. fake_score: the critic, trained
    by `critic_loss` on what the generator makes. The engine owns no optimizer and draws all randomness from `random`.
    """

    def __init__(self, config: SelfForcingConfig, teacher: TinyCausalWanModel, random: torch.Generator):
        self.config = config
        self.plan = few_step_plan(config)
        self.random = random
        self.generator = copy.deepcopy(teacher).train().requires_grad_(True)
        self.fake_score = copy.deepcopy(teacher).train().requires_grad_(True)
        self.real_score = copy.deepcopy(teacher).eval().requires_grad_(False)

    def rollout(self, prompt: PromptContext, num_frames: int, with_gradient: bool) -> Rollout:
        """Generate from noise as inference does, stopping at a random exit step (Algorithm 1)."""
        config = self.config
        num_blocks = num_frames // config.num_frames_per_block
        num_exits = 1 if config.same_exit_step else num_blocks
        exits = torch.randint(len(self.plan.times), (num_exits,), generator=self.random).tolist()
        exit_steps = exits * num_blocks if config.same_exit_step else exits
        seeds = torch.randint(2**62, (prompt.pooled.shape[0],), generator=self.random).tolist()
        first_scored = max(num_frames - config.gradient_frames, 0)
        blocks = rollout_blocks(
            self.generator, prompt, make_noise_streams(seeds), num_blocks, self.plan, exit_steps=exit_steps,
            first_gradient_block=first_scored // config.num_frames_per_block if with_gradient else None,
        )
        with torch.set_grad_enabled(with_gradient):
            x_0 = torch.cat(list(blocks), dim=1)
            return Rollout(x_0, x_0[:, first_scored:], exit_steps)

    def generator_loss(
        self, x_0: Tensor, real_prompt: PromptContext, real_null_prompt: PromptContext, fake_prompt: PromptContext
    ) -> tuple[Tensor, dict[str, float]]:
        """Distribution matching (DMD): the loss that pulls x_0 (B, F, C, H, W) toward the teacher's distribution.

        real_prompt and real_null_prompt are encoded by the teacher, fake_prompt by the critic.
        """
        with torch.no_grad():  # the two scores only supply a direction
            x_t, t = self._noised(x_0.detach())
            x_0_fake = x_0_from_velocity(x_t, self.fake_score.forward_bidirectional(x_t, t, fake_prompt), t)
            cond, uncond = self.real_score.forward_bidirectional(
                torch.cat([x_t, x_t]), torch.cat([t, t]), real_prompt.concatenate(real_null_prompt)
            ).chunk(2)
            x_0_real = x_0_from_velocity(x_t, classifier_free_guidance(cond, uncond, self.config.guidance), t)
            gradient = dmd_gradient(x_0.detach(), x_0_fake, x_0_real)
        figures = {
            "dmd_gradient_norm": gradient.square().mean().sqrt().item(),
            "score_distance": (x_0_fake - x_0_real).abs().mean().item(),
        }
        return dmd_loss(x_0, gradient), figures

    def critic_loss(self, x_0: Tensor, fake_prompt: PromptContext) -> Tensor:
        """Flow matching of the critic on the generator's own videos x_0 (B, F, C, H, W)."""
        x_0 = x_0.detach()  # the critic's loss must not reach the generator
        x_t, t = self._noised(x_0)
        v = self.fake_score.forward_bidirectional(x_t, t, fake_prompt)
        return x_0_prediction_loss(v, x_t, x_0, t, self.config.loss_time_floor)

    def _noised(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t, one uniform time in [min_score_time, max_score_time] per video."""
        low, high = self.config.min_score_time, self.config.max_score_time
        t = (low + (high - low) * torch.rand((x_0.shape[0], 1), generator=self.random)).to(x_0.device).expand(x_0.shape[:2])
        eps = torch.randn(x_0.shape, generator=self.random).to(x_0.device)
        return add_noise(x_0, eps, t), t
