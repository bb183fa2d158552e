"""W4A4 for few rows of x: the weight's rows on the M side of the FP4 instruction, tokens on N, K split over programs.

scaled_mm works in tiles of 128 rows of x and leaves most of the machine idle when there are fewer; here a program takes
128 outputs and 16 to 64 tokens, and enough programs share K that every multiprocessor reads weights. Partial sums are
FP32 and are added in one fixed order by a second launch, so results repeat. Under the interpreter, which decodes the
scales of `tl.dot_scaled` wrongly, operands are widened to FP32 and multiplied by `tl.dot`: the same addresses, splits
and epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.kernels.blackwell.capability import READABLE, TILES, Tile
from nvfp4_runtime.kernels.blackwell.common import swizzled
from nvfp4_runtime.kernels.blackwell.scaled_mm import Operand
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.triton.common import dot, e2m1_to_float, e4m3_to_float

MAX_TOKENS = 64
FP4_INSTRUCTION = {10: "UTCOMMA", 12: "OMMA.SF"}  # in the machine code of 10.x and 12.x
WIDE_LOAD = "LDGSTS.E.BYPASS.128"  # 16 bytes to shared memory, past registers and the first cache
_PROGRAMS_PER_SM = 2  # programs wanted per multiprocessor: their loads overlap


@triton.jit
def few_tokens_kernel(
    w_ptr,
    w_scales_ptr,
    x_ptr,
    x_scales_ptr,
    sums_ptr,
    m,
    n,
    half,
    tiles_per_row,
    STEPS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Sums of code * scale over one piece of K: WEIGHT_ROWS (128) outputs of TOKENS tokens.

    half          bytes of a row, K / 2: a multiple of 16, so that 16 bytes are loaded at once
    w_ptr         uint8 [n, half]; w_scales_ptr its swizzled scales
    x_ptr         uint8 [m, half]; x_scales_ptr its swizzled scales
    sums_ptr      fp32 [pieces, m, n]
    grid          outputs, tokens, pieces of K; each piece is STEPS * BLOCK_K long
    """
    row = tl.program_id(0) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row64 = row.to(tl.int64)
    sums = tl.zeros([WEIGHT_ROWS, TOKENS], dtype=tl.float32)
    for step in range(STEPS):
        start = (tl.program_id(2) * STEPS + step) * BLOCK_K
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        block = start // 16 + tl.arange(0, BLOCK_K // 16)
        w_inside = (row < n)[:, None] & (byte < half)[None, :]
        w = tl.load(w_ptr + row64[:, None] * half + byte[None, :], mask=w_inside, other=0)
        x_inside = (byte < half)[:, None] & (token < m)[None, :]
        x = tl.load(x_ptr + token[None, :] * half + byte[:, None], mask=x_inside, other=0)
        w_scales = _scales_of_128_rows(w_scales_ptr, tl.program_id(0), start // 64, tiles_per_row, BLOCK_K)
        x_block = (token < m)[:, None] & (block < half // 8)[None, :]
        x_scales = tl.load(
            x_scales_ptr + swizzled(token[:, None], block[None, :], tiles_per_row), mask=x_block, other=0
        )
        if EMULATED:
            w_step = _spread(w_scales, WEIGHT_ROWS, BLOCK_K)
            x_step = tl.trans(_spread(x_scales, TOKENS, BLOCK_K))
            w_codes, x_codes = w.to(tl.int32), x.to(tl.int32)
            sums = dot(e2m1_to_float(w_codes & 15) * w_step, e2m1_to_float(x_codes & 15) * x_step, sums, EMULATED)
            sums = dot(e2m1_to_float(w_codes >> 4) * w_step, e2m1_to_float(x_codes >> 4) * x_step, sums, EMULATED)
        else:
            w_e4m3 = w_scales.to(tl.float8e4nv, bitcast=True)
            x_e4m3 = x_scales.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot_scaled(w, w_e4m3, "e2m1", x, x_e4m3, "e2m1", sums)
    at = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
    tl.store(sums_ptr + at, sums, mask=(row < n)[:, None] & (token < m)[None, :])


@triton.jit
def _scales_of_128_rows(scales_ptr, tile_row, first, tiles_per_row, BLOCK_K: tl.constexpr):
    """Swizzled scales of a whole row of tiles, bytes [128, BLOCK_K / 16]: read as they lie, then put in order.

    first  the tile, of 4 scales a row, to begin with; those beyond the row's last are zero
    """
    TILES: tl.constexpr = BLOCK_K // 64
    at = tl.arange(0, TILES * 512)
    tiles = tile_row.to(tl.int64) * tiles_per_row + first
    found = tl.load(scales_ptr + tiles * 512 + at, mask=first + at // 512 < tiles_per_row, other=0)
    found = tl.permute(tl.reshape(found, [TILES, 32, 4, 4]), (2, 1, 0, 3))
    return tl.reshape(found, [128, TILES * 4])


@triton.jit
def _spread(scales, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """E4M3 bytes [ROWS, BLOCK_K / 16] as float32, one per packed byte: [ROWS, BLOCK_K / 2]."""
    wide = tl.broadcast_to(e4m3_to_float(scales)[:, :, None], [ROWS, BLOCK_K // 16, 8])
    return tl.reshape(wide, [ROWS, BLOCK_K // 2])


@triton.jit
def finish_kernel(
    sums_ptr,
    multipliers_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    PIECES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, i] = sum over pieces, in order, * multipliers[i] + bias[i], rounded once to out's type."""
    token = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for piece in range(PIECES):
        total += tl.load(sums_ptr + (piece * m + token) * n + i, mask=i < n, other=0.0)
    total *= tl.load(multipliers_ptr + i, mask=i < n, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + token * n + i, total.to(out_ptr.dtype.element_ty), mask=i < n)


def pieces_of_k(n: int, k: int, tile: Tile, num_sms: int) -> tuple[int, int]:
    """(pieces, steps of each) that K is cut into, so that about two programs meet each multiprocessor.

    A function of the weight's shape and the machine alone: the order of additions is the same for every batch.
    """
    tiles, steps = triton.cdiv(n, tile.weight_rows), triton.cdiv(k, tile.block_k)
    wanted = max(1, min(steps, triton.cdiv(_PROGRAMS_PER_SM * num_sms, tiles)))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each


class FewTokens:
    """The product for up to MAX_TOKENS rows.

    weight       [N, K], its tensor_scale unused
    n            outputs; rows of `weight` beyond are padding
    multipliers  fp32 [n]: input_scale * weight_scale_2 of each output
    bias         fp32 [n] or None
    emulated     True under Triton's interpreter: an FP32 stand-in for tl.dot_scaled
    """

    def __init__(
        self,
        weight: Operand,
        n: int,
        multipliers: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        tile: Tile,
        num_sms: int,
        emulated: bool,
    ) -> None:
        self._weight, self.n, self.k = weight, n, weight.codes.shape[1] * 2
        self._multipliers, self._bias = multipliers, bias
        self._out_dtype, self._tile, self._emulated = out_dtype, tile, emulated
        self.pieces, self.steps = pieces_of_k(n, self.k, tile, num_sms)

    def __call__(self, x: Operand) -> Tensor:
        """x [M, K], 1 <= M <= MAX_TOKENS -> [M, n]."""
        m, device = x.codes.shape[0], x.codes.device
        sums = torch.empty(self.pieces, m, self.n, dtype=torch.float32, device=device)
        tokens = max(16, triton.next_power_of_2(m))
        grid = (triton.cdiv(self.n, self._tile.weight_rows), triton.cdiv(m, tokens), self.pieces)
        few_tokens_kernel[grid](
            self._weight.codes,
            self._weight.scales,
            x.codes,
            x.scales,
            sums,
            m,
            self.n,
            self.k // 2,
            triton.cdiv(self.k // 16, 4),
            STEPS=self.steps,
            WEIGHT_ROWS=self._tile.weight_rows,
            TOKENS=tokens,
            BLOCK_K=self._tile.block_k,
            EMULATED=self._emulated,
            num_warps=self._tile.num_warps,
            num_stages=self._tile.num_stages,
        )
        # the interpreter truncates when it rounds to bfloat16; there torch rounds instead
        out = torch.empty(m, self.n, dtype=torch.float32 if self._emulated else self._out_dtype, device=device)
        finish_kernel[(triton.cdiv(self.n, 1024), m)](
            sums,
            self._multipliers,
            self._multipliers if self._bias is None else self._bias,
            out,
            m,
            self.n,
            PIECES=self.pieces,
            HAS_BIAS=self._bias is not None,
            BLOCK=1024,
            num_warps=4,
        )
        return out.to(self._out_dtype)


def compilations() -> list[Compilation]:
    """What is compiled without a GPU: the product must be the FP4 instruction of each machine, not a fallback."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    signature = {"w_ptr": "*u8", "w_scales_ptr": "*u8", "x_ptr": "*u8", "x_scales_ptr": "*u8", "sums_ptr": "*fp32"}
    signature |= {"m": "i32", "n": "i32", "half": "i32", "tiles_per_row": "i32"}
    found = []
    for target, tile in TILES.items():
        if version < tile.least_triton:
            continue
        for tokens in (16, 64) if target in READABLE else (16,):
            shape = {"STEPS": 3, "WEIGHT_ROWS": tile.weight_rows, "TOKENS": tokens, "BLOCK_K": tile.block_k}
            found.append(
                Compilation(
                    name=f"few-tokens-{tokens}",
                    kernel=few_tokens_kernel,
                    signature=signature,
                    constexprs=shape | {"EMULATED": False},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    expect=("kind::mxf4nvf4",),
                    expect_on={t: (FP4_INSTRUCTION[t // 10], WIDE_LOAD) for t in READABLE},
                    targets=(target,),
                    unaligned=("m", "tiles_per_row"),
                )
            )
    finish = {"sums_ptr": "*fp32", "multipliers_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*bf16"}
    found.append(
        Compilation(
            name="finish",
            kernel=finish_kernel,
            signature=finish | {"m": "i32", "n": "i32"},
            constexprs={"PIECES": 5, "HAS_BIAS": True, "BLOCK": 1024},
            targets=READABLE,
            unaligned=("m",),
        )
    )
    return found
