"""GPTQ: without correlations it is rounding, with them the outputs err less; awkward Hessians are survived."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.nvfp4 import block_scales, codec
from nvfp4_runtime.quantize.gptq import gptq, inverse_factor, output_error

G = torch.Generator().manual_seed(0)
W = torch.randn(48, 160, generator=G)  # 160: more than one lazy block, and not a multiple of one
MIX = torch.randn(160, 160, generator=G) * 0.1 + torch.eye(160)
X = torch.randn(2000, 160, generator=G) @ MIX
SCALE_2 = codec.weight_scale_2(W.abs().max())


def mse_scales(block: Tensor, first: int) -> Tensor:
    return block_scales.quantize(block, SCALE_2, "mse")[1]


def test_with_uncorrelated_inputs_it_is_the_search_and_rounding_to_the_nearest():
    packed, scales = gptq(W, inverse_factor(torch.eye(160) * 3), SCALE_2, mse_scales)
    wanted = block_scales.quantize(W, SCALE_2, "mse")
    assert torch.equal(packed, wanted[0])
    assert torch.equal(scales.view(torch.uint8), wanted[1].view(torch.uint8))


def test_with_correlated_inputs_the_outputs_err_much_less():
    hessian = X.t() @ X
    rounded = codec.dequantize(*block_scales.quantize(W, SCALE_2, "mse"), SCALE_2)
    compensated = codec.dequantize(*gptq(W, inverse_factor(hessian), SCALE_2, mse_scales), SCALE_2)
    assert output_error(W, compensated, hessian) < 0.6 * output_error(W, rounded, hessian)
    # what output_error claims to be
    direct = (X @ (compensated - W).t()).square().sum()
    assert output_error(W, compensated, hessian) == pytest.approx(float(direct), rel=1e-3)


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = X.t() @ X
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(160)
    torch.testing.assert_close(upper.double().t() @ upper.double() @ damped, torch.eye(160).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_too_few_tokens_and_dead_inputs_are_survived(rows):
    x = X[:rows].clone()
    x[:, 7] = 0
    hessian = x.t() @ x
    packed, scales = gptq(W, inverse_factor(hessian), SCALE_2, mse_scales)
    compensated = codec.dequantize(packed, scales, SCALE_2)
    assert bool(torch.isfinite(compensated).all())
    assert float((compensated[:, 7] - W[:, 7]).abs().max()) < 1.0  # still rounded, not dropped


def test_a_weight_of_zeros_stays_zero():
    zero = torch.zeros(4, 32)
    choose = lambda block, first: codec.quantize(block, torch.tensor(0.0))[1]  # noqa: E731
    packed, scales = gptq(zero, inverse_factor(torch.eye(32)), torch.tensor(0.0), choose)
    assert not bool(codec.dequantize(packed, scales, torch.tensor(0.0)).any())
