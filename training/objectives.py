"""Losses that use data: the pretraining of one network as bidirectional teacher and as causal starting point, and the
two classic ways to train a causal one, diffusion forcing and teacher forcing.

Dimensions: B batch, F frames, C channels, H height, W width, K = F / num_frames_per_block blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from machine.batch_share import BatchShare, share_or_whole
from method.flow_matching import add_noise, sample_time
from method.losses import x_0_prediction_loss
from network.attention import WHOLE_PAST, ContextWindow
from tiny_causal_wan import PromptContext, TinyCausalWanModel


def bidirectional_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, time_shift: float, time_floor: float, generator: torch.Generator,
    share: BatchShare | None = None,
) -> Tensor:
    """Flow matching with full attention and one time for the whole video: what makes the teacher."""
    share = share_or_whole(share, len(x_0))
    t = share.draw(lambda total: sample_time((total, 1), time_shift, generator)).to(x_0.device).expand(x_0.shape[:2])
    x_t = add_noise(x_0, _noise_like(x_0, generator, share), t)
    return x_0_prediction_loss(model.forward_bidirectional(x_t, t, prompt), x_t, x_0, t, time_floor)


def block_causal_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, num_frames_per_block: int, clean_prefix_probability: float,
    time_shift: float, time_floor: float, generator: torch.Generator, context: ContextWindow = WHOLE_PAST,
    share: BatchShare | None = None,
) -> Tensor:
    """Diffusion forcing (arXiv 2407.01392) with block-causal attention, one time per block, and clean context.

    In a share `clean_prefix_probability` of the videos the first 0..K-1 blocks stand at t = 0 and do not count in the
    loss: this is the context that the KV cache supplies at inference. Share 0 is diffusion forcing itself. Of a share of
    a batch, the mean over all shares is the loss of the batch, although they differ in the frames that count.
    """
    share = share_or_whole(share, len(x_0))
    t, weights = sample_block_times(
        share.total, x_0.shape[1], num_frames_per_block, clean_prefix_probability, time_shift, generator, context
    )
    t, frame_weight, num_counted = (values.to(x_0.device) for values in (share.of(t), share.of(weights), weights.sum() * share.fraction))
    x_t = add_noise(x_0, _noise_like(x_0, generator, share), t)
    v = model.forward_block_causal(x_t, t, prompt, num_frames_per_block, context)
    return x_0_prediction_loss(v, x_t, x_0, t, time_floor, frame_weight, num_counted)


def teacher_forcing_loss(
    model: TinyCausalWanModel, x_0: Tensor, prompt: PromptContext, num_frames_per_block: int, time_shift: float, time_floor: float,
    generator: torch.Generator, context: ContextWindow = WHOLE_PAST, share: BatchShare | None = None,
) -> Tensor:
    """Every block noised at a time of its own and denoised from the clean blocks before it, all in one pass.

    The next-token loss of language models (Williams and Zipser 1989) for diffusion, as the baseline of Self-Forcing's
    Table 2 (arXiv 2506.08009).
    """
    share = share_or_whole(share, len(x_0))
    t, _ = sample_block_times(share.total, x_0.shape[1], num_frames_per_block, 0.0, time_shift, generator, context)
    t = share.of(t).to(x_0.device)
    x_t = add_noise(x_0, _noise_like(x_0, generator, share), t)
    v = model.forward_teacher_forced(x_t, t, x_0, prompt, num_frames_per_block, context)
    return x_0_prediction_loss(v, x_t, x_0, t, time_floor)


def sample_block_times(
    batch_size: int, num_frames: int, num_frames_per_block: int, clean_prefix_probability: float, time_shift: float,
    generator: torch.Generator, context: ContextWindow = WHOLE_PAST,
) -> tuple[Tensor, Tensor]:
    """Times (B, F), one per block, and the weight (B, F) of each frame in the loss: 0 on the clean prefix, else 1."""
    sizes = torch.tensor(context.block_sizes(num_frames, num_frames_per_block))
    num_blocks = len(sizes)
    t = sample_time((batch_size, num_blocks), time_shift, generator)
    prefix = torch.randint(num_blocks, (batch_size, 1), generator=generator)
    has_prefix = torch.rand((batch_size, 1), generator=generator) < clean_prefix_probability
    clean = has_prefix & (torch.arange(num_blocks) < prefix)  # (B, K)
    t = t.masked_fill(clean, 0.0)
    return t.repeat_interleave(sizes, 1), (~clean).float().repeat_interleave(sizes, 1)


def drop_prompts(
    prompts: list[str], probability: float, null_prompt: str, generator: torch.Generator, share: BatchShare | None = None
) -> list[str]:
    """Replace each prompt by the null prompt with this probability (arXiv 2207.12598, section 3.2)."""
    share = share_or_whole(share, len(prompts))
    drop = share.draw(lambda total: torch.rand(total, generator=generator)) < probability
    return [null_prompt if dropped else prompt for prompt, dropped in zip(prompts, drop.tolist(), strict=True)]


def _noise_like(x: Tensor, generator: torch.Generator, share: BatchShare) -> Tensor:
    return share.draw_normal(tuple(x.shape[1:]), generator, x.dtype).to(x.device)
