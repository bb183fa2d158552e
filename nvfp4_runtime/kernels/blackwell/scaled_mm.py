"""The native product of two NVFP4 operands: torch's scaled_mm with swizzled block scales and two tensor scales.

PyTorch checks dtypes, counts, recipes and swizzles also on meta tensors, so a call is validated without a GPU. It does
not check the machine: capability.py does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4_runtime.nvfp4.layouts import swizzled_shape

ROW_STEP = 16  # N must be a multiple of it
K_STEP = 32  # and K of this one: sixteen packed bytes
TILE_ROWS = 128  # rows under one tile of swizzled scales


@dataclass(frozen=True)
class Operand:
    """One side of a product, [R, K].

    codes         uint8 [R, K/2]   E2M1, the even k in the low nibble
    scales        uint8 [R' * C']  E4M3 block scales in the 128x4 layout of nvfp4/layouts.py
    tensor_scale  fp32 []          multiplies; None on both sides: the caller multiplies the FP32 sums itself
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None

    def __post_init__(self) -> None:
        rows, half = self.codes.shape
        padded_rows, padded_cols = swizzled_shape(rows, half // 8)
        assert self.scales.numel() == padded_rows * padded_cols, (self.codes.shape, self.scales.shape)

    def rows(self, start: int, stop: int, tensor_scale: Tensor | None) -> Operand:
        """Some of the rows, under a scale of their own; `start` must begin a tile of scales."""
        assert start % TILE_ROWS == 0, start
        per_tile_row = self.scales.numel() // (swizzled_shape(self.codes.shape[0], 1)[0] // TILE_ROWS)
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        return Operand(self.codes[start:stop], self.scales[first * per_tile_row : last * per_tile_row], tensor_scale)


def multiply(x: Operand, weight: Operand, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N]: FP32 sums, times both tensor scales, + bias, one rounding.

    bias  [N] of `out_dtype`, which must then have 16 bits
    """
    assert bias is None or (out_dtype != torch.float32 and bias.dtype == out_dtype)
    recipe, swizzle = [F.ScalingType.BlockWise1x16], [F.SwizzleType.SWIZZLE_32_4_4]
    scale_x, scale_w = [_e4m3(x.scales)], [_e4m3(weight.scales)]
    if x.tensor_scale is not None and weight.tensor_scale is not None:
        recipe, swizzle = [*recipe, F.ScalingType.TensorWise], [*swizzle, F.SwizzleType.NO_SWIZZLE]
        scale_x, scale_w = [*scale_x, x.tensor_scale], [*scale_w, weight.tensor_scale]
    return F.scaled_mm(
        x.codes.view(torch.float4_e2m1fn_x2),
        weight.codes.view(torch.float4_e2m1fn_x2).t(),
        scale_a=scale_x,
        scale_recipe_a=recipe,
        scale_b=scale_w,
        scale_recipe_b=recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        bias=bias,
        output_dtype=out_dtype,
    )


def _e4m3(scales: Tensor) -> Tensor:
    return scales.view(torch.float8_e4m3fn)
