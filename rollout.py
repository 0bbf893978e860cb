"""The rollout: how a video is made, block by block with a KV cache (Huang et al. 2025, arXiv 2506.08009, Algorithm 1).

Dimensions: B batch, F frames, C channels, H height, W width; a rollout makes F frames in blocks of
`num_frames_per_block`.

There is one rollout, `rollout_blocks`. Training, generation and evaluation all call it; training only adds an exit step
and says which blocks carry gradient. The bidirectional teacher, which makes all frames at once, has a sampler beside it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from attention import WHOLE_PAST, ContextWindow
from flow_matching import (
    add_noise,
    ancestral_sampler,
    classifier_free_guidance,
    eps_from_velocity,
    euler_sampler,
    projected_guidance,
    sampling_times,
    shift_time,
    timestep_to_time,
    x_0_from_velocity,
)
from kv_cache import KVCache
from seeds import Purpose, stream
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training_config import FewStepConfig

SWITCHES = ("recache", "keep", "reset")


@dataclass(frozen=True)
class RolloutPlan:
    """How a block is denoised. times: descending, each in (0, 1]; one forward pass of the network at each.

    fresh_noise: between two times re-noise the predicted x_0 with new noise (few-step models, as in Self-Forcing's
    Algorithm 1); otherwise keep the predicted noise, which is Euler's method.
    context_time: the time in [0, 1] at which finished blocks enter the cache. context: what a block may see of the past.
    guidance: weight of classifier-free guidance, 1 for none. clamp_x_0: keep every predicted x_0 in [-1, 1], as data are,
    see `clamp_to_data`.
    """

    times: tuple[float, ...]
    num_frames_per_block: int
    fresh_noise: bool = True
    context_time: float = 0.0
    context: ContextWindow = WHOLE_PAST
    guidance: float = 1.0
    clamp_x_0: bool = False

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that denoise one block: one at each time, two under guidance (prompt and null prompt)."""
        return len(self.times) * self.cache_evaluations

    @property
    def cache_evaluations(self) -> int:
        """Evaluations that write one finished block into the cache: 1, or 2 under guidance. They count in full although they may share
        a pass with the next block's first; a video's last block needs none."""
        return 1 if self.guidance == 1.0 else 2


def few_step_plan(config: FewStepConfig, context: ContextWindow | None = None) -> RolloutPlan:
    """The plan of a few-step model: its denoising steps, warped by the time shift. context: that of its training if not given."""
    return RolloutPlan(
        warp_steps(config.denoising_steps, config.time_shift), config.num_frames_per_block,
        context_time=config.context_time, context=config.context if context is None else context, clamp_x_0=config.clamp_x_0,
    )


def warp_steps(denoising_steps: list[int], time_shift: float) -> tuple[float, ...]:
    """Timesteps 1..1000 to shifted times: [1000, 750, 500, 250] at shift 3 are (1, .9, .75, .5)."""
    return tuple(shift_time(timestep_to_time(torch.tensor(denoising_steps)), time_shift).tolist())


def many_step_plan(
    num_steps: int, time_shift: float, num_frames_per_block: int, guidance: float, context: ContextWindow = WHOLE_PAST,
    context_time: float = 0.0,
) -> RolloutPlan:
    """Euler's method with num_steps steps a block: how a causal network is sampled that was not distilled."""
    times = tuple(sampling_times(num_steps, time_shift)[:-1].tolist())
    return RolloutPlan(times, num_frames_per_block, False, context_time, context, guidance)


def make_noise_streams(seeds: list[int]) -> list[np.random.Generator]:
    """One random stream per video, on the CPU: a video's noise depends on its seed alone, not on batch or device."""
    return [stream(seed, 0, Purpose.NOISE) for seed in seeds]


def draw_noise(streams: list[np.random.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, *shape) standard normal, float32, one slice from each stream."""
    return torch.from_numpy(np.stack([each.standard_normal(shape, dtype=np.float32) for each in streams])).to(device)


def clamp_to_data(x_0: Tensor) -> Tensor:
    """x_0 cut to [-1, 1], with the gradient passed straight through: what the losses see is what is shown, and a value beyond the
    range is still pulled back (static thresholding, arXiv 2205.11487, section 2.3; straight-through, arXiv 1308.3432)."""
    return x_0 + (x_0.clamp(-1, 1) - x_0).detach()


@dataclass(frozen=True)
class PromptSwitch:
    """From the next block on, another prompt. how: what becomes of the cache, one of `SWITCHES`.

    "recache": computed anew with the new prompt over the frames that are still visible (LongLive, arXiv 2509.22622, section
    3.2). "keep": stays as it is, written under the old prompt. "reset": emptied, so that nothing of the past is seen.
    null_prompt: under guidance, as many null prompts.
    """

    prompt: PromptContext
    how: str = "recache"
    null_prompt: PromptContext | None = None

    def __post_init__(self) -> None:
        if self.how not in SWITCHES:
            raise ValueError(f"switch is {self.how}: expected one of {', '.join(SWITCHES)}")


class _Past:
    """What a rollout has made so far: the cache, and the frames in it, from which it can be made anew for another prompt.

    The pass that writes a finished block waits for the next block's first pass and joins it, unless it is settled before.
    """

    def __init__(self, model: TinyCausalWanModel, plan: RolloutPlan, streams: list[np.random.Generator]):
        self.model, self.plan, self.streams = model, plan, streams
        self.cache = self._new_cache()
        self._waiting: tuple[Tensor, Tensor, PromptContext] | None = None  # a finished block as the cache shall see it
        self._sink: list[Tensor] = []  # frames of the sink
        self._blocks: list[Tensor] = []  # blocks of which a frame is visible besides

    def _new_cache(self) -> KVCache:
        return self.model.new_cache(self.plan.context.window_frames, self.plan.context.sink_frames)

    def write(self, x_0: Tensor, prompt: PromptContext) -> None:
        """A finished block joins the past: its keys and values at the context time, the cache."""
        self.settle()
        self._waiting = self._as_context(x_0, prompt)
        window, sink = self.plan.context.window_frames, self.plan.context.sink_frames
        missing = sink - sum(frames.shape[1] for frames in self._sink)
        if missing > 0:
            self._sink.append(x_0[:, :missing])
            x_0 = x_0[:, missing:]
        self._blocks += [x_0] if x_0.shape[1] else []
        if window is not None:
            visible = window - sink - self.plan.num_frames_per_block  # what the next block sees behind the sink
            while self._blocks and sum(block.shape[1] for block in self._blocks[1:]) >= visible:
                del self._blocks[0]

    def settle(self) -> None:
        """Run the pass that waits."""
        if self._waiting is not None:
            (x, t, prompt), self._waiting = self._waiting, None
            self.model.write_cache(x, t, prompt, self.cache)

    def forward(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """v (B, F_block, C, H, W) of the block at hand, seeing the past."""
        if self._waiting is None or self._waiting[2] is not prompt:
            self.settle()
            return self.model.forward_cached(x_t, t, prompt, self.cache)
        (x, t_x, _), self._waiting = self._waiting, None
        return self.model.write_and_forward(x, t_x, x_t, t, prompt, self.cache)

    def recache(self, prompt: PromptContext) -> None:
        """Make the cache anew for another prompt, over the frames that the next block sees."""
        self.cache, self._waiting = self._new_cache(), None
        for x_0 in [*self._sink, *self._blocks]:
            self.settle()
            self._waiting = self._as_context(x_0, prompt)

    def reset(self) -> None:
        """Forget everything."""
        self.cache, self._waiting, self._sink, self._blocks = self._new_cache(), None, [], []

    def _as_context(self, x_0: Tensor, prompt: PromptContext) -> tuple[Tensor, Tensor, PromptContext]:
        t = torch.full(x_0.shape[:2], self.plan.context_time, device=x_0.device)
        x = x_0
        if self.plan.context_time != 0:
            x = add_noise(x_0, draw_noise(self.streams, tuple(x_0.shape[1:]), x_0.device), t)
        return (x, t, prompt) if self.plan.guidance == 1.0 else (torch.cat([x, x]), torch.cat([t, t]), prompt)


def rollout_blocks(
    model: TinyCausalWanModel, prompt: PromptContext, streams: list[np.random.Generator], num_blocks: int | None, plan: RolloutPlan,
    null_prompt: PromptContext | None = None, exit_steps: list[int] | None = None, gradient_blocks: range = range(0),
    trace: list[list[Tensor]] | None = None, first_frames: Tensor | None = None,
) -> Generator[Tensor, PromptSwitch | None, None]:
    """Make a video block by block (Self-Forcing, Algorithm 1); yields x_0 of each block, (B, F_block, C, H, W).

    num_blocks: None for no end. A `PromptSwitch` that is sent between two blocks holds from the next one on.
    exit_steps: per block, the index into `plan.times` whose prediction is the result; None for the last.
    gradient_blocks: in these the exit step's forward pass carries gradient. null_prompt: the unconditional branch, needed
    where plan.guidance is not 1. trace: collects, for each block, its x_t at every time of the walk. first_frames: frames
    (B, F, C, H, W) that come before the first block and are only written into the cache, see `split_first_frames`.
    """
    prompt = _both_branches(prompt, null_prompt, plan)
    device = next(model.parameters()).device
    past = _Past(model, plan, streams)
    for frames in () if first_frames is None else split_first_frames(first_frames, plan):
        past.write(frames.to(device), prompt)
    for block in count() if num_blocks is None else range(num_blocks):
        if plan.context.hide_first_block and 0 < block == (num_blocks or 0) - 1:
            past.settle()
            past.cache.forget_first(_block_frames(plan, 0, first_frames))
        exit_step = len(plan.times) - 1 if exit_steps is None else exit_steps[block]
        walk: list[Tensor] = []
        num_frames = _block_frames(plan, block, first_frames)
        x_0 = _denoise_block(past, prompt, num_frames, exit_step, block in gradient_blocks, walk)
        if trace is not None:
            trace.append(walk)
        switch = yield x_0
        if block + 1 == num_blocks:
            return
        if switch is None or switch.how != "reset":
            past.write(x_0.detach(), prompt)  # the cache never carries gradient
        if switch is not None:
            prompt = _both_branches(switch.prompt, switch.null_prompt, plan)
            if switch.how == "recache":
                past.recache(prompt)
            if switch.how == "reset":
                past.reset()


def _denoise_block(
    past: _Past, prompt: PromptContext, num_frames: int, exit_step: int, carries_gradient: bool, walk: list[Tensor]
) -> Tensor:
    """x_0 of the next block, predicted at the exit step; walk collects its x_t on the way there."""
    plan, config = past.plan, past.model.config
    draw = partial(
        draw_noise, past.streams, (num_frames, config.channels, config.frame_size, config.frame_size), next(past.model.parameters()).device
    )
    x_t = draw()
    if exit_step == 0:
        past.settle()  # in training the first pass is then one with gradient: inference that stops there must make the same bits
    for step in range(exit_step + 1):
        walk.append(x_t)
        t = torch.full(x_t.shape[:2], plan.times[step], device=x_t.device)
        # Only the exit step's pass builds a graph: the steps before it are inference, simulated.
        with torch.set_grad_enabled(carries_gradient and step == exit_step):
            v = _guided_velocity(past, x_t, t, prompt)
            x_0 = x_0_from_velocity(x_t, v, t)
            if plan.clamp_x_0:
                x_0 = clamp_to_data(x_0)
        if step < exit_step:
            eps = draw() if plan.fresh_noise else eps_from_velocity(x_t, v, t)
            x_t = add_noise(x_0, eps, torch.full_like(t, plan.times[step + 1]))
    return x_0


def _both_branches(prompt: PromptContext, null_prompt: PromptContext | None, plan: RolloutPlan) -> PromptContext:
    if plan.guidance == 1.0:
        return prompt
    if null_prompt is None:
        raise ValueError(f"guidance {plan.guidance} needs the null prompt")
    return prompt.concatenate(null_prompt)


def _block_frames(plan: RolloutPlan, block: int, first_frames: Tensor | None) -> int:
    is_first_frame = plan.context.independent_first_frame and block == 0 and first_frames is None
    return 1 if is_first_frame else plan.num_frames_per_block


def split_first_frames(frames: Tensor, plan: RolloutPlan) -> tuple[Tensor, ...]:
    """Given frames (B, F, C, H, W) as the blocks that go before the first: whole blocks, one picture alone, or where the
    first frame is a block of its own that and whole blocks. Raises ValueError."""
    num_frames, block = frames.shape[1], plan.num_frames_per_block
    if num_frames == 1:
        return (frames,)
    first = 1 if plan.context.independent_first_frame else 0
    if num_frames < 1 or (num_frames - first) % block:
        counts = ", ".join(str(first + block * k) for k in range(1, 4))
        raise ValueError(f"{num_frames} frames to go on from: expected 1, or as many as blocks of {block} make up, such as {counts}")
    return frames.split([1] * first + [block] * ((num_frames - first) // block), dim=1)


def _guided_velocity(past: _Past, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
    if past.plan.guidance == 1.0:
        return past.forward(x_t, t, prompt)
    cond, uncond = past.forward(torch.cat([x_t, x_t]), torch.cat([t, t]), prompt).chunk(2)
    return classifier_free_guidance(cond, uncond, past.plan.guidance)


@dataclass(frozen=True)
class BidirectionalPlan:
    """How the teacher is sampled: all frames at once, in num_steps guided steps. guidance: 1 for none. eta: how much of a
    step's noise is fresh, see `fresh_share`: 0 is Euler's method, 1 ancestral sampling. ink_kept: of what guidance adds along the
    predicted ink, the share that is kept, see `projected_guidance`: 1 is classifier-free guidance."""

    num_steps: int
    time_shift: float
    guidance: float
    eta: float = 0.0
    ink_kept: float = 1.0

    @property
    def evaluations(self) -> int:
        """Evaluations of the network in which one block is denoised, with all others: one a step, two under guidance."""
        return self.num_steps * (1 if self.guidance == 1.0 else 2)

    @property
    def cache_evaluations(self) -> int:
        """0: there is no cache."""
        return 0


@torch.no_grad()
def sample_bidirectional(
    model: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[np.random.Generator], num_frames: int,
    plan: BidirectionalPlan, trace: list[Tensor] | None = None,
) -> Tensor:
    """The teacher's own sampler. Returns (B, F, C, H, W). trace: collects x_t at every time at which the network is asked."""
    both = prompt.concatenate(null_prompt)

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        if trace is not None:
            trace.append(x)
        if plan.guidance == 1.0:
            return model.forward_bidirectional(x, t, prompt)
        cond, uncond = model.forward_bidirectional(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        if plan.ink_kept == 1.0:
            return classifier_free_guidance(cond, uncond, plan.guidance)
        return projected_guidance(cond, uncond, plan.guidance, x_0_from_velocity(x, cond, t) + 1, plan.ink_kept)

    config = model.config
    shape = (num_frames, config.channels, config.frame_size, config.frame_size)
    draw, times = partial(draw_noise, streams, shape, next(model.parameters()).device), sampling_times(plan.num_steps, plan.time_shift)
    if plan.eta == 0:
        return euler_sampler(velocity_fn, draw(), times)
    return ancestral_sampler(velocity_fn, draw(), times, plan.eta, draw)
