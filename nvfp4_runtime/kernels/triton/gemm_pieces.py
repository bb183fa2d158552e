"""The inner loops of the weight kernels: a tile of W from panels, decoded in registers, times a tile of x.

The weight stands on the left of the tensor core's product (rows of the result are outputs, columns are tokens): there a
few tokens waste little, and Hopper takes the left operand from registers. See layout.py for words and scale bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4_runtime.kernels.triton.common import dot, e4m3_to_float

# Two words in, per plane two bfloat16 out: one mask, one multiplication by the scale (a fused one with -0 added, which
# sm_80 has and which keeps subnormals: a code's bits are value * 2^-126).
_DECODE_FOUR_BIT = """{
.reg .b32 t, u, z;
mov.b32 z, 0x80008000;
and.b32 t, $4, 0x81C081C0;
fma.rn.bf16x2 $0, t, $5, z;
shl.b32 t, $4, 3;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $1, t, $6, z;
shl.b32 t, $4, 6;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $2, t, $7, z;
shl.b32 t, $4, 1;
and.b32 t, t, 0x80008000;
shr.b32 u, $4, 5;
and.b32 u, u, 0x01000100;
or.b32 t, t, u;
shr.b32 u, $4, 4;
and.b32 u, u, 0x00C000C0;
or.b32 t, t, u;
fma.rn.bf16x2 $3, t, $8, z;
}"""

# Two words of two E4M3 codes: exponent and mantissa moved to bfloat16's place are the value times 2^-120.
_DECODE_FP8 = """{
.reg .b32 t, u, z, s;
mov.b32 z, 0x80008000;
mov.b32 s, 0x7B807B80;
shl.b32 t, $2, 8;
and.b32 t, t, 0x80008000;
shl.b32 u, $2, 4;
and.b32 u, u, 0x07F007F0;
or.b32 t, t, u;
fma.rn.bf16x2 $0, t, s, z;
and.b32 t, $2, 0x80008000;
shr.b32 u, $2, 4;
and.b32 u, u, 0x07F007F0;
or.b32 t, t, u;
fma.rn.bf16x2 $1, t, s, z;
}"""

FOUR_BIT: tl.constexpr = tl.constexpr(0)  # values of FORMAT
FP8: tl.constexpr = tl.constexpr(1)
DENSE: tl.constexpr = tl.constexpr(2)
DECODE_FOUR_BIT: tl.constexpr = tl.constexpr(_DECODE_FOUR_BIT)
DECODE_FP8: tl.constexpr = tl.constexpr(_DECODE_FP8)


@triton.jit
def bits_to_float(bits):
    """int32 whose low half is a bfloat16, as float32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def four_bit_planes(words, s0, s1, s2, s3, EMULATED: tl.constexpr):
    """int16 words and, per plane, int16 bits of bfloat16 scales: four tiles code * scale * factor, exact."""
    if EMULATED:
        h = words.to(tl.int32)
        last = ((h << 1) & 0x8000) | ((h >> 5) & 0x0100) | ((h >> 4) & 0x00C0)
        w0 = bits_to_float(h & 0x81C0) * bits_to_float(s0.to(tl.int32))
        w1 = bits_to_float((h << 3) & 0x81C0) * bits_to_float(s1.to(tl.int32))
        w2 = bits_to_float((h << 6) & 0x81C0) * bits_to_float(s2.to(tl.int32))
        w3 = bits_to_float(last) * bits_to_float(s3.to(tl.int32))
        return w0, w1, w2, w3
    else:
        return tl.inline_asm_elementwise(
            DECODE_FOUR_BIT,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def fp8_planes(words, EMULATED: tl.constexpr):
    """int16 words of two E4M3 codes: two tiles of values, exact."""
    if EMULATED:
        h = words.to(tl.int32)
        return e4m3_to_float(h & 0xFF), e4m3_to_float((h >> 8) & 0xFF)
    else:
        return tl.inline_asm_elementwise(
            DECODE_FP8,
            "=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_tokens(x, m, inputs, rows, k, EVEN_K: tl.constexpr):
    """x[m, inputs] as a tile [inputs, m]: zero beyond the last row and the last input. x is the first row's pointer."""
    mask = (m < rows)[None, :]
    if not EVEN_K:
        mask = mask & (inputs < k)[:, None]
    return tl.load(x + m[None, :].to(tl.int64) * k + inputs[:, None], mask=mask, other=0.0)


@triton.jit
def accumulate_four_bit(
    acc, words, scales, x, n, m, rows, k, panels, blocks, first, last,
    BASE: tl.constexpr, EVEN_K: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc [outputs n, tokens m] plus the products of blocks first .. last - 1."""
    w = tl.arange(0, 16)
    panel = tl.minimum(n // 64, panels - 1) * blocks  # rows beyond the last panel are never stored
    row = n % 64
    word_at = words + (panel * 1024 + row * 16)[:, None] + w[None, :]
    scale_at = scales + panel * 64 + row
    # two blocks a turn halve the barriers; 64 tokens need the registers
    UNROLL: tl.constexpr = 2 if acc.shape[1] < 64 else 1
    for block in tl.range(first, last, loop_unroll_factor=UNROLL):
        tile = tl.load(word_at + block * 1024)
        packed = tl.load(scale_at + block * 64)
        even = ((packed & 0x00FF00FF) << 4) + (BASE * 0x10001)  # scales 0 and 2 as two bfloat16
        odd = (((packed >> 8) & 0x00FF00FF) << 4) + (BASE * 0x10001)
        s0 = even.to(tl.int16)[:, None].broadcast_to(tile.shape)
        s1 = odd.to(tl.int16)[:, None].broadcast_to(tile.shape)
        s2 = (even >> 16).to(tl.int16)[:, None].broadcast_to(tile.shape)
        s3 = (odd >> 16).to(tl.int16)[:, None].broadcast_to(tile.shape)
        w0, w1, w2, w3 = four_bit_planes(tile, s0, s1, s2, s3, EMULATED)
        inputs = block * 64 + w
        x0 = load_tokens(x, m, inputs, rows, k, EVEN_K)
        x1 = load_tokens(x, m, inputs + 16, rows, k, EVEN_K)
        x2 = load_tokens(x, m, inputs + 32, rows, k, EVEN_K)
        x3 = load_tokens(x, m, inputs + 48, rows, k, EVEN_K)
        acc = dot(w0.to(x0.dtype), x0, acc, EMULATED)
        acc = dot(w1.to(x0.dtype), x1, acc, EMULATED)
        acc = dot(w2.to(x0.dtype), x2, acc, EMULATED)
        acc = dot(w3.to(x0.dtype), x3, acc, EMULATED)
    return acc


@triton.jit
def accumulate_fp8(
    acc, words, scales, x, n, m, rows, k, outputs, panels, blocks, first, last,
    SCALE_BLOCKS: tl.constexpr, EVEN_K: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The same for FP8. SCALE_BLOCKS blocks share a scale [.., outputs] of their sum; 0: no scales along K."""
    w = tl.arange(0, 32)
    panel = tl.minimum(n // 64, panels - 1) * blocks
    word_at = words + (panel * 2048 + (n % 64) * 32)[:, None] + w[None, :]
    for block in range(first, last):
        tile = tl.load(word_at + block * 2048)
        low, high = fp8_planes(tile, EMULATED)
        inputs = block * 64 + w
        x0 = load_tokens(x, m, inputs, rows, k, EVEN_K)
        x1 = load_tokens(x, m, inputs + 32, rows, k, EVEN_K)
        if SCALE_BLOCKS == 0:
            acc = dot(low.to(x0.dtype), x0, acc, EMULATED)
            acc = dot(high.to(x0.dtype), x1, acc, EMULATED)
        else:
            scale = tl.load(scales + (block // SCALE_BLOCKS) * outputs + n, mask=n < outputs, other=0.0)
            part = dot(low.to(x0.dtype), x0, tl.zeros_like(acc), EMULATED)
            part = dot(high.to(x0.dtype), x1, part, EMULATED)
            acc += part * scale[:, None]
    return acc


@triton.jit
def accumulate_dense(acc, weight, x, n, m, rows, k, outputs, first, last, EVEN_K: tl.constexpr, EMULATED: tl.constexpr):
    """The same for a plain weight [outputs, k], in blocks of 64 inputs; a float32 side makes float32 of both."""
    w = tl.arange(0, 64)
    for block in range(first, last):
        inputs = block * 64 + w
        mask = (n < outputs)[:, None]
        if not EVEN_K:
            mask = mask & (inputs < k)[None, :]
        tile = tl.load(weight + n[:, None].to(tl.int64) * k + inputs[None, :], mask=mask, other=0.0)
        tokens = load_tokens(x, m, inputs, rows, k, EVEN_K)
        if tile.dtype != tokens.dtype:
            acc = dot(tile.to(tl.float32), tokens.to(tl.float32), acc, EMULATED)
        else:
            acc = dot(tile, tokens, acc, EMULATED)
    return acc


@triton.jit
def accumulate(
    acc, words, scales, x, n, m, rows, k, outputs, panels, blocks, first, last,
    FORMAT: tl.constexpr, SCALE_BLOCKS: tl.constexpr, BASE: tl.constexpr, EVEN_K: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Whatever the weight's format is: acc [outputs n, tokens m] plus blocks first .. last - 1."""
    if FORMAT == FOUR_BIT:
        acc = accumulate_four_bit(
            acc, words, scales, x, n, m, rows, k, panels, blocks, first, last, BASE, EVEN_K, EMULATED
        )
    elif FORMAT == FP8:
        acc = accumulate_fp8(
            acc, words, scales, x, n, m, rows, k, outputs, panels, blocks, first, last,
            SCALE_BLOCKS, EVEN_K, EMULATED,
        )  # fmt: skip
    else:
        acc = accumulate_dense(acc, words, x, n, m, rows, k, outputs, first, last, EVEN_K, EMULATED)
    return acc
