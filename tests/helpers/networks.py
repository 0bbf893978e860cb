"""Small networks with random weights, and what they are given."""

import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_video_sf import SelfForcingEngine, Text
from machine.batch_random import BatchRandom
from network.text_encoder import TextEncoder
from tiny_causal_wan import ModelConfig, PromptContext, TinyCausalWanModel
from training.checkpoint import save_checkpoint
from training.config import Config, SelfForcingConfig, config_to_dict

SMALL_SIZES = {
    "frame_size": 8, "width": 24, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2, "patch_size": [1, 4, 4], "text_width": 32
}


def load_self_test(name: str) -> dict[str, Any]:
    """The functions of the checks that `python NAME.py` runs."""
    return runpy.run_path(str(Path(__file__).parent.parent / "self_tests" / f"{name}.py"))


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Replace zero-initialised parameters by small normals, so that every path through a fresh network matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return module


def build_small_model(seed: int = 0, **sizes: int | list[int]) -> TinyCausalWanModel:
    """A randomised network of `SMALL_SIZES`, some of them replaced."""
    torch.manual_seed(seed)
    return randomise(TinyCausalWanModel(ModelConfig(**{**SMALL_SIZES, **sizes})), seed).eval()


def build_engine(**changes: object) -> SelfForcingEngine:
    """The engine of `build_small_model`, from seed 0."""
    return SelfForcingEngine(SelfForcingConfig(**changes), build_small_model(), torch.Generator().manual_seed(0))


def perturb(module: nn.Module) -> None:
    """Move every weight a little."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))


def texts_of(engine: SelfForcingEngine) -> tuple[Text, Text]:
    """Two prompts and two null prompts."""
    return random_text(engine.real_score, 2), random_text(engine.real_score, 2, seed=9)


def batch_random(seed: int = 0) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed))


def random_text(model: TinyCausalWanModel, batch_size: int, seed: int = 0, num_tokens: int = 5) -> tuple[Tensor, Tensor]:
    """Prompts of 2 to num_tokens random token embeddings, as a text encoder returns them."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(batch_size, num_tokens, model.config.text_width, generator=random)
    length = torch.randint(2, num_tokens + 1, (batch_size, 1), generator=random)
    return text, torch.arange(num_tokens) < length


def random_prompt(model: TinyCausalWanModel, batch_size: int, seed: int = 0, num_tokens: int = 5) -> PromptContext:
    """The context of `random_text`."""
    return model.encode_prompt(*random_text(model, batch_size, seed, num_tokens))


def random_video(model: TinyCausalWanModel, batch_size: int, num_frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy video (B, F, C, H, W) and one time in [0.1, 1] per temporal patch, as (B, F)."""
    random = torch.Generator().manual_seed(seed)
    side, temporal_patch = model.config.frame_size, model.config.patch_size[0]
    x_t = torch.randn(batch_size, num_frames, model.config.channels, side, side, generator=random)
    t = 0.1 + 0.9 * torch.rand(batch_size, num_frames // temporal_patch, generator=random)
    return x_t, t.repeat_interleave(temporal_patch, 1)


def save_untrained(path: Path, config: Config, num_drawn: int = 8) -> Path:
    """Write a checkpoint of networks with random weights everywhere, which drew so many prompts of seed 0."""
    torch.manual_seed(0)
    generator, text_encoder = randomise(TinyCausalWanModel(config.model)), TextEncoder(config.text)
    save_checkpoint(path, {
        "generator_state_dict": generator.state_dict(), "text_encoder_state_dict": text_encoder.state_dict(), "optimizer_state_dict": {},
        "step": 1, "training_type": config.training.training_type, "config": config_to_dict(config), "prompts_drawn": {0: num_drawn},
    })
    return path


class GaussianScore(nn.Module):
    """The exact denoiser of N(mean + pooled prompt, factor factor^T), in place of a network; videos are (B, F, 1, 1, D)."""

    def __init__(self, mean: Tensor, factor: Tensor):
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean), nn.Parameter(factor)

    def encode_prompt(self, shift: Tensor, mask: Tensor) -> PromptContext:
        return PromptContext([], [], mask, shift)

    def forward_bidirectional(self, x_t: Tensor, t: Tensor, prompt: PromptContext) -> Tensor:
        """E[x_0 | x_t] = m + (1 - t) S ((1 - t)^2 S + t^2 I)^-1 (x_t - (1 - t) m), handed out as a velocity."""
        t, mean = t[..., None, None, None], self.mean + prompt.pooled[:, None, None, None]
        covariance = self.factor @ self.factor.T
        noisy = (1 - t).square() * covariance + t.square() * torch.eye(len(self.mean), dtype=x_t.dtype)  # (B, F, 1, D, D)
        solved = torch.linalg.solve(noisy, (x_t - (1 - t) * mean).transpose(-1, -2)).transpose(-1, -2)
        return (x_t - (mean + (1 - t) * solved @ covariance)) / t


def shift_text(batch_size: int, shift: list[float]) -> Text:
    """The prompt that moves the mean by shift."""
    return torch.tensor([shift]).expand(batch_size, -1), torch.ones(batch_size, 1, dtype=torch.bool)
