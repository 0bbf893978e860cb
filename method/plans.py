"""How a video is sampled: the times at which the network is asked, guidance, and what a block sees of the past.

A plan is pure data; `dynamic_video_sf` carries it out: block by block (`RolloutPlan`) or all frames at once (`BidirectionalPlan`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from method.flow_matching import sampling_times, shift_time
from method.settings import FewStepConfig, TrainingConfig
from network.attention import NUM_TRAIN_TIMESTEPS, WHOLE_PAST, ContextWindow

NAIVE_STEPS = [1000, 750, 500, 250]  # in which the pretrained network is shown without guidance


@dataclass(frozen=True)
class RolloutPlan:
    """How a block is denoised."""

    times: tuple[float, ...]  # descending, each in (0, 1]; one forward pass of the network at each
    num_frames_per_block: int
    fresh_noise: bool = True  # between two times (few-step models, as in Algorithm 1); else keep the predicted noise: Euler's method
    context_time: float = 0.0  # in [0, 1], at which finished blocks enter the cache
    context: ContextWindow = WHOLE_PAST  # what a block may see of the past
    guidance: float = 1.0  # weight of classifier-free guidance, 1 for none
    clamp_x_0: bool = False  # keep every predicted x_0 in [-1, 1], as data are

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
    return tuple(shift_time(torch.tensor(denoising_steps) / NUM_TRAIN_TIMESTEPS, time_shift).tolist())


def many_step_plan(
    num_steps: int, time_shift: float, num_frames_per_block: int, guidance: float, context: ContextWindow = WHOLE_PAST,
    context_time: float = 0.0,
) -> RolloutPlan:
    """Euler's method with num_steps steps a block: how a causal network is sampled that was not distilled."""
    times = tuple(sampling_times(num_steps, time_shift)[:-1].tolist())
    return RolloutPlan(times, num_frames_per_block, False, context_time, context, guidance)


@dataclass(frozen=True)
class BidirectionalPlan:
    """How the teacher is sampled: all frames at once, in num_steps guided steps."""

    num_steps: int
    time_shift: float
    guidance: float  # 1 for none
    eta: float = 0.0  # how much of a step's noise is fresh, see `fresh_share`: 0 is Euler's method, 1 ancestral sampling
    ink_kept: float = 1.0  # share of what guidance adds along the predicted ink, see `projected_guidance`; 1 is classifier-free guidance

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that denoise one block, with all others: one a step, two under guidance."""
        return self.num_steps * (1 if self.guidance == 1.0 else 2)

    @property
    def cache_evaluations(self) -> int:
        """0: there is no cache."""
        return 0


def teacher_plan(training: TrainingConfig) -> BidirectionalPlan:
    """How a run samples its teacher."""
    return BidirectionalPlan(
        training.teacher_steps, training.time_shift, training.teacher_guidance, training.teacher_eta, training.teacher_ink_kept
    )


def baseline_plans(training: TrainingConfig) -> dict[str, RolloutPlan]:
    """What a few-step student must beat, by name: rollouts of the network that it starts from, without guidance in the student's own steps
    (in a pretraining `NAIVE_STEPS`), and by Euler's method under `training.guidance` in as many steps and in half of them."""
    if isinstance(training, FewStepConfig):
        unguided = few_step_plan(training)
    else:
        times = warp_steps(NAIVE_STEPS, training.time_shift)
        unguided = RolloutPlan(times, training.num_frames_per_block, context=training.context)
    num_steps = len(unguided.times)
    name = "Euler" if training.guidance == 1 else "guided"
    return {f"no guidance, {num_steps} steps": unguided} | {
        f"{name}, {steps} steps":
            many_step_plan(steps, training.time_shift, training.num_frames_per_block, training.guidance, training.context)
        for steps in (num_steps, max(num_steps // 2, 1))
    }
