"""Products in 8-bit integers: rounding, exactness, and what a network made of them does."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from network.int8_products import LARGEST, Int8Linear, quantize_linears, quantize_rows, require_exact_int8

CPU = torch.device("cpu")


def activations() -> torch.Tensor:
    """(2, 5, 48), whose tokens differ in size by four orders of magnitude."""
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-2, 2, 10).view(2, 5, 1)


def test_a_row_is_kept_to_half_a_step_its_negative_mirrors_it_and_zeros_stay_zero():
    x = activations()
    rows, scale = quantize_rows(x)
    assert rows.dtype == torch.int8 and scale.shape == (2, 5, 1)
    assert torch.equal(rows.abs().amax(-1), torch.full((2, 5), LARGEST, dtype=torch.int8))  # every token uses the whole range
    assert ((rows * scale - x).abs() <= scale * 0.5001).all()
    negative, same_scale = quantize_rows(-x)
    assert torch.equal(negative, -rows) and torch.equal(same_scale, scale)
    rows, scale = quantize_rows(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not rows.any() and scale.dtype == torch.float32 and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_the_product_of_what_was_rounded(dtype):
    torch.manual_seed(1)
    linear, x = nn.Linear(48, 40), activations()
    layer = Int8Linear(linear, dtype)
    (rows, x_scale), (weight, scale) = quantize_rows(x), quantize_rows(linear.weight.detach())
    expected = (rows * x_scale.double()) @ (weight * scale.double()).T + linear.bias.detach().double()
    y = layer(x)
    assert y.shape == (2, 5, 40) and y.dtype == dtype and not y.requires_grad
    assert_close(y, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert layer(x[:, :0]).shape == (2, 0, 40)  # a pass that only writes the cache attends for no token in its last layer


def test_all_linear_layers_inside_are_replaced_and_nothing_else():
    network = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(48, 40), nn.LayerNorm(40)), "outer": nn.Linear(48, 40)})
    quantize_linears(network, torch.bfloat16)
    assert [type(module) for module in network.modules() if not list(module.children())] == [Int8Linear, nn.LayerNorm, Int8Linear]
    assert network["outer"].dtype == torch.bfloat16


def test_exact_products_pass_and_saturating_ones_are_refused(monkeypatch):
    require_exact_int8("--int8", CPU)
    with pytest.raises(ValueError, match="^int8 is for the CPU, and this runs on cuda: leave int8 out"):
        require_exact_int8("int8", torch.device("cuda"))
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b).clamp(max=2**15 - 1))
    with pytest.raises(ValueError, match="^--int8 needs exact products of 8-bit integers, and this processor saturates: leave --int8 out"):
        require_exact_int8("--int8", CPU)
