"""Rows of activations as NVFP4: what the fused quantisers store, and how a kernel stores it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvfp4_runtime.kernels.ops import QuantizedRows as QuantizedRows
from nvfp4_runtime.kernels.triton.numbers import quantize_blocks
from nvfp4_runtime.nvfp4.codec import BLOCK, check_k
from nvfp4_runtime.nvfp4.layouts import swizzled_shape


def allocate_rows(rows: int, k: int, swizzled: bool, device: torch.device) -> QuantizedRows:
    """Memory for `rows` quantised rows; nothing in it is set."""
    check_k(k)
    packed = torch.empty((rows, k // 2), dtype=torch.uint8, device=device)
    padded_rows, padded_cols = swizzled_shape(rows, k // BLOCK)
    shape = (padded_rows * padded_cols,) if swizzled else (rows, k // BLOCK)
    return QuantizedRows(packed, torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), swizzled)


@triton.jit
def _store_swizzled(scales, values, row, col, K: tl.constexpr):
    """Bytes of columns `col` of a row to their places; layouts.swizzled_offset."""
    PADDED: tl.constexpr = (K // 16 + 3) // 4
    tile = (row // 128) * PADDED + col // 4
    offset = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4
    tl.store(scales + offset, values, mask=col < PADDED * 4)


@triton.jit
def zero_padding(scales, row, start, K: tl.constexpr, WIDTH: tl.constexpr):
    """The swizzled scales of a row that only pads."""
    col = start // 16 + tl.arange(0, WIDTH // 16)
    _store_swizzled(scales, tl.zeros([WIDTH // 16], tl.uint8), row, col, K)


@triton.jit
def store_quantized(
    y,
    packed,
    scales,
    input_scale,
    row,
    start,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Quantise y, float32 [WIDTH], columns `start` .. of row `row`, and store codes and scales.

    packed, scales  bytes; see QuantizedRows. Columns beyond K must be 0 in y.
    start           a multiple of 64, so that a program's columns fill whole groups of four scales
    """
    codes, stored = quantize_blocks(tl.reshape(y, (WIDTH // 16, 16)), tl.load(input_scale))
    low, high = tl.split(tl.reshape(codes, (WIDTH // 2, 2)))
    at = start // 2 + tl.arange(0, WIDTH // 2)
    tl.store(packed + row * (K // 2) + at, (low | (high << 4)).to(tl.uint8), mask=at < K // 2)
    col = start // 16 + tl.arange(0, WIDTH // 16)
    if SWIZZLED:
        _store_swizzled(scales, tl.where(col < K // 16, stored, 0).to(tl.uint8), row, col, K)
    else:
        tl.store(scales + row * (K // 16) + col, stored, mask=col < K // 16)
