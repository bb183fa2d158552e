"""W4A4's activations: rounded to NVFP4 with a fixed tensor scale, bit for bit as codec.quantize_activation defines.

Every division is correctly rounded (`div_rn`), as the definition wants it. On GPUs of compute capability 10 and 12 the
codes come from the conversion instruction, elsewhere from seven comparisons; both round to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.kernels.compilation import TARGETS, Compilation
from nvfp4_runtime.kernels.triton.common import (
    e2m1_to_float,
    e4m3_to_float,
    emulated,
    float_to_bfloat16,
    float_to_e2m1,
    float_to_e4m3,
)
from nvfp4_runtime.nvfp4 import codec

CONVERTING = frozenset({100, 103, 120, 121})  # targets that have cvt.rn.satfinite.e2m1x2.f32
_GROUPS = 32  # blocks of 16 values per program

# Two values to a byte, the first in the low nibble: the instruction puts its second source there.
_CONVERT = """{
.reg .b8 b;
.reg .b32 t;
cvt.rn.satfinite.e2m1x2.f32 b, $2, $1;
cvt.u32.u8 t, b;
and.b32 $0, t, 15;
}"""
CONVERT: tl.constexpr = tl.constexpr(_CONVERT)
_SIXTH: tl.constexpr = tl.constexpr(0.16666667163372040)  # 1 / 6 in float32


@triton.jit
def quantize_blocks(x, scale, inverse_scale, CONVERT_E2M1: tl.constexpr):
    """float32 [G, 16] under a tensor scale: codes int32 [G, 16] and block scale bytes uint8 [G].

    scale, inverse_scale   1 / input_scale and its own reciprocal, both correctly rounded
    """
    magnitude = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    # a maximum of integers keeps NaN, which is larger than infinity there, on the GPU and in the interpreter alike
    amax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    byte = float_to_e4m3(scale * (amax * _SIXTH))
    block = e4m3_to_float(byte)
    step = tl.where(block == 0, 0.0, tl.div_rn(tl.full(block.shape, 1.0, tl.float32), block * inverse_scale))
    y = x * step[:, None]
    if CONVERT_E2M1:
        codes = tl.inline_asm_elementwise(
            CONVERT, "=r,f,f", [y, tl.zeros_like(y)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        codes = float_to_e2m1(y)
    return codes, byte


@triton.jit(do_not_specialize=["groups"])
def quantize(
    x, operand, codes, scales, scale, inverse_scale, offsets, groups, groups_of_row, experts,
    OPERAND: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, CONVERT_E2M1: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """`groups` runs of 16 values, contiguous.

    x        [groups * 16] bfloat16 or float32
    operand  [groups * 16] of x's type: code * block scale, exact; written if OPERAND
    codes    uint8 [groups * 8], packed, and scales uint8 [groups], E4M3 bytes; written otherwise
    scale, inverse_scale   numbers; fp32 [experts] where EXPERTS > 0, and `offsets` tell whose rows are whose
    grid     (groups / GROUPS rounded up,); with experts (rows, groups_of_row / GROUPS rounded up)
    """
    if EXPERTS == 0:
        g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        mask = g < groups
    else:  # one row a program: its expert is one number
        row = tl.program_id(0)
        column = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        g = row.to(tl.int64) * groups_of_row + column
        mask = column < groups_of_row
        e = tl.arange(0, EXPERTS)
        ends = tl.load(offsets + 1 + e, mask=e < experts, other=0x7FFFFFFF)
        expert = tl.minimum(tl.sum((ends <= row).to(tl.int32), 0), experts - 1)
        scale = tl.load(scale + expert)
        inverse_scale = tl.load(inverse_scale + expert)
    i = tl.arange(0, 16)
    values = tl.load(x + g[:, None] * 16 + i[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    found, byte = quantize_blocks(values, scale, inverse_scale, CONVERT_E2M1)
    if OPERAND:
        exact = e2m1_to_float(found) * e4m3_to_float(byte)[:, None]
        if operand.dtype.element_ty == tl.bfloat16:
            exact = float_to_bfloat16(exact, EMULATED)
        tl.store(operand + g[:, None] * 16 + i[None, :], exact, mask=mask[:, None])
    else:
        pairs = tl.reshape(found, (GROUPS, 8, 2))
        low, high = tl.split(pairs)
        at = codes + g[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(at, (low | (high << 4)).to(tl.uint8), mask=mask[:, None])
        tl.store(scales + g, byte, mask=mask)


class ActivationQuantizer:
    """One layer's input quantisation. `k` must be a multiple of 16: NVFP4ShapeError otherwise."""

    def __init__(self, input_scale: float, k: int, device: torch.device) -> None:
        codec.check_k(k)
        self.k = k
        scale = 1.0 / torch.tensor(input_scale, dtype=torch.float32)
        self._scale, self._inverse = float(scale), float(1.0 / scale)
        self._convert = converts(device)

    def operand(self, x: Tensor) -> Tensor:
        """x [M, K] as code * block scale, exact in x's type; input_scale is left out."""
        out = torch.empty_like(x)
        self._launch(x, out, None, None)
        return out

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] as packed codes uint8 [M, K/2] and block scales e4m3 [M, K/16], row-major."""
        codes = torch.empty((x.shape[0], self.k // 2), dtype=torch.uint8, device=x.device)
        scales = torch.empty((x.shape[0], self.k // codec.BLOCK), dtype=torch.uint8, device=x.device)
        self._launch(x, None, codes, scales)
        return codes, scales.view(torch.float8_e4m3fn)

    def _launch(self, x: Tensor, operand: Tensor | None, codes: Tensor | None, scales: Tensor | None) -> None:
        groups = x.numel() // codec.BLOCK
        if groups == 0:
            return
        quantize[(triton.cdiv(groups, _GROUPS),)](
            x,
            operand,
            codes,
            scales,
            self._scale,
            self._inverse,
            None,
            groups,
            0,
            0,
            OPERAND=operand is not None,
            EXPERTS=0,
            GROUPS=_GROUPS,
            CONVERT_E2M1=self._convert,
            EMULATED=emulated(),
            num_warps=1,
        )


class ExpertQuantizer:
    """The same for rows sorted by expert, each expert with its own input_scale."""

    def __init__(self, input_scales: Sequence[float], k: int, device: torch.device) -> None:
        codec.check_k(k)
        self.k, self.experts = k, len(input_scales)
        scale = 1.0 / torch.tensor(input_scales, dtype=torch.float32)
        self._scale, self._inverse = scale.to(device), (1.0 / scale).to(device)
        self._convert = converts(device)

    def operand(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] as code * block scale, exact in x's type; offsets as `GroupedLinearKernel` has them."""
        out = torch.empty_like(x)
        groups_of_row = self.k // codec.BLOCK
        quantize[(x.shape[0], triton.cdiv(groups_of_row, _GROUPS))](
            x,
            out,
            None,
            None,
            self._scale,
            self._inverse,
            offsets,
            x.shape[0] * groups_of_row,
            groups_of_row,
            self.experts,
            OPERAND=True,
            EXPERTS=triton.next_power_of_2(self.experts),
            GROUPS=_GROUPS,
            CONVERT_E2M1=self._convert,
            EMULATED=emulated(),
            num_warps=1,
        )
        return out


def converts(device: torch.device) -> bool:
    """Whether the GPU has the conversion instruction; the interpreter has not."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor in CONVERTING


def compilations() -> list[Compilation]:
    """By comparisons everywhere, by conversion where that exists; for one scale and for experts."""
    signature = {
        "x": "*bf16", "operand": "*bf16", "codes": "*u8", "scales": "*u8", "scale": "fp32", "inverse_scale": "fp32",
        "offsets": "*i32", "groups": "i32", "groups_of_row": "i32", "experts": "i32",
    }  # fmt: skip
    tables = {"scale": "*fp32", "inverse_scale": "*fp32"}
    common = {"GROUPS": _GROUPS, "EMULATED": False}
    odd = ("groups", "groups_of_row", "experts")

    def compilation(name: str, more: dict[str, str], expect: tuple[str, ...], **constexprs: object) -> Compilation:
        return Compilation(
            name, quantize, signature | more, common | constexprs, num_warps=1, unaligned=odd, expect=expect,
            targets=tuple(sorted(CONVERTING)) if constexprs["CONVERT_E2M1"] else TARGETS,
        )  # fmt: skip

    instructions = ("cvt.rn.satfinite.e2m1x2.f32", "F2FP.SATFINITE.E2M1")
    return [
        compilation("compared", {}, (), OPERAND=True, EXPERTS=0, CONVERT_E2M1=False),
        compilation("converted", {}, instructions, OPERAND=False, EXPERTS=0, CONVERT_E2M1=True),
        compilation("experts", tables, (), OPERAND=True, EXPERTS=128, CONVERT_E2M1=False),
    ]
