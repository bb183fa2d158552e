"""Pieces of the Blackwell kernels: the FP4 conversion, and the swizzle's arithmetic.

What has no instruction, or runs under the interpreter, is in kernels/triton/common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_e2m1_pairs(even, odd):
    """Pairs of float32 to bytes of two codes, `even` in the low nibble; on 10.x and 12.x ('a' targets) only."""
    # the instruction puts its second source into the low nibble
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 b0, b1, b2, b3;
        cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
        mov.b32 $0, {b0, b1, b2, b3};
        }""",
        "=r,f,f,f,f,f,f,f,f",
        [even, odd],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def swizzled(row, col, tiles_per_row):
    """Where scale (row, col) lies in the 128x4 layout; see layouts.swizzled_offset. tiles_per_row = ceil(cols / 4)."""
    tile = (row // 128) * tiles_per_row + col // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4
