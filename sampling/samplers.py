"""Videos from prompts with trained networks: settings and the checkpoint's configuration become a plan, prompts become embeddings, and
`dynamic_video_sf` samples.

Dimensions: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from dynamic_video_sf import make_noise_streams, sample_bidirectional, split_first_frames
from machine.runtime import Runtime, gain_over_float32, require_compiler
from method.choices import require
from method.plans import BidirectionalPlan, RolloutPlan, few_step_plan, many_step_plan, teacher_plan, warp_steps
from method.settings import FewStepConfig, PretrainConfig, TrainingConfig, check_denoising_steps, check_num_frames
from network.attention import ContextWindow
from network.int8_products import require_exact_int8
from network.text_encoder import NULL_PROMPT, TextEncoder
from sampling.streaming import PromptSchedule, stream_video
from tiny_causal_wan import TinyCausalWanModel
from training.checkpoint import LoadedNetworks
from training.stages import Sampler

MAX_GRAPHS = 256  # of one compiled function: all networks, sizes and formats of a process share them


def sample_few_step(
    model: TinyCausalWanModel, text_encoder: TextEncoder, prompts: list[str], seeds: list[int], num_frames: int, plan: RolloutPlan,
    runtime: Runtime, schedule: PromptSchedule | None = None, first_frames: Tensor | None = None,
) -> Tensor:
    """Videos (B, F, C, H, W), float32, from the one rollout. schedule: later prompts, the same for all videos; their frames must pass
    `schedule.check`. first_frames (B, F, C, H, W) start the videos and count among num_frames. Raises ValueError as `block_starts`."""
    starts = block_starts(num_frames, plan, first_frames)
    changes, switch = ({}, "recache") if schedule is None else (dict(schedule.entries[1:]), schedule.switch)
    stream = stream_video(model, text_encoder, prompts, seeds, plan, runtime, len(starts), switch, first_frames)
    blocks = [stream.send([changes[start]] * len(prompts) if start in changes else None) for start in starts]
    return torch.cat(blocks if first_frames is None else [first_frames.float(), *blocks], dim=1)


def block_starts(num_frames: int, plan: RolloutPlan, first_frames: Tensor | None) -> list[int]:
    """First frame of every generated block of a video of num_frames. Raises ValueError if the lengths do not fit the blocks."""
    block, has_first = plan.num_frames_per_block, plan.context.independent_first_frame
    if first_frames is None:
        check_num_frames("num_frames", num_frames, block, has_first)
        return [0, *range(1, num_frames, block)] if has_first else list(range(0, num_frames, block))
    split_first_frames(first_frames, plan)  # raises if their number does not fit
    given = first_frames.shape[1]
    if num_frames <= given or (num_frames - given) % block:
        raise ValueError(
            f"num_frames is {num_frames}: expected the {given} given and a positive multiple of num_frames_per_block={block} more, "
            f"such as {given + max((num_frames - given) // block, 1) * block}"
        )
    return list(range(given, num_frames, block))


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


def sample(
    sampler: Sampler, prompts: list[str], seeds: list[int], num_frames: int, runtime: Runtime, schedule: PromptSchedule | None = None,
    first_frames: Tensor | None = None,
) -> Tensor:
    """Videos (B, F, C, H, W), float32, sampled as the plan says. schedule and first_frames, see `sample_few_step`, are for a rollout."""
    common = (sampler.network, sampler.text_encoder, prompts, seeds, num_frames, sampler.plan, runtime)
    if isinstance(sampler.plan, BidirectionalPlan):
        return sample_many_step(*common)
    return sample_few_step(*common, schedule, first_frames)


@dataclass(frozen=True)
class SamplerSettings:
    """What a caller asks of the sampler; None leaves a setting to the checkpoint (see `make_plan`).

    denoising_steps: timesteps 1..1000, descending from 1000, of a causal rollout with fresh noise. num_steps: number of Euler steps, for
    each block or for all frames at once. At most one of the two. causal: roll out a bidirectional teacher too; not with denoising_steps,
    which always roll out. guidance: weight of classifier-free guidance, 1 for none. eta: fresh noise in the steps of the bidirectional
    teacher, 0 (Euler) to 1 (ancestral). ink_kept: share kept of what its guidance adds along the predicted ink, 0 to 1 (classifier-free
    guidance). window_frames: frames that a block of a rollout sees, itself and the sink included. sink_frames: number of initial frames
    kept in the cache (attention sink). Raises ValueError.
    """

    denoising_steps: tuple[int, ...] | None = None
    num_steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    ink_kept: float | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if self.denoising_steps is not None:
            if self.num_steps is not None:
                raise ValueError("--denoising_steps (few steps) and --num_steps (many steps) exclude each other: give one of them")
            if self.causal:
                raise ValueError("--denoising_steps (fresh noise) and --causal (Euler's method) exclude each other: both are block by "
                                 "block, give one of them")
            check_denoising_steps("--denoising_steps", list(self.denoising_steps))
        require(self.num_steps is None or self.num_steps >= 1, "--num_steps", self.num_steps, "at least 1")
        require(self.guidance is None or 0 <= self.guidance < math.inf, "--guidance", self.guidance, "0 or more (1 is no guidance)")
        require(self.eta is None or 0 <= self.eta <= 1, "--eta", self.eta, "0 (Euler's method) to 1 (ancestral sampling)")
        expected = "0 (guidance off the ink) to 1 (classifier-free guidance)"
        require(self.ink_kept is None or 0 <= self.ink_kept <= 1, "--ink_kept", self.ink_kept, expected)

    def make_plan(self, training: TrainingConfig) -> RolloutPlan | BidirectionalPlan:
        """The plan for a network trained with `training`. Raises ValueError for settings that do not fit its kind.

        By default a few-step student takes its own denoising steps and a teacher `teacher_steps` steps: of `teacher_plan`, or of Euler's
        method block by block with `causal` or after a training that made it causal. The default guidance is none for a student or
        denoising steps, else the checkpoint's. The default window is that of the training, or the length of its videos, so that a rollout
        can be of any length.
        """
        window = training.max_num_frames if training.window_frames is None else training.window_frames
        context = ContextWindow(
            window if self.window_frames is None else self.window_frames,
            training.sink_frames if self.sink_frames is None else self.sink_frames,
            independent_first_frame=training.independent_first_frame,
        )
        block = training.num_frames_per_block
        context.check(block, "--")
        is_teacher = isinstance(training, PretrainConfig) and training.objective == "mixed"
        if is_teacher and not self.causal and self.denoising_steps is None:
            if self.window_frames is not None or self.sink_frames is not None:
                raise ValueError("--window_frames and --sink_frames are for a rollout block by block: leave them out, or give --causal")
            wishes = {name: getattr(self, name) for name in ("num_steps", "guidance", "eta", "ink_kept")}
            return replace(teacher_plan(training), **{name: wish for name, wish in wishes.items() if wish is not None})
        for name in ("eta", "ink_kept"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} is for a bidirectional teacher in many steps, and this is a rollout block by block: leave it out"
                )
        is_student = isinstance(training, FewStepConfig)
        own_guidance = 1.0 if is_student or self.denoising_steps is not None else training.guidance
        guidance = own_guidance if self.guidance is None else self.guidance
        if self.num_steps is not None or (not is_student and self.denoising_steps is None):
            num_steps = training.teacher_steps if self.num_steps is None else self.num_steps
            context_time = training.context_time if is_student else 0.0
            return many_step_plan(num_steps, training.time_shift, block, guidance, context, context_time)
        plan = few_step_plan(training, context) if is_student else RolloutPlan((1.0,), block, context=context)
        if self.denoising_steps is not None:
            plan = replace(plan, times=warp_steps(list(self.denoising_steps), training.time_shift))
        return replace(plan, guidance=guidance)


def check_length(
    num_frames: int, plan: RolloutPlan | BidirectionalPlan, training: TrainingConfig, schedule: PromptSchedule | None = None,
    first_frames: Tensor | None = None,
) -> None:
    """Raise ValueError if a network trained with `training` cannot make such a video under the plan. first_frames: (F, C, H, W)."""
    if isinstance(plan, RolloutPlan):
        starts = block_starts(num_frames, plan, None if first_frames is None else first_frames[None])
        if schedule is not None:
            schedule.check(starts)
        return
    if schedule is not None or first_frames is not None:
        raise ValueError("--schedule and --init are for a rollout block by block, and the bidirectional teacher makes all frames at "
                         "once: use a student, or give --causal")
    check_num_frames("num_frames", num_frames, training.num_frames_per_block, training.independent_first_frame)
    if num_frames > training.max_num_frames:
        raise ValueError(
            f"num_frames is {num_frames}: the bidirectional teacher makes at most the {training.max_num_frames} frames it was "
            "trained on; lower it, use a student, or roll the teacher out with --causal"
        )


def prepared(
    networks: LoadedNetworks, runtime: Runtime, compile_option: str | None = None, int8_option: str | None = None
) -> LoadedNetworks:
    """A copy of the networks for generation only, with the weights of matrix products cast in advance. Given the name of an option,
    its passes are compiled or its products made in 8-bit integers. Raises ValueError naming the option if the machine cannot do that."""
    generator = copy.deepcopy(networks.generator)
    if int8_option is not None:
        require_exact_int8(int8_option, runtime.device)
        gain = gain_over_float32(torch.int8)
        if gain < 1:  # processors without instructions for them are several times slower
            warnings.warn(f"a product of 8-bit integers takes {1 / gain:.1f} times as long as one of float32 on this processor: "
                          f"leave {int8_option} out", stacklevel=2)
        generator.quantize_products(runtime.dtype)
    generator.cast_products(runtime.dtype)
    if compile_option is not None:
        require_compiler(compile_option, runtime.device)
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        generator.compile_passes()
    return replace(networks, generator=generator)


def generate(
    networks: LoadedNetworks, prompts: list[str], seeds: list[int], num_frames: int, settings: SamplerSettings, runtime: Runtime,
    batch_size: int, show_progress: bool = False, schedule: PromptSchedule | None = None, first_frames: Tensor | None = None,
) -> Tensor:
    """One video for each (prompt, seed): (B, F, C, H, W), float32, on the CPU, not clamped to [-1, 1].

    batch_size: videos in a forward pass. schedule: see `sample_few_step`. first_frames (F, C, H, W) in [-1, 1]: every video begins with
    them. Unknown words are named in one warning for the whole call. Raises ValueError if prompts, seeds, length, settings and checkpoint
    do not fit each other.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"found {len(prompts)} prompts and {len(seeds)} seeds: expected one seed for each of at least one prompt")
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    sampler = Sampler(networks.generator, networks.text_encoder, settings.make_plan(networks.config.training))
    check_length(num_frames, sampler.plan, networks.config.training, schedule, first_frames)
    later = [] if schedule is None else [prompt for _, prompt in schedule.entries[1:]]
    networks.text_encoder.tokenize(list(dict.fromkeys(prompts + later)))  # warns once, of all prompts together
    size, padding = batch_size, 0
    if networks.generator.is_compiled:  # each size is compiled, so all batches get one size
        size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
        padding = -len(prompts) % size
    filled = [*prompts, *prompts[-1:] * padding], [*seeds, *seeds[-1:] * padding]
    videos = []
    with warnings.catch_warnings(), tqdm(total=len(prompts), unit="video", disable=not show_progress, dynamic_ncols=True) as bar:
        warnings.filterwarnings("ignore", category=UserWarning, module="network.text_encoder")  # the same again, batch by batch
        for first in range(0, len(filled[0]), size):
            texts, batch_seeds = (values[first : first + size] for values in filled)
            given = None if first_frames is None else first_frames.to(runtime.device).expand(len(texts), -1, -1, -1, -1)
            video = sample(sampler, texts, batch_seeds, num_frames, runtime, schedule, given)
            videos.append(video[: len(prompts) - first].cpu())
            bar.update(len(videos[-1]))
    return torch.cat(videos)


def describe_sampler(settings: SamplerSettings, training: TrainingConfig) -> str:
    """A few words on how a network trained with `training` is sampled, such as "4 steps" or "50 steps, guidance 4, eta 1"."""
    plan = settings.make_plan(training)
    guidance = "" if plan.guidance == 1 else f", guidance {plan.guidance:g}"
    if isinstance(plan, BidirectionalPlan):
        return f"{plan.num_steps} steps{guidance}" + ("" if plan.eta == 0 else f", eta {plan.eta:g}")
    return f"{len(plan.times)} steps{guidance}"
