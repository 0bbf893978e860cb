"""Self-Forcing (Huang et al. 2025, arXiv 2506.08009): the rollout, and the engine that trains it to match a distribution.

Dimensions: B batch, F frames, C channels, H height, W width; a rollout makes F frames in blocks of
`num_frames_per_block`.

There is one rollout, `rollout_blocks` (Algorithm 1). Training, generation and evaluation all call it; training only adds an exit
step and says which blocks carry gradient. The bidirectional teacher, which makes all frames at once, has a sampler beside it.

    python dynamic_video_sf.py    check the rollout and the losses on a small case
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import copy
import runpy
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count

import numpy as np
import torch
from torch import Tensor

from machine.batch_share import BatchShare, share_or_whole
from machine.paths import REPOSITORY
from machine.seeds import Purpose, stream
from method.choices import SWITCHES
from method.flow_matching import (
    add_noise,
    ancestral_sampler,
    classifier_free_guidance,
    eps_from_velocity,
    euler_sampler,
    even_times,
    expand_time,
    interval_weight,
    projected_guidance,
    sampling_times,
    x_0_from_velocity,
)
from method.losses import Verdict, discriminator_loss, dmd_gradient, dmd_loss, relativistic_loss, sid_loss, x_0_prediction_loss
from method.plans import BidirectionalPlan, RolloutPlan, few_step_plan
from method.settings import SelfForcingConfig, check_num_frames
from network.discriminator import Discriminator
from network.recomputation import frozen
from tiny_causal_wan import PromptContext, TinyCausalWanModel

# ------------------------------------------------------------------------------------------------------------ the rollout


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


def predict_x_0(x_t: Tensor, v: Tensor, t: Tensor, plan: RolloutPlan) -> Tensor:
    """x_0 of x_t (B, F, C, H, W) by its velocity, kept in [-1, 1] if the plan says so."""
    x_0 = x_0_from_velocity(x_t, v, t)
    return clamp_to_data(x_0) if plan.clamp_x_0 else x_0


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


class Past:
    """The blocks made so far: the cache, and the frames in it, from which it can be made again for another prompt.

    `append` defers the pass that writes a finished block; the next block's first pass then does both in one. `flush` runs it alone.
    """

    def __init__(self, model: TinyCausalWanModel, plan: RolloutPlan, streams: list[np.random.Generator]):
        self.model, self.plan, self.streams = model, plan, streams
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache = self.model.new_cache(self.plan.context.window_frames, self.plan.context.sink_frames)
        self._deferred: tuple[Tensor, Tensor, PromptContext] | None = None  # a finished block as the cache is to see it
        self._sink: list[Tensor] = []  # the blocks, whole, that frames of the sink belong to
        self._blocks: list[Tensor] = []  # later blocks of which a frame is still visible
        self._num_frames = 0  # appended so far

    def append(self, x_0: Tensor, prompt: PromptContext) -> None:
        """Add a finished block x_0 (B, F_block, C, H, W): its keys and values at the context time join the cache."""
        self._write(x_0, prompt)
        belongs_to_sink = self._num_frames < self.plan.context.sink_frames
        (self._sink if belongs_to_sink else self._blocks).append(x_0)
        self._num_frames += x_0.shape[1]
        while self._blocks and sum(block.shape[1] for block in self._blocks[1:]) >= self._num_frames - self._first_visible():
            del self._blocks[0]

    def encode_again(self, prompt: PromptContext) -> None:
        """Make the cache again under another prompt, from the frames that the next block sees, block by block as they were made:
        frames of one block see each other."""
        sink, blocks, num_frames = self._sink, self._blocks, self._num_frames
        end_of_sink = min(sum(block.shape[1] for block in sink), self._first_visible())
        self.clear()
        for x_0 in sink:
            self._write(x_0, prompt)
        if end_of_sink > self.plan.context.sink_frames:  # the rest of the sink's last block, as far as it has left the window
            self.flush()
            self.cache.forget_behind_sink(end_of_sink - self.plan.context.sink_frames)
        for x_0 in blocks:
            self._write(x_0, prompt)
        self._sink, self._blocks, self._num_frames = sink, blocks, num_frames

    def _first_visible(self) -> int:
        """The number of the first frame behind the sink that the next block sees."""
        window, sink = self.plan.context.window_frames, self.plan.context.sink_frames
        if window is None:
            return 0
        return self._num_frames - (window - sink - self.plan.num_frames_per_block)

    def forget_first(self, num_frames: int) -> None:
        """Hide the first num_frames frames from what follows."""
        self.flush()
        self.cache.forget_first(num_frames)

    def velocity(self, x_t: Tensor, t: Tensor, prompt: PromptContext, is_last: bool) -> Tensor:
        """v (B, F_block, C, H, W) of the next block, which sees the past; under the plan's guidance.

        A walk's last pass runs alone, whether or not it carries gradient: so training and inference make the same bits.
        """
        if self.plan.guidance == 1.0:
            return self._forward(x_t, t, prompt, is_last)
        cond, uncond = self._forward(torch.cat([x_t, x_t]), torch.cat([t, t]), prompt, is_last).chunk(2)
        return classifier_free_guidance(cond, uncond, self.plan.guidance)

    def flush(self) -> None:
        """Run the deferred pass now."""
        if self._deferred is not None:
            (x, t, prompt), self._deferred = self._deferred, None
            self.model.write_cache(x, t, prompt, self.cache)

    def _forward(self, x_t: Tensor, t: Tensor, prompt: PromptContext, is_last: bool) -> Tensor:
        if is_last or self._deferred is None or self._deferred[2] is not prompt:
            self.flush()
            return self.model.forward_cached(x_t, t, prompt, self.cache)
        (x, t_x, _), self._deferred = self._deferred, None
        return self.model.write_and_forward(x, t_x, x_t, t, prompt, self.cache)

    def _write(self, x_0: Tensor, prompt: PromptContext) -> None:
        self.flush()
        x, t = x_0, torch.full(x_0.shape[:2], self.plan.context_time, device=x_0.device)
        if self.plan.context_time != 0:
            x = add_noise(x_0, draw_noise(self.streams, tuple(x_0.shape[1:]), x_0.device), t)
        self._deferred = (x, t, prompt) if self.plan.guidance == 1.0 else (torch.cat([x, x]), torch.cat([t, t]), prompt)


def rollout_blocks(
    model: TinyCausalWanModel, prompt: PromptContext, streams: list[np.random.Generator], num_blocks: int | None, plan: RolloutPlan,
    null_prompt: PromptContext | None = None, exit_steps: list[int] | None = None, gradient_blocks: range = range(0),
    trace: list[list[Tensor]] | None = None, first_frames: Tensor | None = None, finished: list[Tensor] | None = None,
) -> Generator[Tensor, PromptSwitch | None, None]:
    """Make a video block by block (Self-Forcing, Algorithm 1); yields x_0 of each block, (B, F_block, C, H, W).

    num_blocks: None for no end. A `PromptSwitch` that is sent between two blocks holds from the next one on.
    exit_steps: per block, the index into `plan.times` whose prediction is the result; None for the last.
    gradient_blocks: in these the exit step's forward pass carries gradient. null_prompt: the unconditional branch, needed
    where plan.guidance is not 1. trace: collects, for each block, its x_t at every time of the walk. first_frames: frames
    (B, F, C, H, W) that come before the first block and are only written into the cache, see `split_first_frames`. finished: collects
    every block as inference makes it. Blocks then walk on past their exit step, and the finished ones enter the cache; without it the
    walk stops there, and what it predicted enters.
    """
    config, device = model.config, next(model.parameters()).device
    prompt = _both_branches(prompt, null_prompt, plan)
    past = Past(model, plan, streams)
    for frames in () if first_frames is None else split_first_frames(first_frames, plan):
        past.append(frames.to(device), prompt)
    for block in count() if num_blocks is None else range(num_blocks):
        if plan.context.hide_first_block and 0 < block == (num_blocks or 0) - 1:
            past.forget_first(_block_frames(plan, 0, first_frames))
        exit_step = len(plan.times) - 1 if exit_steps is None else exit_steps[block]
        # 1. Start from noise.
        shape = (_block_frames(plan, block, first_frames), config.channels, config.frame_size, config.frame_size)
        x_t, walk = draw_noise(streams, shape, device), []
        last_step = exit_step if finished is None else len(plan.times) - 1
        for step in range(last_step + 1):
            walk.append(x_t)
            t = torch.full(x_t.shape[:2], plan.times[step], device=device)
            # 2. Predict x_0. Only the exit step builds a graph: the other steps simulate inference.
            has_gradient = block in gradient_blocks and step == exit_step
            with torch.set_grad_enabled(has_gradient and finished is None):
                v = past.velocity(x_t, t, prompt, is_last=step == last_step)
                x_0 = predict_x_0(x_t, v, t, plan)
            if step == exit_step:
                x_0_exit = x_0
                if has_gradient and finished is not None:  # once more: the video itself is made as at inference, bit for bit
                    with torch.enable_grad():
                        x_0_exit = predict_x_0(x_t, past.velocity(x_t, t, prompt, is_last=True), t, plan)
            # 3. Noise it to the next time: with fresh noise, or along the ODE with the noise that was predicted.
            if step < last_step:
                eps = draw_noise(streams, shape, device) if plan.fresh_noise else eps_from_velocity(x_t, v, t)
                x_t = add_noise(x_0, eps, torch.full_like(t, plan.times[step + 1]))
        if trace is not None:
            trace.append(walk)
        if finished is not None:
            finished.append(x_0)
        # 4. Hand the block out; a new prompt may come back.
        switch = yield x_0_exit
        if block + 1 == num_blocks:
            return
        # 5. Write it into the cache, without gradient, unless a new prompt starts from nothing.
        if switch is None or switch.how != "reset":
            past.append(x_0.detach(), prompt)
        if switch is not None:
            prompt = _both_branches(switch.prompt, switch.null_prompt, plan)
            if switch.how == "recache":
                past.encode_again(prompt)
            if switch.how == "reset":
                past.clear()


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


# ------------------------------------------------------------------------------------------------------------- the engine


@dataclass
class Rollout:
    """A batch of generated videos: x_0 (B, F, C, H, W), the last `gradient_frames` of it, and the exit step of each block. Where the
    rollout started earlier, x_0 is the window at its end."""

    x_0: Tensor
    scored: Tensor  # (B, min(F, gradient_frames), C, H, W): what the generator's loss sees
    finished: Tensor  # of the same frames, without gradient: what the critic learns from
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
            raise ValueError(f"training.{key}={getattr(config, key)} needs real videos: none were given")
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
        last_step = len(self.plan.times) - 1
        exits = [last_step] * num_exits  # as at inference, where nothing but the finished video is asked for
        if with_gradient or not config.finish_blocks:
            exits = torch.randint(len(self.plan.times), (num_exits,), generator=self.random).tolist()
        exit_steps = (exits * len(sizes) if config.same_exit_step else exits)[num_given:]
        share = share_or_whole(share, prompt.pooled.shape[0])
        seeds = share.draw(lambda total: torch.randint(2**62, (total,), generator=self.random)).tolist()
        first_scored = max(num_frames - config.gradient_frames, 0)
        first_with_gradient = num_earlier + max(sum(end <= first_scored for end in accumulate(sizes)) - num_given, 0)
        made: list[Tensor] | None = [] if config.finish_blocks else None
        blocks = rollout_blocks(
            self.generator, prompt, make_noise_streams(seeds), num_made, self.plan, exit_steps=[last_step] * num_earlier + exit_steps,
            gradient_blocks=range(first_with_gradient, num_made if with_gradient else 0), first_frames=given, finished=made,
        )
        for _ in range(num_earlier):  # forgotten at once: memory must not grow with what the window does not show
            next(blocks)
            if made is not None:
                made.clear()
        before = [] if given is None else [given]
        with torch.set_grad_enabled(with_gradient):
            x_0 = torch.cat([*before, *blocks], dim=1)
            finished = x_0.detach() if made is None else torch.cat([*before, *made], dim=1)
            frame_exits = torch.tensor([[-1] * num_given + exit_steps] * len(x_0)).repeat_interleave(torch.tensor(sizes), 1)
            return Rollout(x_0, x_0[:, first_scored:], finished[:, first_scored:], exit_steps, frame_exits[:, first_scored:])

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
        return Rollout(x_0, x_0[:, scored], x_0[:, scored].detach(), exits[0].tolist(), frame_exits[:, scored])

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
        if self.config.guidance_ink_kept == 1.0:
            x_0_real = x_0_from_velocity(x_t, classifier_free_guidance(cond, uncond, weight), t)
        else:
            cond, uncond = x_0_from_velocity(x_t, cond, t), x_0_from_velocity(x_t, uncond, t)
            x_0_real = projected_guidance(cond, uncond, weight, cond + 1, self.config.guidance_ink_kept)
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
        draws = self.config.critic_draws
        x_0, prompt = x_0.repeat(draws, 1, 1, 1, 1), fake_prompt.repeat(draws)
        x_t, t = self._noised(x_0, share, draws)
        v = self.fake_score.forward_bidirectional(x_t, t, prompt)
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

    def _noised(self, x_0: Tensor, share: BatchShare | None = None, draws: int = 1) -> tuple[Tensor, Tensor]:
        """x_t and t, one time per video: uniform, shifted by score_time_shift, scaled into [min_score_time, max_score_time]. x_0 holds
        every video of the share `draws` times, one batch behind the other.

        Each time is uniform, but those of a batch are not independent: they lie at even distances, all moved by one random number
        (Variational Diffusion Models, arXiv 2107.00630, appendix I.1), so that every batch sees all noise levels.

        The public code draws a timestep of 1000 and shifts it by 5 for both scores and the critic (its timestep_shift), then clamps
        it into the interval. The default here departs from it: no shift, and never a clamp, which would heap times at the ends.
        """
        low, high = self.config.min_score_time, self.config.max_score_time
        share = share_or_whole(share, len(x_0) // draws)
        t = share.draw(lambda total: even_times((draws, total), self.config.score_time_shift, self.random), dim=1).reshape(-1, 1)
        t = (low + (high - low) * t).to(x_0.device).expand(x_0.shape[:2])
        shape = tuple(x_0.shape[1:])
        eps = share.draw(lambda total: torch.randn((draws, total, *shape), generator=self.random), dim=1).flatten(0, 1)
        eps = eps.to(x_0.device)
        return add_noise(x_0, eps, t), t


if __name__ == "__main__":
    runpy.run_path(str(REPOSITORY / "tests" / "self_tests" / "dynamic_video_sf.py"), run_name="__main__")
