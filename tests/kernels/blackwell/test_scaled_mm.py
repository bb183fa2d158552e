"""The call of torch's scaled_mm, checked by PyTorch itself on meta tensors, and the bytes it is given."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.kernels.blackwell.scaled_mm import Operand, multiply
from nvfp4_runtime.nvfp4.layouts import swizzle_scales, swizzled_shape


def operand(rows: int, k: int, device: str = "meta", scaled: bool = True) -> Operand:
    padded_rows, padded_cols = swizzled_shape(rows, k // 16)
    return Operand(
        torch.empty(rows, k // 2, dtype=torch.uint8, device=device),
        torch.empty(padded_rows * padded_cols, dtype=torch.uint8, device=device),
        torch.empty((), device=device) if scaled else None,
    )


@pytest.mark.parametrize("m", [1, 2, 31, 127, 128, 1023])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("scaled", [True, False])
def test_pytorch_accepts_the_call(m, n, k, scaled):
    y = multiply(operand(m, k, scaled=scaled), operand(n, k, scaled=scaled), torch.bfloat16)
    assert (tuple(y.shape), y.dtype) == ((m, n), torch.bfloat16)


def test_results_may_be_float32_and_a_bias_rides_along_in_bfloat16():
    x, w = operand(5, 64), operand(32, 64)
    assert multiply(x, w, torch.float32).dtype == torch.float32
    bias = torch.empty(32, dtype=torch.bfloat16, device="meta")
    assert multiply(x, w, torch.bfloat16, bias).shape == (5, 32)
    with pytest.raises(AssertionError):
        multiply(x, w, torch.float32, bias.float())


@pytest.mark.parametrize(("n", "k"), [(100, 64), (32, 48), (32, 16)])
def test_pytorch_refuses_what_linear_pads(n, k):
    with pytest.raises((ValueError, RuntimeError)):
        multiply(operand(4, k), operand(n, k), torch.bfloat16)


def test_scales_that_were_not_padded_are_refused_before_pytorch_sees_them():
    with pytest.raises(AssertionError):
        Operand(torch.empty(4, 32, dtype=torch.uint8), torch.empty(4 * 4, dtype=torch.uint8), None)


@pytest.mark.parametrize(("start", "stop"), [(0, 128), (128, 384), (256, 300), (128, 300)])
@pytest.mark.parametrize("cols", [2, 6, 8])
def test_rows_of_an_operand_are_the_operand_of_the_rows(start, stop, cols):
    g = torch.Generator().manual_seed(cols)
    codes = torch.randint(0, 256, (300, cols * 8), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (300, cols), generator=g, dtype=torch.uint8)
    part = Operand(codes, swizzle_scales(scales), None).rows(start, stop, None)
    assert torch.equal(part.codes, codes[start:stop])
    if stop % 128 == 0 or stop == 300:  # else the tile also holds the next rows' scales, which nobody reads
        assert torch.equal(part.scales, swizzle_scales(scales[start:stop]))
