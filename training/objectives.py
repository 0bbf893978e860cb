"""Losses on real videos: of the pretraining that makes bidirectional teacher and causal start in one, of diffusion and teacher forcing.

Dimensions: B batch, F frames, C channels, H height, W width, K = F / num_frames_per_block blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from machine.batch_random import BatchRandom
from method.flow_matching import add_noise, sample_time
from method.losses import x_0_prediction_loss
from method.settings import PretrainConfig
from network.text_encoder import NULL_PROMPT
from tiny_causal_wan import PromptContext, TinyCausalWanModel


def bidirectional_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, config: PretrainConfig, random: BatchRandom
) -> Tensor:
    """Flow matching with full attention and one time for the whole video: what makes the teacher."""
    t = random.draw(len(x_0), lambda total: sample_time((total, 1), config.time_shift, random.generator))
    t = t.to(x_0.device).expand(x_0.shape[:2])  # (B, F)
    x_t = add_noise(x_0, random.normal_like(x_0), t)
    return x_0_prediction_loss(model.forward_bidirectional(x_t, t, prompt), x_t, x_0, t, config.loss_time_floor)


def block_causal_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, config: PretrainConfig, random: BatchRandom,
    x_before: Tensor | None = None,
) -> Tensor:
    """Diffusion forcing (arXiv 2407.01392) with block-causal attention, one time per block, and clean context.

    With `clean_prefix_probability` (0 is diffusion forcing itself) the first 0..K-1 blocks of a video are at t = 0 and do not count in
    the loss: the context that the KV cache supplies at inference. With x_before (B, F, C, H, W), a share `switch_probability` of these
    prefixes shows its last frames and the video begins behind them: what the network sees after a switch of the prompt. The mean over
    equal parts of a batch is the loss of the batch, although they differ in the number of frames that count.
    """
    batch_size = random.batch_size(len(x_0))
    t, weights = sample_block_times(config, batch_size, x_0.shape[1], config.clean_prefix_probability, random.generator)
    num_counted = (weights.sum() * (len(x_0) / batch_size)).to(x_0.device)
    t, frame_weight = random.cut(t).to(x_0.device), random.cut(weights).to(x_0.device)
    if x_before is not None:
        switches = random.draw(len(x_0), lambda total: torch.rand(total, generator=random.generator)) < config.switch_probability
        x_0 = shift_in(x_before, x_0, (frame_weight == 0).sum(1) * switches.to(x_0.device))
    x_t = add_noise(x_0, random.normal_like(x_0), t)
    v = model.forward_block_causal(x_t, t, prompt, config.num_frames_per_block, config.context)
    return x_0_prediction_loss(v, x_t, x_0, t, config.loss_time_floor, frame_weight, num_counted)


def shift_in(x_before: Tensor, x: Tensor, num_before: Tensor) -> Tensor:
    """The last num_before (B,) frames of x_before and the first of x, both (B, F, C, H, W): F frames again."""
    num_frames = x.shape[1]
    frames = torch.arange(num_frames, device=x.device) + num_frames - num_before[:, None]  # (B, F), counted in both together
    return torch.cat([x_before, x], dim=1)[torch.arange(len(x), device=x.device)[:, None], frames]


def teacher_forcing_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, config: PretrainConfig, random: BatchRandom
) -> Tensor:
    """Every block noised to its own time and denoised from the clean blocks before it, all in one pass: teacher forcing (Williams and
    Zipser 1989) for diffusion, as the baseline of Self-Forcing's Table 2 (arXiv 2506.08009)."""
    t, _ = sample_block_times(config, random.batch_size(len(x_0)), x_0.shape[1], 0.0, random.generator)
    t = random.cut(t).to(x_0.device)
    x_t = add_noise(x_0, random.normal_like(x_0), t)
    v = model.forward_teacher_forced(x_t, t, x_0, prompt, config.num_frames_per_block, config.context)
    return x_0_prediction_loss(v, x_t, x_0, t, config.loss_time_floor)


def sample_block_times(
    config: PretrainConfig, batch_size: int, num_frames: int, clean_prefix_probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Times (B, F), one per block, and the weight (B, F) of each frame in the loss: 0 on the clean prefix, else 1."""
    sizes = torch.tensor(config.context.block_sizes(num_frames, config.num_frames_per_block))
    t = sample_time((batch_size, len(sizes)), config.time_shift, generator)
    prefix = torch.randint(len(sizes), (batch_size, 1), generator=generator)
    has_prefix = torch.rand((batch_size, 1), generator=generator) < clean_prefix_probability
    clean = has_prefix & (torch.arange(len(sizes)) < prefix)  # (B, K)
    return t.masked_fill(clean, 0.0).repeat_interleave(sizes, 1), (~clean).float().repeat_interleave(sizes, 1)


def drop_prompts(prompts: list[str], probability: float, random: BatchRandom) -> list[str]:
    """Replace each prompt by the null prompt with this probability (arXiv 2207.12598, section 3.2)."""
    drop = random.draw(len(prompts), lambda total: torch.rand(total, generator=random.generator)) < probability
    return [NULL_PROMPT if dropped else prompt for prompt, dropped in zip(prompts, drop.tolist(), strict=True)]
