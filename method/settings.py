"""What each kind of training can be asked: one dataclass a kind, every default in a field, every check at construction.

Times of intervals are in steps; refusals name the key, what was found and what was expected.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from omegaconf import MISSING

from digits.deformation import MAX_VARIATION
from method.choices import require
from network.attention import NUM_TRAIN_TIMESTEPS, ContextWindow

CHOICES = {  # by setting
    "objective": ("mixed", "teacher_forcing", "diffusion_forcing"),
    "generator_inputs": ("self_rollout", "diffusion_forced", "teacher_forced"),
    "loss": ("dmd", "sid", "gan"),
    "optimizer": ("adamw", "muon"),
    "sharding": ("none", "fsdp2"),
    "trajectory_teacher": ("causal", "bidirectional"),
}
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (  # the settings, what each may be, and how a refusal says it
    ("num_steps batch_size num_frames_per_block teacher_steps log_interval keep_last accumulation_steps clip_batch_size "
     "trajectory_steps dfake_gen_update_ratio noise_draws", lambda x: x >= 1, "at least 1"),
    ("consistency_steps", lambda x: x >= 2, "at least 2"),
    ("sample_interval checkpoint_interval eval_videos health_interval", lambda x: x >= 0, "0 (off) or more"),
    ("clip_steps gan_penalty warmup_steps critic_warmup_steps weight_decay", lambda x: x >= 0, "0 (none) or more"),
    ("guidance teacher_guidance", lambda x: x >= 0, "0 or more (1 is no guidance)"),
    ("lr muon_lr critic_lr time_shift score_time_shift clip_norm gan_penalty_sigma", lambda x: 0 < x < math.inf, "a positive number"),
    ("decay_fraction teacher_eta teacher_ink_kept guidance_ink_kept prompt_dropout clean_prefix_probability bidirectional_share "
     "switch_probability", lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    ("ema_decay critic_ema_decay muon_momentum critic_muon_momentum", lambda x: 0 <= x < 1, "a number in [0, 1)"),
    ("loss_time_floor", lambda x: 0 < x <= 1, "a number in (0, 1]"),
    ("digit_variation", lambda x: 0 <= x <= MAX_VARIATION, f"0 (none) to {MAX_VARIATION}"),
    ("context_noise", lambda x: 0 <= x <= NUM_TRAIN_TIMESTEPS, f"a timestep in 0..{NUM_TRAIN_TIMESTEPS}"),
)


def check_num_frames(key: str, num_frames: int, num_frames_per_block: int, independent_first_frame: bool = False) -> None:
    """Raise ValueError naming the nearest valid counts unless num_frames is a positive multiple of the block, after a single first frame
    if that is a block of its own."""
    first = 1 if independent_first_frame else 0
    if num_frames < 1 or (num_frames - first) % num_frames_per_block:
        below = (num_frames - first) // num_frames_per_block * num_frames_per_block + first
        nearest = [count for count in (below, below + num_frames_per_block) if count > 0] or [first or num_frames_per_block]
        expected = "one frame and a multiple" if first else "a positive multiple"
        reason = " (independent_first_frame is true)" if first else ""
        raise ValueError(
            f"{key} is {num_frames}: expected {expected} of num_frames_per_block={num_frames_per_block}{reason}; "
            f"nearest valid: {' or '.join(map(str, nearest))}"
        )


def check_denoising_steps(key: str, steps: list[int]) -> None:
    """Raise ValueError unless the timesteps descend strictly from 1000 to at least 1."""
    is_valid = steps[:1] == [NUM_TRAIN_TIMESTEPS] and steps[-1] >= 1 and all(later < step for step, later in pairwise(steps))
    expected = f"strictly descending whole timesteps from {NUM_TRAIN_TIMESTEPS} down to at least 1, such as [1000, 750, 500, 250]"
    require(is_valid, key, list(steps), expected)


@dataclass
class DataConfig(ABC):
    """What every data set shares: square frames of frame_size pixels a side, of 1 or 3 channels."""

    frame_size: int = 32
    channels: int = 1

    @property
    @abstractmethod
    def why_no_digits(self) -> str | None:
        """The reason why figures of digits say nothing about these videos; None if the videos show digits."""


@dataclass
class TrainingConfig(ABC):
    """What every kind of training shares. Times of intervals in steps; 0 switches an interval off."""

    training_type: str = MISSING  # a key of TRAINING_KINDS
    num_steps: int = 1000
    batch_size: int = 16  # videos a step, over all processes and micro-batches
    lr: float = 1e-4
    decay_fraction: float = 0.0  # share of the run, at its end, over which the learning rates fall linearly to 0
    num_frames_per_block: int = 3
    min_num_frames: int = 21
    max_num_frames: int = 21
    window_frames: int | None = None  # how many frames a block sees, itself and the sink included; all if not given
    sink_frames: int = 0  # number of initial frames kept in the cache (attention sink), right before the rest of the window
    hide_first_chunk: bool = False  # the last block of a video does not see the first, as if it had left the window
    independent_first_frame: bool = False  # the first block is one frame: videos of [1, 3, 3, ...]
    time_shift: float = 3.0  # of the times of samplers and of pretraining, toward noise above 1
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    log_interval: int = 1
    sample_interval: int = 250
    checkpoint_interval: int = 250
    keep_last: int = 2  # interval checkpoints kept beside the final one
    eval_videos: int = 64  # videos read by the judge at the end; 0 switches it off
    teacher_steps: int = 50  # steps of the many-step samples that are shown
    teacher_eta: float = 1.0  # fresh noise in those steps: 0 is Euler's method, 1 ancestral sampling
    teacher_guidance: float = 4.0  # weight of guidance in those of the bidirectional teacher; 1 is none
    teacher_ink_kept: float = 0.2  # of what that guidance adds along the predicted ink: 1 is classifier-free guidance, bolder strokes
    guidance: float = 2.5  # of many-step samples block by block, and of the teacher in distribution matching; 1 is none
    accumulation_steps: int = 1  # micro-batches that a step's batch is cut into: less memory, the same gradient
    activation_checkpointing: bool = False  # make activations of the blocks again in the backward pass: less memory, more time
    sharding: str = "none"  # fsdp2 splits the blocks of every network over the processes: less memory, more messages
    resume: str | None = "never"  # or auto, the newest checkpoint of this run, or the PATH of one of the same training type

    def __post_init__(self) -> None:
        own_type = type(self).training_type
        self.check("training_type", self.training_type == own_type, f"{own_type}, which training= has chosen")
        for name, value in vars(self).items():
            for names, is_valid, expected in RANGES:
                self.check(name, name not in names.split() or is_valid(value), expected)
            if name in CHOICES:
                self.check(name, value in CHOICES[name], f"one of {', '.join(CHOICES[name])}")
        if self.resume is None:  # as earlier versions stored it
            self.resume = "never"
        require(self.resume != "", "training.resume", "empty", "never, auto or the path of a checkpoint")
        for name in ("min_num_frames", "max_num_frames"):
            check_num_frames(f"training.{name}", getattr(self, name), self.num_frames_per_block, self.independent_first_frame)
        at_most = f"at most training.max_num_frames={self.max_num_frames}"
        self.check("min_num_frames", self.min_num_frames <= self.max_num_frames, at_most)
        self.context.check(self.num_frames_per_block, "training.")
        no_window = "0 where training.window_frames is not given, as every frame stays visible then"
        self.check("sink_frames", self.sink_frames == 0 or self.window_frames is not None, no_window)

    def check(self, name: str, condition: bool, expected: str) -> None:
        """Raise ValueError naming the setting, its value and what was expected, unless the condition holds."""
        require(condition, f"training.{name}", getattr(self, name), expected)

    @property
    def context(self) -> ContextWindow:
        """What a block sees of the past, under the mask and in the rollout."""
        return ContextWindow(self.window_frames, self.sink_frames, self.hide_first_chunk, self.independent_first_frame)

    @property
    @abstractmethod
    def summary(self) -> str:
        """What is trained on what, in a few words: does it see videos of the data set?"""


@dataclass
class PretrainConfig(TrainingConfig):
    """Training on the videos of Moving MNIST, on short clips first if asked.

    objective: "mixed" makes one network that is bidirectional teacher and causal starting point (the two kinds of steps
    in turn, a bidirectional_share of them of the first kind); "teacher_forcing" and "diffusion_forcing" train a causal one alone.
    """

    training_type: str = "pretrain"
    objective: str = "mixed"
    bidirectional_share: float = 0.5  # of the steps of the mixed objective, evenly spread
    pretrained_checkpoint: str | None = None  # start from its network; its text encoder is kept as it is
    num_steps: int = 6000
    batch_size: int = 24
    clip_steps: int = 0  # the first so many steps see clips of clip_frames, clip_batch_size at a time: digits are learned sooner
    clip_frames: int = 6
    clip_batch_size: int = 64
    digit_variation: float = 0.0  # every video turns, slants and stretches its digits by up to so much (`digits.deformation`)
    lr: float = 1.5e-3  # AdamW: embeddings, biases, norms, head
    muon_lr: float = 3e-3  # Muon: matrices of the transformer blocks
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    prompt_dropout: float = 0.1
    clean_prefix_probability: float = 0.5
    switch_probability: float = 0.0  # of the clean prefixes: how many show other digits than the prompt, as the past does where it switches
    compile: bool = False  # torch.compile of the transformer blocks: needs a C++ compiler, pays only in long runs
    loss_time_floor: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pretrained_checkpoint != "", "training.pretrained_checkpoint", "empty", "a path, or null for none")
        has_prefixes = self.objective != "teacher_forcing" and self.clean_prefix_probability > 0
        needs = "0 without clean prefixes (training.clean_prefix_probability above 0, and an objective that has them)"
        self.check("switch_probability", self.switch_probability == 0 or has_prefixes, needs)
        if self.clip_steps:
            check_num_frames("training.clip_frames", self.clip_frames, self.num_frames_per_block, self.independent_first_frame)
        self.check("compile", not self.compile or self.sharding == "none", f"false with training.sharding={self.sharding}")

    @property
    def summary(self) -> str:
        return f"{self.objective} objective, on real videos"


@dataclass
class FewStepConfig(TrainingConfig):
    """What every training of a few-step causal student shares: its teacher, its denoising steps, its optimizer."""

    pretrained_checkpoint: str = "pretrained/teacher.pt"
    num_steps: int = 700
    batch_size: int = 8
    lr: float = 1.5e-4
    guidance: float = 2.0  # stronger guidance makes strokes bolder than real ones
    teacher_steps: int = 25  # for the samples of a run only
    adam_betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    ema_decay: float = 0.99
    clamp_x_0: bool = True  # keep every x_0 of the student in [-1, 1], in training and in generation alike
    denoising_steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pretrained_checkpoint != "", "training.pretrained_checkpoint", "empty", "the path of a teacher's checkpoint")
        check_denoising_steps("training.denoising_steps", self.denoising_steps)
        is_pair = len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas)
        self.check("adam_betas", is_pair, "two numbers in [0, 1)")

    @property
    def context_time(self) -> float:
        """The time at which finished blocks are written into the cache: as they are, unless a training says otherwise."""
        return 0.0


@dataclass
class SelfForcingConfig(FewStepConfig):
    """Self-Forcing with distribution matching. A step is one critic update; every `dfake_gen_update_ratio`-th step also
    updates the generator.

    generator_inputs: "self_rollout" is Self-Forcing, which needs no videos where it continues none; "diffusion_forced" (CausVid, arXiv
    2412.07772) and "teacher_forced" denoise real videos in one pass instead. loss: "gan" compares with real videos.
    """

    training_type: str = "dmd2"
    num_steps: int = 560
    lr: float = 3e-4
    decay_fraction: float = 0.5  # of the generator's rate alone; as it falls, critic and generator stop chasing each other
    generator_inputs: str = "self_rollout"
    loss: str = "dmd"
    dmd_sign: int = 1  # of the DMD gradient; -1 is a fault on purpose, to see what it does to a run (docs/health.md)
    sid_alpha: float = 1.0  # weight of the squared term of SiD's loss
    gan_penalty: float = 0.1  # weight of R1 and of R2 in the discriminator's loss
    gan_penalty_sigma: float = 0.05  # step of their finite differences
    guidance: float = 2.5
    # Times of the scores at which the teacher is guided: here guidance makes the digit clearer, at higher times the strokes bolder.
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 0.85])
    guidance_ink_kept: float = 1.0  # share kept of what guidance adds along the predicted ink: less makes thinner strokes
    clamp_scores: bool = False  # keep what critic and guided teacher predict in [-1, 1], as all data is; guidance leaves it
    generator_checkpoint: str | None = None  # the network that the generator starts from; the teacher if not given
    critic_lr: float = 2e-4
    optimizer: str = "adamw"  # of generator and critic; muon: of the matrices of the transformer blocks, adamw of the rest
    muon_momentum: float = 0.5  # of the generator
    critic_muon_momentum: float = 0.8
    ema_power: float | None = None  # update k has the weight k^ema_power in the generator's average; null: by ema_decay
    critic_ema_decay: float = 0.9  # of the critic that judges the generator; 0 lets the newest one judge, which is far noisier
    context_noise: int = 0  # timestep, 0..1000, at which finished blocks are written into the cache
    gradient_frames: int = 21  # only the last so many frames carry gradient and are scored
    # Score a window of min_num_frames to max_num_frames frames somewhere in a rollout of up to so many; that of the start if not given.
    rollout_frames: int | None = None
    switch_probability: float = 0.0  # share of the later windows that follow a switch of the prompt (docs/long_video.md)
    # Blocks continue past their exit step to the last one, so that later blocks and the critic see finished videos, as at inference.
    # Else the exit step's prediction is the block (Self-Forcing, Algorithm 1); docs/decisions.md compares both.
    finish_blocks: bool = False
    same_exit_step: bool = True  # one exit step for all blocks of a rollout; false draws one per block
    dfake_gen_update_ratio: int = 4
    noise_draws: int = 1  # noised copies of every video, each at another noise level, for the critic and under the scores
    critic_warmup_steps: int = 16  # critic updates before the generator's first
    min_score_time: float = 0.02
    max_score_time: float = 0.98
    score_time_shift: float = 1.0  # of the times of scores and critic, toward noise above 1; the public code shifts by 5
    loss_time_floor: float = 0.3
    health_interval: int = 40  # steps between two readings of the generator's videos of fixed prompts (`health`); 0 switches them off

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("dmd_sign", self.dmd_sign in (1, -1), "1, or -1 for a run that flees its teacher")
        has_gradient = self.dmd_sign == 1 or self.loss == "dmd"
        self.check("dmd_sign", has_gradient, f"1 with training.loss={self.loss}, which has no DMD gradient")
        self.check("noise_draws", self.noise_draws == 1 or self.loss != "gan", "1 with training.loss=gan, which sees every video once")
        check_num_frames("training.gradient_frames", self.gradient_frames, self.num_frames_per_block)
        has_context = self.context_noise == 0 or self.generator_inputs == "self_rollout"
        inputs = f"0 with training.generator_inputs={self.generator_inputs}"
        self.check("context_noise", has_context, f"{inputs}, which shows no noised context")
        starts_later = self.switch_probability == 0 or self.rollout_frames is not None
        self.check("switch_probability", starts_later, "0 without training.rollout_frames, as no window starts later")
        if self.rollout_frames is not None:
            self._check_rollout_frames(self.rollout_frames)
        is_power = self.ema_power is None or 0 <= self.ema_power < math.inf
        self.check("ema_power", is_power, "0 (all updates count the same) or more, or null for ema_decay")
        is_interval = len(self.guidance_interval) == 2 and 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1
        self.check("guidance_interval", is_interval, "two times in [0, 1], the lower one first")
        times = self.min_score_time, self.max_score_time
        require(0 < times[0] < times[1] <= 1, "training.min_score_time and max_score_time", times, "0 < min < max <= 1")

    def _check_rollout_frames(self, rollout_frames: int) -> None:
        key = "training.rollout_frames"
        check_num_frames(key, rollout_frames, self.num_frames_per_block)
        at_most = f"training.max_num_frames={self.max_num_frames}"
        self.check("rollout_frames", rollout_frames >= self.max_num_frames, f"at least {at_most}")
        rolls = self.window_frames is not None and self.window_frames <= self.max_num_frames
        self.check("window_frames", rolls, f"at most {at_most}, with {key}: a long rollout needs a cache that rolls")
        uses_no_videos = self.generator_inputs == "self_rollout" and self.loss != "gan"
        self.check("rollout_frames", uses_no_videos, "none where real videos are used, which show no such stretches")
        for name in ("hide_first_chunk", "independent_first_frame"):
            self.check(name, not getattr(self, name), f"false with {key}, whose windows start anywhere")

    @property
    def context_time(self) -> float:
        return self.context_noise / NUM_TRAIN_TIMESTEPS

    @property
    def uses_videos(self) -> bool:
        """Does training see videos of the data set, not their captions alone?"""
        return self.generator_inputs != "self_rollout" or self.loss == "gan"

    @property
    def summary(self) -> str:
        inputs = f"{self.generator_inputs} inputs"
        if self.rollout_frames is not None:
            inputs = f"windows of self-rollouts of up to {self.rollout_frames} frames"
        return f"{self.loss} loss on {inputs}, {'on' if self.uses_videos else 'without'} real videos"


@dataclass
class CausalODEConfig(FewStepConfig):
    """A few-step start by regression on a teacher's ODE trajectories, which are made on the way; needs no videos.

    trajectory_teacher: "causal" rolls the teacher out block by block, so that the student sees all that its targets
    depend on (Causal Forcing's correction); "bidirectional" is the original (CausVid, arXiv 2412.07772, section 4.3).
    """

    training_type: str = "causal_ode"
    trajectory_teacher: str = "causal"
    trajectory_steps: int = 24  # Euler steps of a trajectory; the denoising steps must be among them

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = math.lcm(*(NUM_TRAIN_TIMESTEPS // math.gcd(step, NUM_TRAIN_TIMESTEPS) for step in self.denoising_steps))
        steps = f"every one of training.denoising_steps={list(self.denoising_steps)}, such as {fewest}"
        self.check("trajectory_steps", self.trajectory_steps % fewest == 0, f"a number of Euler steps that meets {steps}")

    @property
    def summary(self) -> str:
        return f"regression on {self.trajectory_teacher} trajectories, without real videos"


@dataclass
class CausalConsistencyConfig(FewStepConfig):
    """A few-step start by consistency distillation of the teacher-forced teacher on real videos (arXiv 2303.01469)."""

    training_type: str = "causal_consistency"
    consistency_steps: int = 24  # times between which neighbours are made to agree

    @property
    def summary(self) -> str:
        return "consistency distillation, on real videos"


TRAINING_KINDS: dict[str, type[TrainingConfig]] = {  # by training_type, as checkpoints store it
    "pretrain": PretrainConfig, "dmd2": SelfForcingConfig, "causal_ode": CausalODEConfig, "causal_consistency": CausalConsistencyConfig,
}
