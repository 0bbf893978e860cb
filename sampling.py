"""Videos from prompts with networks that are already trained: what a sampler is, and one call for all of them.

Dimensions: B batch, F frames, C channels, H height, W width.

The rollout and the bidirectional sampler themselves stand in `dynamic_video_sf`; here a caller's wishes and a
checkpoint's configuration become a plan, and prompts become embeddings.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import LoadedNetworks
from rollout import (
    BidirectionalPlan,
    RolloutPlan,
    few_step_plan,
    make_noise_streams,
    many_step_plan,
    rollout_blocks,
    sample_bidirectional,
    warp_steps,
)
from runtime import Runtime
from text_encoder import NULL_PROMPT, TextEncoder
from tiny_causal_wan import TinyCausalWanModel
from training_config import FewStepConfig, PretrainConfig, TrainingConfig, check_denoising_steps, check_num_frames

NAIVE_STEPS = [1000, 750, 500, 250]  # what the pretrained network is shown with before Self-Forcing


@torch.no_grad()
def sample_few_step(
    model: TinyCausalWanModel, text_encoder: TextEncoder, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan,
    runtime: Runtime,
) -> Tensor:
    """Videos (B, F, C, H, W), float32, from the one rollout; under the plan's guidance where it is not 1."""
    check_num_frames("num_frames", num_frames, plan.num_frames_per_block)
    with runtime.autocast():
        prompt = model.encode_prompt(*text_encoder.encode(prompts))
        null = None if plan.guidance == 1 else model.encode_prompt(*text_encoder.encode([NULL_PROMPT] * len(prompts)))
        blocks = rollout_blocks(model, prompt, make_noise_streams(seeds), num_frames // plan.num_frames_per_block, plan, null)
        return torch.cat(list(blocks), dim=1).float()


@torch.no_grad()
def sample_many_step(
    model: TinyCausalWanModel, text_encoder: TextEncoder, prompts: list[str], seeds: list[int], num_frames: int,
    plan: BidirectionalPlan, runtime: Runtime,
) -> Tensor:
    """Videos (B, F, C, H, W), float32, from the bidirectional sampler."""
    with runtime.autocast():
        prompt = model.encode_prompt(*text_encoder.encode(prompts))
        null = model.encode_prompt(*text_encoder.encode([NULL_PROMPT] * len(prompts)))
        return sample_bidirectional(model, prompt, null, make_noise_streams(seeds), num_frames, plan).float()


def teacher_plan(training: TrainingConfig) -> BidirectionalPlan:
    """How a run samples its teacher."""
    return BidirectionalPlan(training.teacher_steps, training.time_shift, training.guidance, training.teacher_eta)


@dataclass(frozen=True)
class SamplerSettings:
    """What a caller asks of the sampler; None leaves it to the checkpoint (see `make_plan`).

    denoising_steps: timesteps 1..1000, descending from 1000: a causal rollout in few steps. num_steps: many steps, of Euler's
    method or, all frames at once, with fresh noise. At most one of the two. guidance: weight of classifier-free guidance, 1 for
    none. eta: fresh noise in the steps of the bidirectional teacher, 0 (Euler) to 1 (ancestral). Raises ValueError.
    """

    denoising_steps: tuple[int, ...] | None = None
    num_steps: int | None = None
    guidance: float | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"--eta is {self.eta}: expected 0 (Euler's method) to 1 (ancestral sampling)")
        if self.denoising_steps is not None and self.num_steps is not None:
            raise ValueError("--denoising_steps (few steps) and --num_steps (many steps) exclude each other: give one of them")
        if self.denoising_steps is not None:
            check_denoising_steps("--denoising_steps", list(self.denoising_steps))
        if self.num_steps is not None:
            require_at_least_one("--num_steps", self.num_steps)
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"--guidance is {self.guidance}: expected 0 or more (1 is no guidance)")

    def make_plan(self, training: TrainingConfig) -> RolloutPlan | BidirectionalPlan:
        """The plan for a network trained with `training`, whose kind says whether it is a student or a teacher.

        Left open, a few-step student takes its own denoising steps and a teacher `teacher_steps` Euler steps: all frames at
        once, or block by block where teacher or diffusion forcing made it causal. Guidance left open is the checkpoint's
        for a teacher's Euler steps and none otherwise. A causal rollout attends to the last `max_num_frames` frames, the
        length of training, so it can go on for any length.
        """
        is_student = isinstance(training, FewStepConfig)
        if self.num_steps is not None or (not is_student and self.denoising_steps is None):
            wishes = {"num_steps": self.num_steps, "guidance": 1.0 if is_student and self.guidance is None else self.guidance}
            many = replace(teacher_plan(training), **{name: wish for name, wish in wishes.items() if wish is not None})
            if isinstance(training, PretrainConfig) and training.objective == "mixed":
                return many if self.eta is None else replace(many, eta=self.eta)
            self._refuse_eta()
            context_time = training.context_time if isinstance(training, FewStepConfig) else 0.0
            return many_step_plan(
                many.num_steps, many.time_shift, training.num_frames_per_block, many.guidance, training.max_num_frames, context_time
            )
        self._refuse_eta()
        plan = RolloutPlan((1.0,), training.num_frames_per_block, window_frames=training.max_num_frames)
        if isinstance(training, FewStepConfig):
            plan = few_step_plan(training, training.max_num_frames)
        if self.denoising_steps is not None:
            plan = replace(plan, times=warp_steps(list(self.denoising_steps), training.time_shift))
        return replace(plan, guidance=1.0 if self.guidance is None else self.guidance)

    def _refuse_eta(self) -> None:
        if self.eta is not None:
            raise ValueError("--eta is for a bidirectional teacher in many steps, and this is a rollout block by block: leave it out")


def require_at_least_one(name: str, value: int) -> None:
    """Raise ValueError naming what is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}: expected at least 1")


def check_length(num_frames: int, plan: RolloutPlan | BidirectionalPlan, training: TrainingConfig) -> None:
    """Raise ValueError where a network trained with `training` cannot make num_frames frames under the plan."""
    check_num_frames("num_frames", num_frames, training.num_frames_per_block)
    if isinstance(plan, BidirectionalPlan) and num_frames > training.max_num_frames:
        raise ValueError(
            f"num_frames is {num_frames}: the bidirectional teacher makes at most the {training.max_num_frames} frames it was "
            f"trained on; lower it, use a student, or roll the teacher out with --denoising_steps {' '.join(map(str, NAIVE_STEPS))}"
        )


def generate(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, settings: SamplerSettings, runtime: Runtime,
    batch_size: int, show_progress: bool = False,
) -> Tensor:
    """One video per (prompt, seed): (B, F, C, H, W), float32, on the CPU, in model range but not clamped to [-1, 1].

    batch_size: videos a forward pass. Words that the grammar lacks are named in one warning for the whole call. Raises
    ValueError where prompts, seeds, length or settings do not fit each other or the checkpoint.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"found {len(prompts)} prompts and {len(seeds)} seeds: expected one seed for each of at least one prompt")
    require_at_least_one("batch_size", batch_size)
    plan = settings.make_plan(networks.config.training)
    check_length(num_frames, plan, networks.config.training)
    networks.text_encoder.tokenize(list(dict.fromkeys(prompts)))  # warns once, of all prompts together
    videos = []
    with warnings.catch_warnings(), tqdm(total=len(prompts), unit="video", disable=not show_progress, dynamic_ncols=True) as bar:
        warnings.filterwarnings("ignore", category=UserWarning, module="text_encoder")  # the same again, batch by batch
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            videos.append(_sample(networks, prompts[batch], seeds[batch], num_frames, plan, runtime).cpu())
            bar.update(len(videos[-1]))
    return torch.cat(videos)


def _sample(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan | BidirectionalPlan,
    runtime: Runtime,
) -> Tensor:
    common = (networks.generator, networks.text_encoder, prompts, seeds, num_frames)
    if isinstance(plan, BidirectionalPlan):
        return sample_many_step(*common, plan, runtime)
    return sample_few_step(*common, plan, runtime)


def describe_sampler(settings: SamplerSettings, training: TrainingConfig) -> str:
    """A few words on how a network trained with `training` is sampled, such as "4 steps" or "50 steps, guidance 2.5, eta 1"."""
    plan = settings.make_plan(training)
    guidance = "" if plan.guidance == 1 else f", guidance {plan.guidance:g}"
    if isinstance(plan, BidirectionalPlan):
        return f"{plan.num_steps} steps{guidance}" + ("" if plan.eta == 0 else f", eta {plan.eta:g}")
    return f"{len(plan.times)} steps{guidance}"
