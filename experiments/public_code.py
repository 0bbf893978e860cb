"""The public Self-Forcing code beside ours: its causal network, built at the size of ours from a clone, and its inference loop.

Dimensions: B batch, F frames, C channels, H height, W width, L prompt tokens, N tokens of a frame.

Its code is read from a clone of https://github.com/guandeh17/Self-Forcing. The configuration classes of diffusers are replaced by empty
ones, its attention kernels, which need CUDA and bfloat16, by torch's fused attention. Without VAE and T5, as ours has neither.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from method.flow_matching import add_noise, x_0_from_velocity
from network.attention import NUM_TRAIN_TIMESTEPS
from tiny_causal_wan import ModelConfig

HOW_TO_GET_IT = "git clone https://github.com/guandeh17/Self-Forcing, then give --public_code the folder that it makes"
MODEL_FILE, NETWORK_FILE = Path("wan/modules/model.py"), Path("wan/modules/causal_model.py")


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """(B, S, heads, d) each, as its kernels take them."""
    return functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Within, stand-ins for the modules that its files import; afterwards they are gone."""
    contents: dict[str, dict[str, object]] = {
        "wan": {}, "wan.modules": {}, "wan.modules.attention": {"attention": _attention, "flash_attention": _attention},
        "diffusers": {}, "diffusers.models": {}, "diffusers.models.modeling_utils": {"ModelMixin": nn.Module},
        "diffusers.configuration_utils": {"ConfigMixin": type("ConfigMixin", (), {}), "register_to_config": lambda function: function},
    }
    names = [*contents, "wan.modules.model", "wan.modules.causal_model"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    for name, attributes in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(attributes, __path__=[])
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _load(folder: Path, file: Path) -> ModuleType:
    """The module of a file, under its name while `_stand_ins` last, then under one of ours: torch.compile looks it up."""
    name = ".".join(file.with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, folder / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__name__ = f"public_self_forcing_{file.stem}"
    sys.modules[module.__name__] = module
    return module


def check_clone(folder: Path | None) -> None:
    """Raise ValueError unless the folder is given and a clone."""
    if folder is None:
        raise ValueError(f"--parts public needs the public code to run beside ours: {HOW_TO_GET_IT}")
    for file in (MODEL_FILE, NETWORK_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"--public_code is {folder}, which lacks {file}: {HOW_TO_GET_IT}")


def build_public_network(folder: Path, config: ModelConfig, text_len: int) -> nn.Module:
    """The causal network of a clone, untrained, at the sizes of `config`, for prompts of text_len tokens. Raises ValueError if it cannot be
    built."""
    try:
        with _stand_ins():
            _load(folder, MODEL_FILE)
            network = _load(folder, NETWORK_FILE).CausalWanModel(
                patch_size=tuple(config.patch_size), text_len=text_len, in_dim=config.channels, dim=config.width,
                ffn_dim=config.ffn_ratio * config.width, freq_dim=config.width, text_dim=config.text_width, out_dim=config.channels,
                num_heads=config.num_heads, num_layers=config.num_layers,
            )
    except (AttributeError, ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"--public_code is {folder}, whose network cannot be built ({error}): another version? {HOW_TO_GET_IT}") from error
    return network.eval().requires_grad_(False)


@torch.no_grad()
def sample_public(
    network: nn.Module, config: ModelConfig, text: Tensor, num_frames: int, num_frames_per_block: int, times: tuple[float, ...],
    random: torch.Generator,
) -> Tensor:
    """A video (B, F, C, H, W) by its inference loop: every block walks the times with its cache, which holds all frames, then runs once
    more at time 0. text: (B, L, text_width)."""
    batch_size, tokens = text.shape[0], config.tokens_per_patch_row
    frame = (config.channels, config.frame_size, config.frame_size)
    room = (batch_size, num_frames // config.patch_size[0] * tokens, config.num_heads, config.head_size)
    kv_cache = [
        {"k": torch.zeros(room), "v": torch.zeros(room), "global_end_index": torch.zeros(1, dtype=torch.long),
         "local_end_index": torch.zeros(1, dtype=torch.long)} for _ in range(config.num_layers)
    ]
    prompt_cache: list[dict[str, object]] = [{"is_init": False} for _ in range(config.num_layers)]

    def velocity(x_t: Tensor, t: Tensor, first: int) -> Tensor:
        v = network(
            x_t.transpose(1, 2), NUM_TRAIN_TIMESTEPS * t, list(text), seq_len=room[1], kv_cache=kv_cache, crossattn_cache=prompt_cache,
            current_start=first // config.patch_size[0] * tokens,
        )
        return v.transpose(1, 2)  # (B, F_block, C, H, W)

    blocks = []
    for first in range(0, num_frames, num_frames_per_block):
        shape = (batch_size, num_frames_per_block, *frame)
        x_t = torch.randn(shape, generator=random)
        for step, time in enumerate(times):
            t = torch.full(shape[:2], time)
            x_0 = x_0_from_velocity(x_t, velocity(x_t, t, first), t)
            if step + 1 < len(times):
                x_t = add_noise(x_0, torch.randn(shape, generator=random), torch.full_like(t, times[step + 1]))
        velocity(x_0, torch.zeros(shape[:2]), first)
        blocks.append(x_0)
    return torch.cat(blocks, dim=1)
