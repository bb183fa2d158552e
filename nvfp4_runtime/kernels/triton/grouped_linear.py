"""Experts' linear layers over rows sorted by expert, one launch; how many rows an expert has stays on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import GroupedLinearKernel, GroupedLinearSpec
from nvfp4_runtime.kernels.triton import layout
from nvfp4_runtime.kernels.triton.common import emulated, round_to
from nvfp4_runtime.kernels.triton.gemm_pieces import DENSE, FOUR_BIT, FP8, accumulate
from nvfp4_runtime.kernels.triton.linear import Packed, check_rows, pack
from nvfp4_runtime.kernels.triton.quantize_activation import ExpertQuantizer
from nvfp4_runtime.kernels.triton.scratch import Scratch
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight

_COLUMNS = 64


@triton.jit(do_not_specialize=["tokens"])
def grouped_gemm(
    x, words, scales, row_scale, bias, out, offsets, tokens, experts, outputs, k, panels, blocks,
    expert_words, expert_scales,
    FORMAT: tl.constexpr, SCALE_BLOCKS: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's y = x W^T. Each program finds its expert by the offsets; those too many do nothing.

    words, scales   of all experts, one after the other, expert_words and expert_scales elements each
    row_scale, bias [experts, outputs]
    offsets         int32 [experts + 1]
    EXPERTS         experts rounded up to a power of two
    grid            (outputs / COLUMNS rounded up, a bound of the number of row tiles)
    """
    tile = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    # wrong offsets give wrong rows, but none outside x
    starts = tl.maximum(tl.minimum(tl.load(offsets + e, mask=e < experts, other=0), tokens), 0)
    ends = tl.maximum(tl.minimum(tl.load(offsets + e + 1, mask=e < experts, other=0), tokens), starts)
    tiles = (ends - starts + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert >= experts:
        return
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    start = tl.sum(tl.where(e == expert, starts, 0), 0) + (tile - before) * ROWS
    rows = tl.sum(tl.where(e == expert, ends, 0), 0) - start
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.arange(0, ROWS)
    wide = expert.to(tl.int64)
    acc = accumulate(
        tl.zeros((COLUMNS, ROWS), tl.float32), words + wide * expert_words, scales + wide * expert_scales,
        x + start.to(tl.int64) * k, n, m, rows, k, outputs, panels, blocks, 0, blocks,
        FORMAT, SCALE_BLOCKS, BASE, EVEN_K, EMULATED,
    )  # fmt: skip
    y = acc * tl.load(row_scale + wide * outputs + n, mask=n < outputs, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + wide * outputs + n, mask=n < outputs, other=0.0)[:, None]
    at = (start + m).to(tl.int64)[None, :] * outputs + n[:, None]
    mask = (n < outputs)[:, None] & (m < rows)[None, :]
    tl.store(out + at, round_to(y, out.dtype.element_ty, EMULATED), mask=mask)


def triton_grouped_linear(weights: Sequence[Weight], spec: GroupedLinearSpec, scratch: Scratch) -> GroupedLinearKernel:
    """The kernel for all experts, whose weights are copied to the device of `scratch`."""
    packed = [pack(weight, spec.each, scratch.device) for weight in weights]
    if any(isinstance(one, DenseWeight) for one in packed):
        # plain experts; or one MXFP4 expert's scales span too much for its panels: then all are kept as float32
        dense = [w if isinstance(w, DenseWeight) else DenseWeight(w.dequantize(), w.bias) for w in weights]
        return GroupedLinear(_stack_dense([_moved(w, scratch.device) for w in dense]), spec, scratch)
    return GroupedLinear(_stack([p for p in packed if isinstance(p, Packed)]), spec, scratch)


class _Experts:
    """What `grouped_gemm` reads, all experts in one tensor each."""

    def __init__(self, format: int, words: Tensor, row_scale: Tensor, bias: Tensor | None) -> None:
        self.format, self.words, self.row_scale, self.bias = format, words, row_scale, bias
        self.scales: Tensor | None = None
        self.panels, self.blocks, self.base, self.scale_blocks = 0, 0, 0, 0
        self.input_scales: list[float] = []


def _stack(packed: Sequence[Packed]) -> _Experts:
    first = packed[0]
    bias = None if first.bias is None else torch.stack([p.bias for p in packed if p.bias is not None])
    row_scale = torch.stack([p.panels.row_scale for p in packed])
    made = _Experts(first.format, torch.stack([p.panels.words for p in packed]), row_scale, bias)
    if first.fp8_scales is not None:
        made.scales = torch.stack([p.fp8_scales for p in packed if p.fp8_scales is not None])
    elif first.panels.scales is not None:
        made.scales = torch.stack([p.panels.scales for p in packed if p.panels.scales is not None])
    made.panels, made.blocks = first.panels.words.shape[:2]
    made.base, made.scale_blocks = first.panels.base, first.scale_blocks
    made.input_scales = [p.input_scale for p in packed if p.input_scale is not None]
    return made


def _stack_dense(weights: Sequence[DenseWeight]) -> _Experts:
    bias = None
    if weights[0].bias is not None:
        bias = torch.stack([w.bias.to(torch.float32) for w in weights if w.bias is not None])
    stacked = torch.stack([w.weight for w in weights])
    if stacked.dtype == torch.float16:  # tensor cores multiply float16 by float16 only: exact as float32
        stacked = stacked.to(torch.float32)
    made = _Experts(DENSE.value, stacked, torch.ones(stacked.shape[:2], device=stacked.device), bias)
    made.blocks = triton.cdiv(stacked.shape[2], layout.STEP)
    return made


def _moved(weight: DenseWeight, device: torch.device) -> DenseWeight:
    return DenseWeight(weight.weight.to(device), None if weight.bias is None else weight.bias.to(device))


class GroupedLinear:
    """See `GroupedLinearKernel`; a row's result is that of its expert alone.

    The grid is a bound of what any routing needs, so no number leaves the device and CUDA graphs can hold the call.
    Offsets are trusted: to check them is to wait for the device. They come from our own routing (see layers/moe.py).
    weight_bytes  of all experts
    """

    def __init__(self, experts: _Experts, spec: GroupedLinearSpec, scratch: Scratch) -> None:
        self.experts, self.num_experts = experts, spec.num_experts
        self.n, self.k = spec.n, spec.k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        kept = (experts.words, experts.scales, experts.row_scale)
        self.weight_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
        self._quantize = None
        if experts.input_scales:
            self._quantize = ExpertQuantizer(experts.input_scales, spec.k, scratch.device)

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        check_rows(x, self.dtype, self.k)
        if offsets.dtype != torch.int32 or tuple(offsets.shape) != (self.num_experts + 1,):
            raise KernelError(
                f"offsets: expected an int32 tensor [{self.num_experts + 1}] for {self.num_experts} experts, "
                f"found {offsets.dtype} {list(offsets.shape)}"
            )
        out = torch.empty((x.shape[0], self.n), dtype=self.out_dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        if self._quantize is not None:
            x = self._quantize.operand(x, offsets)
        w = self.experts
        wide = self.dtype == torch.float32  # see tuning.tiles
        rows = 16 if wide else row_tile(x.shape[0], self.num_experts)
        bound = x.shape[0] // rows + min(self.num_experts, x.shape[0])
        grouped_gemm[(triton.cdiv(self.n, _COLUMNS), bound)](
            x,
            w.words,
            w.row_scale if w.scales is None else w.scales,
            w.row_scale,
            w.bias,
            out,
            offsets,
            x.shape[0],
            self.num_experts,
            self.n,
            self.k,
            w.panels,
            w.blocks,
            w.words[0].numel(),
            0 if w.scales is None else w.scales[0].numel(),
            FORMAT=w.format,
            SCALE_BLOCKS=w.scale_blocks,
            BASE=w.base,
            HAS_BIAS=w.bias is not None,
            EVEN_K=self.k % layout.STEP == 0,
            COLUMNS=_COLUMNS,
            ROWS=rows,
            EXPERTS=triton.next_power_of_2(self.num_experts),
            EMULATED=emulated(),
            num_warps=4 if wide or rows == 64 else 2,
            num_stages=2 if wide else 3,
        )
        return out


def row_tile(rows: int, experts: int) -> int:
    """Rows of one tile: by what an expert has on average, twice that to hold an uneven routing."""
    expected = 2 * rows / experts
    return 16 if expected <= 16 else 32 if expected <= 32 else 64


def compilations() -> list[Compilation]:
    """Each format at one tile."""
    integers = ("tokens", "experts", "outputs", "k", "panels", "blocks", "expert_words", "expert_scales")

    def compilation(name: str, words: str, scales: str, rows: int, **constexprs: object) -> Compilation:
        signature = {
            "x": "*bf16", "words": words, "scales": scales, "row_scale": "*fp32", "bias": "*fp32", "out": "*bf16",
            "offsets": "*i32",
        } | dict.fromkeys(integers, "i32")  # fmt: skip
        all_constexprs = {
            "SCALE_BLOCKS": 0, "BASE": layout.NVFP4_BASE, "HAS_BIAS": False, "EVEN_K": True, "COLUMNS": _COLUMNS,
            "ROWS": rows, "EXPERTS": 128, "EMULATED": False,
        } | constexprs  # fmt: skip
        return Compilation(
            name, grouped_gemm, signature, all_constexprs, num_warps=2, num_stages=3, expect=("cp.async", "mma.sync"),
            forbid=("tf32",), unaligned=("tokens", "experts", "outputs", "panels", "blocks"), targets=(80, 90, 120),
        )  # fmt: skip

    return [
        compilation("nvfp4", "*i16", "*i32", 16, FORMAT=FOUR_BIT.value),
        compilation("fp8", "*i16", "*fp32", 32, FORMAT=FP8.value, SCALE_BLOCKS=2),
        compilation("dense", "*bf16", "*fp32", 16, FORMAT=DENSE.value),
    ]
