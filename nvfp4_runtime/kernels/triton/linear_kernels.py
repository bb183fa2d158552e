"""Kernels of linear layers: the GEMM over panels, the sum of its splits, and the weight written out for cuBLAS."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from nvfp4_runtime.kernels.compilation import TARGETS, Compilation
from nvfp4_runtime.kernels.triton.common import round_to
from nvfp4_runtime.kernels.triton.gemm_pieces import FOUR_BIT, FP8, accumulate, four_bit_planes, fp8_planes
from nvfp4_runtime.kernels.triton.layout import MXFP4_BASE, NVFP4_BASE


# The number of rows is never specialised on: 1 would become a constant, multiples of 16 another kernel, each compiled
# while somebody waits.
@triton.jit(do_not_specialize=["rows"])
def gemm(
    x, words, scales, row_scale, bias, out, partial, rows, outputs, k, panels, blocks, blocks_per_split,
    FORMAT: tl.constexpr, SCALE_BLOCKS: tl.constexpr, BASE: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """One tile of y = x W^T, or of one split's FP32 sums.

    x          [rows, k] bfloat16 or float32
    words, scales, panels, blocks   see layout.Panels; FP8 scales: fp32 [.., outputs] or unused
    row_scale  fp32 [outputs]; bias [outputs] or unused
    out        [rows, outputs], written where SPLITS is 1
    partial    fp32 [SPLITS, rows, outputs], written otherwise
    grid       (outputs / COLUMNS, SPLITS, rows / ROWS), rounded up
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    acc = accumulate(
        acc, words, scales, x, n, m, rows, k, outputs, panels, blocks, first, last,
        FORMAT, SCALE_BLOCKS, BASE, EVEN_K, EMULATED,
    )  # fmt: skip
    at = m[None, :].to(tl.int64) * outputs + n[:, None]
    mask = (n < outputs)[:, None] & (m < rows)[None, :]
    if SPLITS == 1:
        y = acc * tl.load(row_scale + n, mask=n < outputs, other=0.0)[:, None]
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, round_to(y, out.dtype.element_ty, EMULATED), mask=mask)
    else:
        tl.store(partial + split.to(tl.int64) * rows * outputs + at, acc, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_splits(
    partial, row_scale, bias, out, rows, outputs,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The splits' sums added in their order, times row_scale, plus bias, rounded once: deterministic, unlike atomics.

    grid  (rows, outputs / COLUMNS rounded up)
    """
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.program_id(0).to(tl.int64) * outputs + n
    mask = n < outputs
    y = tl.zeros((COLUMNS,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(partial + split * rows.to(tl.int64) * outputs + at, mask=mask, other=0.0)
    y *= tl.load(row_scale + n, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, round_to(y, out.dtype.element_ty, EMULATED), mask=mask)


@triton.jit
def write_out(
    words, scales, out, outputs, k, blocks,
    FORMAT: tl.constexpr, BASE: tl.constexpr, EVEN_K: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """A weight as the kernels multiply it (code * scale * factor; FP8: code), exact, row-major [outputs, k].

    grid  (blocks, panels)
    """
    block, panel = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 64)
    n = panel * 64 + row
    base = panel * blocks + block
    if FORMAT == FP8:
        w = tl.arange(0, 32)
        tile = tl.load(words + base.to(tl.int64) * 2048 + row[:, None] * 32 + w[None, :])
        w0, w1 = fp8_planes(tile, EMULATED)
        _store_plane(out, w0, n, block * 64 + w, outputs, k, EVEN_K, EMULATED)
        _store_plane(out, w1, n, block * 64 + 32 + w, outputs, k, EVEN_K, EMULATED)
    else:
        w = tl.arange(0, 16)
        tile = tl.load(words + base.to(tl.int64) * 1024 + row[:, None] * 16 + w[None, :])
        packed = tl.load(scales + base * 64 + row)
        even = ((packed & 0x00FF00FF) << 4) + (BASE * 0x10001)
        odd = (((packed >> 8) & 0x00FF00FF) << 4) + (BASE * 0x10001)
        s0 = even.to(tl.int16)[:, None].broadcast_to(tile.shape)
        s1 = odd.to(tl.int16)[:, None].broadcast_to(tile.shape)
        s2 = (even >> 16).to(tl.int16)[:, None].broadcast_to(tile.shape)
        s3 = (odd >> 16).to(tl.int16)[:, None].broadcast_to(tile.shape)
        w0, w1, w2, w3 = four_bit_planes(tile, s0, s1, s2, s3, EMULATED)
        _store_plane(out, w0, n, block * 64 + w, outputs, k, EVEN_K, EMULATED)
        _store_plane(out, w1, n, block * 64 + 16 + w, outputs, k, EVEN_K, EMULATED)
        _store_plane(out, w2, n, block * 64 + 32 + w, outputs, k, EVEN_K, EMULATED)
        _store_plane(out, w3, n, block * 64 + 48 + w, outputs, k, EVEN_K, EMULATED)


@triton.jit
def _store_plane(out, values, n, inputs, outputs, k, EVEN_K: tl.constexpr, EMULATED: tl.constexpr):
    mask = (n < outputs)[:, None]
    if not EVEN_K:
        mask = mask & (inputs < k)[None, :]
    rounded = round_to(values.to(tl.float32), out.dtype.element_ty, EMULATED)  # exact: it fits
    tl.store(out + n[:, None].to(tl.int64) * k + inputs[None, :], rounded, mask=mask)


_POINTERS = {"words": "*i16", "row_scale": "*fp32", "bias": "*fp32", "partial": "*fp32"}
_SIZES = dict.fromkeys(("rows", "outputs", "k", "panels", "blocks", "blocks_per_split"), "i32")
_ODD = ("rows", "outputs", "panels", "blocks", "blocks_per_split")
_SOME = (80, 90, 120)


def _gemm(
    name: str, rows: int, columns: int, splits: int, targets: tuple[int, ...] = TARGETS, **more: object
) -> Compilation:
    """`gemm` as linear.py launches it for bfloat16; `more` overrides constexprs."""
    constexprs = {
        "FORMAT": FOUR_BIT.value, "SCALE_BLOCKS": 0, "BASE": NVFP4_BASE, "SPLITS": splits, "HAS_BIAS": False,
        "EVEN_K": True, "COLUMNS": columns, "ROWS": rows, "EMULATED": False,
    } | more  # fmt: skip
    scales = {"scales": "*fp32" if more.get("FORMAT") == FP8.value else "*i32"}
    narrow = rows < 64
    return Compilation(
        name,
        gemm,
        {"x": "*bf16", "out": "*bf16", **scales, **_POINTERS, **_SIZES},
        constexprs,
        num_warps=2 if narrow else 4,
        num_stages=3,
        # words come sixteen bytes a lane, become pairs of bfloat16 by one mask and one multiplication, and meet x in
        # the tensor core without passing through shared memory again
        expect=("LDGSTS.E.BYPASS", "0x10", "fma.rn.bf16x2", "mma.sync" if narrow else "mma"),
        expect_on={90: () if narrow else ("wgmma",)},
        forbid=("tf32",),
        unaligned=_ODD,
        targets=targets,
    )


def compilations() -> list[Compilation]:
    """What linear.py launches, at the tiles of tuning.py."""
    return [
        _gemm("nvfp4-16", 16, 64, 8),
        _gemm("nvfp4-64", 64, 128, 1, (80, 90, 100, 120), HAS_BIAS=True),
        _gemm("mxfp4-32-odd-k", 32, 64, 1, _SOME, BASE=MXFP4_BASE, EVEN_K=False),
        _gemm("fp8-16-blocks", 16, 64, 1, _SOME, FORMAT=FP8.value, SCALE_BLOCKS=2),
        _gemm("fp8-64", 64, 128, 1, (90,), FORMAT=FP8.value),
        replace(
            _gemm("float32", 16, 64, 1, (90,)),
            signature={"x": "*fp32", "out": "*fp32", "scales": "*i32", **_POINTERS, **_SIZES},
            num_warps=4,
            num_stages=2,
            expect=("FFMA",),
            forbid=("mma", "tf32"),
        ),
        Compilation(
            "add_splits",
            add_splits,
            {"out": "*bf16", "rows": "i32", "outputs": "i32"}
            | {name: _POINTERS[name] for name in ("partial", "row_scale", "bias")},
            {"SPLITS": 8, "HAS_BIAS": True, "COLUMNS": 512, "EMULATED": False},
            unaligned=("rows", "outputs"),
            targets=_SOME,
        ),
        Compilation(
            "write_out",
            write_out,
            {"words": "*i16", "scales": "*i32", "out": "*bf16", "outputs": "i32", "k": "i32", "blocks": "i32"},
            {"FORMAT": FOUR_BIT.value, "BASE": NVFP4_BASE, "EVEN_K": True, "EMULATED": False},
            expect=("fma.rn.bf16x2",),
            unaligned=("outputs", "blocks"),
            targets=_SOME,
        ),
    ]
