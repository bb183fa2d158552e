"""Activations to NVFP4 in one launch: block scales, codes, and the scales' swizzle, padding included.

Bit for bit codec.quantize_activation, on a GPU too: divisions are correctly rounded, of which there is one in sixteen
values. The CUDA quantisers of other servers take rcp.approx.ftz instead, which may move codes on exact ties, about 1e-4
of them. Codes come from the FP4 conversion; under the interpreter, which has none, from comparisons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.kernels.blackwell.capability import CAPABILITIES, READABLE
from nvfp4_runtime.kernels.blackwell.common import pack_e2m1_pairs, swizzled
from nvfp4_runtime.kernels.blackwell.scaled_mm import Operand
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.triton.common import e4m3_to_float, float_to_e2m1, float_to_e4m3
from nvfp4_runtime.nvfp4.layouts import swizzled_shape

SIXTH: tl.constexpr = tl.constexpr(0.16666667163372040)  # 1/6 in float32
BLOCK_K = 256


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    m,
    k,
    k_padded,
    tiles_per_row,
    global_scale,
    inverse_global_scale,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One tile of ROWS x BLOCK_K values.

    x_ptr       [m, k] contiguous, any float type
    codes_ptr   uint8 [m, k_padded / 2]
    scales_ptr  uint8, the 128x4 layout of [m, k_padded / 16]; padding is written as zero
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row64 = row.to(tl.int64)
    inside = (row < m)[:, None] & (col < k)[None, :]
    x = tl.load(x_ptr + row64[:, None] * k + col[None, :], mask=inside, other=0.0).to(tl.float32)
    blocks = tl.reshape(x, [ROWS, BLOCK_K // 16, 16])
    # the largest magnitude as an integer: NaN lies beyond infinity and so survives the maximum
    magnitude = blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitude, axis=2).to(tl.float32, bitcast=True)  # [ROWS, BLOCK_K / 16]
    scale_bits = float_to_e4m3(global_scale * (amax * SIXTH))
    scale = e4m3_to_float(scale_bits)
    product = tl.where(scale == 0.0, 1.0, scale * inverse_global_scale)
    step = tl.div_rn(tl.full([ROWS, BLOCK_K // 16], 1.0, tl.float32), product)
    step = tl.where(scale == 0.0, 0.0, step)
    y = tl.reshape(blocks * step[:, :, None], [ROWS, BLOCK_K // 2, 2])
    even, odd = tl.split(y)
    if EMULATED:
        packed = (float_to_e2m1(even) | (float_to_e2m1(odd) << 4)).to(tl.uint8)
    else:
        packed = pack_e2m1_pairs(even, odd)
    byte = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    codes_at = codes_ptr + row64[:, None] * (k_padded // 2) + byte[None, :]
    tl.store(codes_at, packed, mask=(row < m)[:, None] & (byte < k_padded // 2)[None, :])
    block = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    at = swizzled(row64[:, None], block[None, :], tiles_per_row)
    scale_bits = tl.where((row < m)[:, None], scale_bits, 0)
    tl.store(scales_ptr + at, scale_bits.to(tl.uint8), mask=(block < tiles_per_row * 4)[None, :])


class ActivationQuantizer:
    """Quantises rows under one static input_scale.

    k         values of a row
    k_padded  values of a row of the result, zeros beyond k; a multiple of 32
    emulated  True without the FP4 conversion: under Triton's interpreter, and on other GPUs
    """

    def __init__(self, input_scale: float, k: int, k_padded: int, emulated: bool) -> None:
        self.k, self.k_padded, self._emulated = k, k_padded, emulated
        scale = torch.tensor(input_scale, dtype=torch.float32)
        # Python floats hold float32 exactly, and a kernel takes them as float32
        self._global_scale = float(1.0 / scale)
        self._inverse = float(1.0 / (1.0 / scale))

    def __call__(self, x: Tensor, tensor_scale: Tensor | None) -> Operand:
        """x [M, K] contiguous, M >= 1 -> its operand under `tensor_scale`, the input_scale on x's device or None."""
        m = x.shape[0]
        padded_rows, padded_cols = swizzled_shape(m, self.k_padded // 16)
        codes = torch.empty(m, self.k_padded // 2, dtype=torch.uint8, device=x.device)
        scales = torch.empty(padded_rows * padded_cols, dtype=torch.uint8, device=x.device)
        rows = 4 if m <= 64 else 16  # few rows: more programs, so that one row still spreads over the machine
        grid = (padded_rows // rows, triton.cdiv(padded_cols * 16, BLOCK_K))
        quantize_kernel[grid](
            x,
            codes,
            scales,
            m,
            self.k,
            self.k_padded,
            padded_cols // 4,
            self._global_scale,
            self._inverse,
            ROWS=rows,
            BLOCK_K=BLOCK_K,
            EMULATED=self._emulated,
            num_warps=4,
        )
        return Operand(codes, scales, tensor_scale)


def compilations() -> list[Compilation]:
    """What is compiled without a GPU: the conversion to E2M1 must be the instruction."""
    signature = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scales_ptr": "*u8", "m": "i32", "k": "i32", "k_padded": "i32"}
    signature |= {"tiles_per_row": "i32", "global_scale": "fp32", "inverse_global_scale": "fp32"}
    return [
        Compilation(
            name=f"quantize-{rows}",
            kernel=quantize_kernel,
            signature=signature,
            constexprs={"ROWS": rows, "BLOCK_K": BLOCK_K, "EMULATED": False},
            expect=("cvt.rn.satfinite.e2m1x2.f32",),
            expect_on=dict.fromkeys(READABLE, ("F2FP.SATFINITE.E2M1",)),
            targets=targets,
            unaligned=("m", "tiles_per_row"),
        )
        for rows, targets in ((4, READABLE), (16, tuple(sorted(CAPABILITIES))))
    ]
