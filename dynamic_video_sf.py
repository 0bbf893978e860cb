"""Self-Forcing (Huang et al. 2025, arXiv 2506.08009): the rollout, and the engine that trains the generator to match a distribution.

Dimensions: B batch, F frames, C channels, H height, W width; a rollout makes F frames in blocks of `num_frames_per_block`.

Training, generation and evaluation all call one rollout, `rollout_blocks` (Algorithm 1). `python dynamic_video_sf.py` checks the rollout
and the losses on a small case.
"""

from __future__ import annotations

from machine import threads  # noqa: F401  before torch, which reads its settings once

# isort: split
import copy
import runpy
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count

import numpy as np
import torch
from torch import Tensor

from machine.batch_random import BatchRandom
from machine.paths import REPOSITORY
from machine.seeds import Purpose, stream
from method.choices import SWITCHES, require
from method.diagnostics import mean_by_exit_step, score_figures
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
from method.losses import discriminator_loss, dmd_gradient, dmd_loss, relativistic_loss, sid_loss, x_0_prediction_loss
from method.plans import BidirectionalPlan, RolloutPlan, few_step_plan
from method.settings import SelfForcingConfig, check_num_frames
from network.discriminator import Discriminator
from network.weights import exponential_decay, frozen, power_decay, update_average
from tiny_causal_wan import PromptContext, TinyCausalWanModel

Text = tuple[Tensor, Tensor]  # encoded prompts, as `TextEncoder.encode` returns them: embeddings (B, L, text_width) and mask (B, L)


# ------------------------------------------------------------------------------------------------------------ the rollout


def make_noise_streams(seeds: list[int]) -> list[np.random.Generator]:
    """One CPU random stream per video: its noise depends on its seed alone, not on batch or device."""
    return [stream(seed, 0, Purpose.NOISE) for seed in seeds]


def draw_noise(streams: list[np.random.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, *shape) standard normal, float32, one slice from each stream."""
    return torch.from_numpy(np.stack([each.standard_normal(shape, dtype=np.float32) for each in streams])).to(device)


def clamp_to_data(x_0: Tensor) -> Tensor:
    """x_0 clamped to [-1, 1] (static thresholding, arXiv 2205.11487, section 2.3) with the gradient of x_0 (straight-through, arXiv
    1308.3432), so that a value outside the range is still pulled back."""
    return x_0 + (x_0.clamp(-1, 1) - x_0).detach()


def predict_x_0(x_t: Tensor, v: Tensor, t: Tensor, plan: RolloutPlan) -> Tensor:
    """x_0 (B, F, C, H, W) of x_t and its velocity, clamped to [-1, 1] if the plan says so."""
    x_0 = x_0_from_velocity(x_t, v, t)
    return clamp_to_data(x_0) if plan.clamp_x_0 else x_0


def full_time(x: Tensor, time: float) -> Tensor:
    """t (B, F): one time for every frame of x (B, F, ...)."""
    return torch.full(x.shape[:2], time, device=x.device)


@dataclass(frozen=True)
class PromptSwitch:
    """A new prompt from the next block on. how: what happens to the cache.

    "recache": recompute it with the new prompt from the frames that are still visible (LongLive, arXiv 2509.22622, section 3.2).
    "keep": keep it as written under the old prompt. "reset": empty it, so that the next block sees no past.
    null_prompt: as many null prompts, for guidance."""

    prompt: PromptContext
    how: str = "recache"
    null_prompt: PromptContext | None = None

    def __post_init__(self) -> None:
        require(self.how in SWITCHES, "switch", self.how, f"one of {', '.join(SWITCHES)}")


class Past:
    """The blocks made so far: their KV cache, and the blocks still visible, from which a switch of the prompt recomputes it.

    The pass that writes a finished block is deferred and fused with the first pass of the next block; `flush` runs it now."""

    def __init__(
        self, model: TinyCausalWanModel, plan: RolloutPlan, streams: list[np.random.Generator], prompt: PromptContext,
        null_prompt: PromptContext | None,
    ):
        self.model, self.plan, self.streams = model, plan, streams
        self.prompt = self._both_branches(prompt, null_prompt)
        self.clear()

    def clear(self) -> None:
        self.cache = self.model.new_cache(self.plan.context.window_frames, self.plan.context.sink_frames)
        self._deferred: tuple[Tensor, Tensor, PromptContext] | None = None  # the finished block to write: x, t, prompt
        self._blocks: list[tuple[int, Tensor]] = []  # first frame and x_0 of every block with a visible frame
        self._num_frames = 0  # appended so far

    def append(self, x_0: Tensor) -> None:
        """Add a finished block x_0 (B, F_block, C, H, W): the cache gets its keys and values at the context time."""
        self._write(x_0)
        self._blocks.append((self._num_frames, x_0))
        self._num_frames += x_0.shape[1]
        sink, first = self.plan.context.sink_frames, self._first_visible()
        self._blocks = [(start, block) for start, block in self._blocks if start < sink or start + block.shape[1] > first]

    def append_and_switch(self, x_0: Tensor, switch: PromptSwitch) -> None:
        """Add a finished block, and change the prompt for the next one."""
        if switch.how != "reset":
            self.append(x_0)
        self.prompt = self._both_branches(switch.prompt, switch.null_prompt)
        if switch.how == "reset":
            self.clear()
        if switch.how == "recache":
            self._encode_again()

    def _encode_again(self) -> None:
        """Recompute the cache under the current prompt from the frames that the next block sees, in their blocks."""
        sink, first, blocks, num_frames = self.plan.context.sink_frames, self._first_visible(), self._blocks, self._num_frames
        self.clear()
        for start, x_0 in blocks:
            self._write(x_0)
            num_left = min(start + x_0.shape[1], first) - sink  # frames of the sink's last block that have left the window
            if start < sink and num_left > 0:
                self.flush()
                self.cache.forget_behind_sink(num_left)
        self._blocks, self._num_frames = blocks, num_frames

    def forget_first(self, num_frames: int) -> None:
        """Hide the first num_frames frames from the next blocks."""
        self.flush()
        self.cache.forget_first(num_frames)

    def predict(self, x_t: Tensor, t: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """v and x_0 (B, F_block, C, H, W) of the next block, which sees the past; under the plan's guidance. is_last: the last pass of a
        block, which always runs alone, so that training and inference give the same bits."""
        is_guided = self.plan.guidance != 1.0
        x, times = (torch.cat([x_t, x_t]), torch.cat([t, t])) if is_guided else (x_t, t)
        if is_last or self._deferred is None or self._deferred[2] is not self.prompt:
            self.flush()
            v = self.model.forward_cached(x, times, self.prompt, self.cache)
        else:
            (finished, t_finished, _), self._deferred = self._deferred, None
            v = self.model.write_and_forward(finished, t_finished, x, times, self.prompt, self.cache)
        if is_guided:
            v = classifier_free_guidance(*v.chunk(2), self.plan.guidance)
        return v, predict_x_0(x_t, v, t, self.plan)

    def flush(self) -> None:
        """Write the deferred block into the cache."""
        if self._deferred is not None:
            (x, t, prompt), self._deferred = self._deferred, None
            self.model.write_cache(x, t, prompt, self.cache)

    def _write(self, x_0: Tensor) -> None:
        self.flush()
        x, t = x_0, full_time(x_0, self.plan.context_time)
        if self.plan.context_time != 0:
            x = add_noise(x_0, draw_noise(self.streams, tuple(x_0.shape[1:]), x_0.device), t)
        self._deferred = (x, t, self.prompt) if self.plan.guidance == 1.0 else (torch.cat([x, x]), torch.cat([t, t]), self.prompt)

    def _both_branches(self, prompt: PromptContext, null_prompt: PromptContext | None) -> PromptContext:
        if self.plan.guidance == 1.0:
            return prompt
        if null_prompt is None:
            raise ValueError(f"guidance {self.plan.guidance} needs the null prompt")
        return prompt.concatenate(null_prompt)

    def _first_visible(self) -> int:
        """The first frame after the sink that the next block sees."""
        window, sink = self.plan.context.window_frames, self.plan.context.sink_frames
        return 0 if window is None else self._num_frames - (window - sink - self.plan.num_frames_per_block)


def rollout_blocks(
    model: TinyCausalWanModel, prompt: PromptContext, streams: list[np.random.Generator], num_blocks: int | None, plan: RolloutPlan,
    null_prompt: PromptContext | None = None, exit_steps: list[int] | None = None, gradient_blocks: range = range(0),
    trace: list[list[Tensor]] | None = None, first_frames: Tensor | None = None, finished: list[Tensor] | None = None,
) -> Generator[Tensor, PromptSwitch | None, None]:
    """Generate a video block by block (Self-Forcing, Algorithm 1); yields x_0 of each block, (B, F_block, C, H, W).

    num_blocks: None for no end. Send a `PromptSwitch` between two blocks to change the prompt. null_prompt: for guidance other than 1.
    exit_steps: for each block, the index into `plan.times` whose prediction is the result; None for the last. gradient_blocks: blocks
    whose exit step carries gradient. finished: a list that collects every block as inference makes it; blocks then continue past their
    exit step, and the finished ones enter the cache. Without it a block ends at its exit step, and that prediction enters. first_frames:
    given frames (B, F, C, H, W) before the first block, see `split_first_frames`. trace: a list that collects each block's x_t at every
    time."""
    device, last_time, block_size = next(model.parameters()).device, len(plan.times) - 1, plan.num_frames_per_block
    size_of_first = 1 if plan.context.independent_first_frame and first_frames is None else block_size
    past = Past(model, plan, streams, prompt, null_prompt)
    for frames in () if first_frames is None else split_first_frames(first_frames, plan):
        past.append(frames.to(device))
    for block in count() if num_blocks is None else range(num_blocks):
        if plan.context.hide_first_block and 0 < block == (num_blocks or 0) - 1:
            past.forget_first(size_of_first)
        exit_step = last_time if exit_steps is None else exit_steps[block]
        last_step = exit_step if finished is None else last_time
        # 1. Start from noise.
        shape = (size_of_first if block == 0 else block_size, *model.config.frame_shape)
        x_t, walk = draw_noise(streams, shape, device), []
        for step in range(last_step + 1):
            walk.append(x_t)
            t = full_time(x_t, plan.times[step])
            # 2. Predict x_0. Only the exit step's pass carries gradient: the others simulate inference.
            has_gradient = block in gradient_blocks and step == exit_step
            with torch.set_grad_enabled(has_gradient and finished is None):
                v, x_0 = past.predict(x_t, t, is_last=step == last_step)
            if step == exit_step:
                x_0_exit = x_0
            if has_gradient and finished is not None:  # a second pass, as the video itself is made as at inference, bit for bit
                with torch.enable_grad():
                    x_0_exit = past.predict(x_t, t, is_last=True)[1]
            # 3. Noise it to the next time: with fresh noise, or along the ODE with the predicted noise.
            if step < last_step:
                eps = draw_noise(streams, shape, device) if plan.fresh_noise else eps_from_velocity(x_t, v, t)
                x_t = add_noise(x_0, eps, full_time(x_t, plan.times[step + 1]))
        if trace is not None:
            trace.append(walk)
        if finished is not None:
            finished.append(x_0)
        # 4. Hand the block out; a new prompt may come back.
        switch = yield x_0_exit
        if block + 1 == num_blocks:
            return
        # 5. Write it into the cache, without gradient.
        if switch is None:
            past.append(x_0.detach())
        else:
            past.append_and_switch(x_0.detach(), switch)


def split_first_frames(frames: Tensor, plan: RolloutPlan) -> tuple[Tensor, ...]:
    """Split given frames (B, F, C, H, W) into blocks: a single frame, or whole blocks (after one frame if the plan has an independent
    first frame). Raises ValueError for any other number of frames."""
    num_frames, block, first = frames.shape[1], plan.num_frames_per_block, 1 if plan.context.independent_first_frame else 0
    if num_frames == 1:
        return (frames,)
    if num_frames < 1 or (num_frames - first) % block:
        counts = ", ".join(str(first + block * k) for k in range(1, 4))
        raise ValueError(f"{num_frames} frames to go on from: expected 1, or as many as blocks of {block} make up, such as {counts}")
    return frames.split([1] * first + [block] * ((num_frames - first) // block), dim=1)


@torch.no_grad()
def sample_bidirectional(
    model: TinyCausalWanModel, prompt: PromptContext, null_prompt: PromptContext, streams: list[np.random.Generator], num_frames: int,
    plan: BidirectionalPlan, trace: list[Tensor] | None = None,
) -> Tensor:
    """The bidirectional teacher's sampler. Returns x_0 (B, F, C, H, W). trace: a list that collects x_t at every evaluation."""
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

    shape, device = (num_frames, *model.config.frame_shape), next(model.parameters()).device
    draw, times = partial(draw_noise, streams, shape, device), sampling_times(plan.num_steps, plan.time_shift)
    if plan.eta == 0:
        return euler_sampler(velocity_fn, draw(), times)
    return ancestral_sampler(velocity_fn, draw(), times, plan.eta, draw)


# ------------------------------------------------------------------------------------------------------------- the engine


@dataclass
class Rollout:
    """A batch of generated videos, or the window at the end of a longer rollout."""

    x_0: Tensor  # (B, F, C, H, W)
    scored: Tensor  # (B, min(F, gradient_frames), C, H, W): what the generator's loss sees
    finished: Tensor  # the same frames, without gradient: what the critic learns from
    exit_steps: list[int]  # of the blocks, -1 for clean data; those of the first video where videos differ
    frame_exits: Tensor  # (B, min(F, gradient_frames)): exit step of every scored frame, -1 for clean data


class SelfForcingEngine:
    """The networks of Self-Forcing, their moving averages and the losses between them.

    generator: the student; generator_average: its moving average, which ships. real_score: the frozen teacher. fake_score: the critic's
    network. critic: what `critic_loss` trains: fake_score, or with the GAN loss a discriminator built on it. fake_average: the moving
    average of fake_score, which judges the generator, as a critic fresh from one batch errs by more than generator and teacher differ.
    All networks start as copies of `teacher`, the generator of `start` if given. All randomness comes from `random`. A training step
    (`training.stages`) owns the optimizers and calls `update_averages` last."""

    def __init__(
        self, config: SelfForcingConfig, teacher: TinyCausalWanModel, random: torch.Generator, start: TinyCausalWanModel | None = None
    ):
        self.config = config
        self.plan = few_step_plan(config)
        self.random = BatchRandom(random)
        self.generator = copy.deepcopy(teacher if start is None else start).train().requires_grad_(True)
        self.fake_score = copy.deepcopy(teacher).train().requires_grad_(True)
        self.fake_average = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.real_score = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.generator_average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        if config.activation_checkpointing:
            for network in self.networks():  # with SiD gradient passes through all
                network.recompute_activations()
        self.critic = Discriminator(self.fake_score).to(next(teacher.parameters()).device) if config.loss == "gan" else self.fake_score

    def networks(self) -> tuple[TinyCausalWanModel, ...]:
        return self.generator, self.fake_score, self.fake_average, self.real_score, self.generator_average

    def update_averages(self, num_critic_updates: int, num_generator_updates: int | None) -> None:
        """Move the averages after the optimizers' steps. Counts are of earlier updates; None if the generator was not updated."""
        config, count = self.config, num_generator_updates
        if count is not None:
            decay = exponential_decay(config.ema_decay, count) if config.ema_power is None else power_decay(config.ema_power, count)
            update_average(self.generator_average, self.generator, decay)
        update_average(self.fake_average, self.fake_score, exponential_decay(config.critic_ema_decay, num_critic_updates))

    # --- videos

    def make_videos(
        self, text: Text, num_frames: int, with_gradient: bool, x_real: Tensor | None = None, first_frame: int = 0, turn: int | None = None,
        earlier_text: Text | None = None,
    ) -> Rollout:
        """The generator's videos of these prompts: a self-rollout, or real videos x_real (B, F, C, H, W) noised and denoised, as
        configured. first_frame, turn, earlier_text: see `rollout`. Raises ValueError if real videos are needed and not given."""
        with torch.set_grad_enabled(with_gradient):
            prompt = self.generator.encode_prompt(*text)
        if self.config.generator_inputs == "self_rollout":
            with torch.no_grad():
                earlier = None if earlier_text is None else self.generator.encode_prompt(*earlier_text)
            return self.rollout(prompt, num_frames, with_gradient, first_frame, turn, earlier)
        if x_real is None:
            raise ValueError(f"training.generator_inputs={self.config.generator_inputs} needs real videos: none were given")
        return self.denoise_real(prompt, x_real, with_gradient)

    def rollout(
        self, prompt: PromptContext, num_frames: int, with_gradient: bool, first_frame: int = 0, turn: int | None = None,
        earlier_prompt: PromptContext | None = None,
    ) -> Rollout:
        """Generate num_frames frames from noise as inference does, up to a random exit step (Algorithm 1).

        first_frame, whole blocks: the frames are a window that starts there, at the end of a longer rollout (as in Self-Forcing++, arXiv
        2510.02283). The blocks before it carry no gradient and take all denoising steps, as early exits make blurred frames. Memory does
        not grow with first_frame if the cache rolls.
        earlier_prompt: that of the blocks before the window; at the window the prompt switches and the cache is kept or recomputed, at
        random. turn: the number of the generator's update. With finished blocks exit steps cycle by it, last step first: at random the
        last one, which is what is shown, could be left out for a dozen updates while the others move it."""
        config, last_step, block = self.config, len(self.plan.times) - 1, self.config.num_frames_per_block
        check_num_frames("num_frames", num_frames, block, config.independent_first_frame)
        sizes = config.context.block_sizes(num_frames, block)
        if first_frame < 0 or first_frame % block:
            raise ValueError(f"first_frame is {first_frame}: expected 0 or more, a multiple of the block of {block}")
        num_earlier = first_frame // block  # blocks
        num_made = num_earlier + len(sizes)
        # 1. Draw the exit steps, one for all blocks or one each, and a seed for every video's noise.
        if config.finish_blocks and not with_gradient:
            exit_steps = [last_step] * len(sizes)  # as at inference: only finished videos are asked for
        elif config.finish_blocks and config.same_exit_step and turn is not None:
            exit_steps = [last_step - turn % (last_step + 1)] * len(sizes)
        else:
            num_exits = 1 if config.same_exit_step else len(sizes)
            exit_steps = torch.randint(last_step + 1, (num_exits,), generator=self.random.generator).tolist() * (len(sizes) // num_exits)
        streams = make_noise_streams(self.random.seeds(len(prompt.pooled)))
        switch, first_prompt = None, prompt
        if earlier_prompt is not None:
            how = ("recache", "keep")[int(torch.randint(2, (1,), generator=self.random.generator))]
            switch, first_prompt = PromptSwitch(prompt, how), earlier_prompt
        # 2. Roll out. Blocks before the window are dropped at once: memory must not grow with them.
        first_scored = max(num_frames - config.gradient_frames, 0)
        first_with_gradient = num_earlier + sum(end <= first_scored for end in accumulate(sizes))
        made: list[Tensor] | None = [] if config.finish_blocks else None
        blocks = rollout_blocks(
            self.generator, first_prompt, streams, num_made, self.plan, exit_steps=[last_step] * num_earlier + exit_steps,
            gradient_blocks=range(first_with_gradient, num_made if with_gradient else 0), finished=made,
        )
        for _ in range(num_earlier):
            next(blocks)
            if made is not None:
                made.clear()
        # 3. Join the window's blocks.
        with torch.set_grad_enabled(with_gradient):
            x_0 = torch.cat([blocks.send(switch), *blocks], dim=1)
            finished = x_0.detach() if made is None else torch.cat(made, dim=1)
            frame_exits = torch.tensor([exit_steps] * len(x_0)).repeat_interleave(torch.tensor(sizes), 1)
            return Rollout(x_0, x_0[:, first_scored:], finished[:, first_scored:], exit_steps, frame_exits[:, first_scored:])

    def denoise_real(self, prompt: PromptContext, x_real: Tensor, with_gradient: bool) -> Rollout:
        """Noise real videos (B, F, C, H, W), every block to a random few-step time, and denoise them in one pass.

        A block sees a noised past ("diffusion_forced": CausVid, arXiv 2412.07772, section 4.2) or a clean one ("teacher_forced"), but
        always data, never the generator's own output as in Self-Forcing. A diffusion-forced block may also stay clean, as the published
        steps include 0, the time of the cache: its x_0 = x_t - 0 v carries no gradient."""
        config, context, block, num_exits = self.config, self.config.context, self.config.num_frames_per_block, len(self.plan.times)
        is_teacher_forced = config.generator_inputs == "teacher_forced"
        sizes = torch.tensor(context.block_sizes(x_real.shape[1], block))
        # 1. Noise: one time a block.
        times = torch.tensor([*self.plan.times, *(() if is_teacher_forced else (self.plan.context_time,))])  # context_time is 0 here
        generator = self.random.generator
        exits = self.random.draw(len(x_real), lambda total: torch.randint(len(times), (total, len(sizes)), generator=generator))
        t = times[exits.repeat_interleave(sizes, 1)].to(x_real.device)  # (B, F)
        x_t = add_noise(x_real, self.random.normal_like(x_real), t)
        # 2. Denoise in one pass.
        with torch.set_grad_enabled(with_gradient):
            if is_teacher_forced:
                v = self.generator.forward_teacher_forced(x_t, t, x_real, prompt, block, context)
            else:
                v = self.generator.forward_block_causal(x_t, t, prompt, block, context)
            x_0 = predict_x_0(x_t, v, t, self.plan)
        exits = torch.where(exits < num_exits, exits, -1)
        scored = slice(max(x_real.shape[1] - config.gradient_frames, 0), None)
        frame_exits = exits.repeat_interleave(sizes, 1)[:, scored]
        return Rollout(x_0, x_0[:, scored], x_0[:, scored].detach(), exits[0].tolist(), frame_exits)

    # --- losses

    def generator_loss(
        self, x_0: Tensor, text: Text, null_text: Text, x_real: Tensor | None = None, frame_exits: Tensor | None = None,
        critic_text: Text | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss that pulls x_0 (B, F, C, H, W) toward the teacher's distribution, or with "gan" that of x_real; and its figures.

        text, null_text: the prompts, and as many null prompts. critic_text: prompts of the critic, if not text. The figures:
        `score_figures` and dmd_gradient_norm, or with "gan" logit_distance; given frame_exits (B, F), the mean loss at each exit step."""
        if self.config.loss == "gan":
            with torch.no_grad():  # the prompt is a constant here
                prompt = self.fake_score.encode_prompt(*text)
            with frozen(self.critic):
                fake_t, real_t, t = self._noised_pair(x_0, x_real)
                fake, real = self.critic(fake_t, t, prompt), self.critic(real_t, t, prompt)
            terms, figures = relativistic_loss(fake, real), {"logit_distance": (real - fake).mean().item()}
        elif self.config.loss in ("dmd", "sid"):
            x_0 = x_0.repeat(self.config.noise_draws, 1, 1, 1, 1)
            is_dmd = self.config.loss == "dmd"
            with torch.set_grad_enabled(not is_dmd):  # DMD's scores only supply a direction; SiD's gradient passes through both, frozen
                x_0_fake, x_0_real, t = self._denoised(x_0, text, null_text, critic_text)
            figures = score_figures(x_0, x_0_fake, x_0_real, t)
            if is_dmd:
                gradient = self.config.dmd_sign * dmd_gradient(x_0.detach(), x_0_fake, x_0_real)
                figures["dmd_gradient_norm"] = gradient.square().mean().sqrt().item()
            terms = dmd_loss(x_0, gradient) if is_dmd else sid_loss(x_0, x_0_fake, x_0_real, self.config.sid_alpha)
        else:
            raise ValueError(f"training.loss is {self.config.loss}, for which the engine has no loss: add a branch here")
        if frame_exits is not None:
            frame_exits = frame_exits.repeat(len(terms) // len(frame_exits), 1)
            figures |= mean_by_exit_step(terms.detach(), frame_exits, self.config.denoising_steps)
        return terms.mean(), figures

    def critic_loss(self, x_0: Tensor, text: Text, x_real: Tensor | None = None) -> Tensor:
        """Flow matching of the critic on the generator's own videos x_0 (B, F, C, H, W); with "gan" the discriminator's loss."""
        x_0, prompt = x_0.detach(), self.fake_score.encode_prompt(*text)  # the critic's loss must not reach the generator
        if self.config.loss == "gan":
            fake_t, real_t, t = self._noised_pair(x_0, x_real)
            eps_real, eps_fake = self.random.normal_like(real_t), self.random.normal_like(fake_t)
            logits = partial(self.critic, t=t, prompt=prompt)
            return discriminator_loss(logits, real_t, fake_t, eps_real, eps_fake, self.config.gan_penalty_sigma, self.config.gan_penalty)
        x_0, prompt = x_0.repeat(self.config.noise_draws, 1, 1, 1, 1), prompt.repeat(self.config.noise_draws)
        x_t, t = self._noised(x_0)
        v = self.fake_score.forward_bidirectional(x_t, t, prompt)
        return x_0_prediction_loss(v, x_t, x_0, t, self.config.loss_time_floor)

    def _denoised(self, x_0: Tensor, text: Text, null_text: Text, critic_text: Text | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Noise x_0 (noise_draws * B, F, C, H, W), the batch repeated, and denoise it: x_0_fake of the averaged critic, x_0_real of the
        guided teacher, and t (noise_draws * B,). text and null_text are those of the batch."""
        draws = self.config.noise_draws
        with torch.no_grad():  # the prompts are constants here
            fake_prompt = self.fake_average.encode_prompt(*(critic_text or text)).repeat(draws)
            cond_prompt, null_prompt = (self.real_score.encode_prompt(*each).repeat(draws) for each in (text, null_text))
            real_prompts = cond_prompt.concatenate(null_prompt)
        # 1. Noise the videos, each copy to its own time.
        x_t, t = self._noised(x_0)
        # 2. The critic's prediction.
        x_0_fake = x_0_from_velocity(x_t, self.fake_average.forward_bidirectional(x_t, t, fake_prompt), t)
        # 3. The teacher's, under guidance.
        cond, uncond = self.real_score.forward_bidirectional(torch.cat([x_t, x_t]), torch.cat([t, t]), real_prompts).chunk(2)
        weight = expand_time(interval_weight(t, self.config.guidance, self.config.guidance_interval), x_t)
        if self.config.guidance_ink_kept == 1.0:
            x_0_real = x_0_from_velocity(x_t, classifier_free_guidance(cond, uncond, weight), t)
        else:
            cond, uncond = x_0_from_velocity(x_t, cond, t), x_0_from_velocity(x_t, uncond, t)
            x_0_real = projected_guidance(cond, uncond, weight, cond + 1, self.config.guidance_ink_kept)
        if self.config.clamp_scores:  # static thresholding (Imagen, arXiv 2205.11487, section 2.3): a mean of data lies in its range
            x_0_fake, x_0_real = x_0_fake.clamp(-1, 1), x_0_real.clamp(-1, 1)
        return x_0_fake, x_0_real, t[:, 0]

    def _noised_pair(self, x_0: Tensor, x_real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Generated and real videos of the same prompts, noised independently to the same times; and t (B, F)."""
        if x_real is None:
            raise ValueError("training.loss=gan compares with real videos: none were given")
        x_t, t = self._noised(x_0)
        real = x_real[:, x_real.shape[1] - x_0.shape[1]:]  # the frames that are scored
        return x_t, add_noise(real, self.random.normal_like(real), t), t

    def _noised(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t, one time per video: uniform, shifted by score_time_shift, scaled into [min_score_time, max_score_time]. x_0 holds
        the batch noise_draws times.

        The times of a batch are evenly spaced with one random offset (Variational Diffusion Models, arXiv 2107.00630, appendix I.1), so
        that every batch sees all noise levels. The public code shifts by 5 and clamps into the interval, which heaps times at its ends."""
        low, high, copies = self.config.min_score_time, self.config.max_score_time, self.config.noise_draws
        num_videos = len(x_0) // copies
        generator, shape = self.random.generator, x_0.shape[1:]
        t = self.random.draw(num_videos, lambda total: even_times((copies, total), self.config.score_time_shift, generator), dim=1)
        t = (low + (high - low) * t.reshape(-1, 1)).to(x_0.device).expand(x_0.shape[:2])
        eps = self.random.draw(num_videos, lambda total: torch.randn((copies, total, *shape), generator=generator), dim=1)
        return add_noise(x_0, eps.flatten(0, 1).to(x_0.device), t), t


if __name__ == "__main__":
    runpy.run_path(str(REPOSITORY / "tests" / "self_tests" / "dynamic_video_sf.py"), run_name="__main__")
