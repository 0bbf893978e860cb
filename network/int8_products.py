"""Matrix products in 8-bit integers, for generation: every token and every output channel has its own scale.

Dynamic vector-wise quantisation (Dettmers et al. 2022, arXiv 2208.07339, section 3.1, without its treatment of outliers). With AVX-512
VNNI a processor does four products of 8-bit integers in the time of one in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 127  # not -128, so that the range is symmetric
SMALLEST_SCALE = 1e-12  # of a row of zeros


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (..., K) as int8 in -127..127 and their float32 scales (..., 1): x is scale * int8, to half a scale."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A trained linear layer with a bias, (..., K) to (..., N), for inference: int8 products, summed exactly in int32, results in `dtype`.
    Faster only if compiled: else finding scales and rounding cost more than the products save."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.dtype = dtype
        self.register_buffer("weight", weight)  # (N, K)
        self.register_buffer("scale", scale.squeeze(1))  # (N,)
        self.register_buffer("bias", linear.bias.detach().float())  # (N,)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantize_rows(x)
        product = torch._int_mm(rows.flatten(0, -2), self.weight.t()).unflatten(0, x.shape[:-1])  # (..., N) int32
        return torch.addcmul(self.bias, product.float(), scale * self.scale).to(self.dtype)


def quantize_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer inside the module by its `Int8Linear`."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, Int8Linear(child, dtype))


def require_exact_int8(name: str, device: torch.device) -> None:
    """Raise ValueError naming the option if int8 products are not available, off the CPU, or saturate."""
    if device.type != "cpu":
        raise ValueError(f"{name} is for the CPU, and this runs on {device}: leave {name} out")
    largest = torch.full((32, 64), LARGEST, dtype=torch.int8)
    expected = largest.double() @ largest.double().T
    if not torch.equal(torch._int_mm(largest, largest.t()).double(), expected):
        raise ValueError(f"{name} needs exact products of 8-bit integers, and this processor saturates: leave {name} out")
