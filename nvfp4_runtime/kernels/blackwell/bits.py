"""E2M1 and E4M3 by integer arithmetic, inside Triton kernels: what runs under the interpreter, whose FP8 casts are wrong.

Bit for bit as nvfp4/codec.py. On a Blackwell GPU the conversions to E2M1 and the reciprocals are single instructions
instead (`e2m1_pairs_native`, `reciprocal_native`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_bits(x):  # type: ignore[no-untyped-def]
    """Non-negative float32 to the E4M3 byte: nearest, ties to even, saturating at 448, NaN stays NaN."""
    clamped = tl.where(x > 448.0, 448.0, x)  # NaN compares false and passes
    bits = clamped.to(tl.int32, bitcast=True)
    # 23 - 3 mantissa bits go; the exponent's bias falls from 127 to 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # beside 2^14 a float32 has steps of 2^-9, E4M3's smallest value: the addition rounds
    subnormal = (clamped + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    found = tl.where(clamped < 0.015625, subnormal, normal)
    return tl.where(bits > 0x7F800000, 0x7F, found).to(tl.uint8)


@triton.jit
def e4m3_value(byte):  # type: ignore[no-untyped-def]
    """A non-negative E4M3 byte as float32; 0x7F is NaN."""
    b = byte.to(tl.int32) & 0x7F
    normal = (((b >> 3) + 120) << 23 | (b & 7) << 20).to(tl.float32, bitcast=True)
    subnormal = b.to(tl.float32) * 0.001953125
    value = tl.where(b < 8, subnormal, normal)
    return tl.where(b == 0x7F, float("nan"), value)


@triton.jit
def e2m1_code(y):  # type: ignore[no-untyped-def]
    """Float32 to the code 0..15 (int32): nearest, ties to even, saturating at 6, sign of zero kept; NaN becomes 6."""
    bits = y.to(tl.int32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # ties go to the even code: down at 0.25, 1.25, 2.5 and 5, up at 0.75, 1.75 and 3.5; NaN is beyond every one
    code = (~(a <= 0.25)).to(tl.int32) + (~(a < 0.75)).to(tl.int32) + (~(a <= 1.25)).to(tl.int32)
    code += (~(a < 1.75)).to(tl.int32) + (~(a <= 2.5)).to(tl.int32) + (~(a < 3.5)).to(tl.int32)
    code += (~(a <= 5.0)).to(tl.int32)
    return code | ((bits >> 28) & 8)


@triton.jit
def e2m1_value(code):  # type: ignore[no-untyped-def]
    """A code 0..15 as float32: an E2M1 number is a float32 whose exponent and mantissa were cut short."""
    c = code.to(tl.int32)
    magnitude = c & 7
    normal = (((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where((c & 8) != 0, -value, value)


@triton.jit
def e2m1_pairs_native(even, odd):  # type: ignore[no-untyped-def]
    """Pairs of float32 to bytes of two codes, `even` in the low nibble. Compute capability 10.x and 12.x ('a' targets)."""
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
def reciprocal_native(x):  # type: ignore[no-untyped-def]
    """1 / x within one unit in the last place, subnormals flushed: the instruction the CUDA quantisers use."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def swizzled(row, col, tiles_per_row):  # type: ignore[no-untyped-def]
    """Where scale (row, col) lies in the 128x4 layout; see layouts.swizzled_offset. tiles_per_row = ceil(cols / 4)."""
    tile = (row // 128) * tiles_per_row + col // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4
