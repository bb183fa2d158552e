"""Linear layers on a GPU: packed weights by our GEMM or, for many rows, by cuBLAS; plain weights by cuBLAS always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
from torch import Tensor

from nvfp4_runtime.errors import ConfigError, KernelError
from nvfp4_runtime.kernels.ops import LinearKernel, LinearSpec
from nvfp4_runtime.kernels.triton import layout
from nvfp4_runtime.kernels.triton.common import emulated
from nvfp4_runtime.kernels.triton.gemm_pieces import FOUR_BIT, FP8
from nvfp4_runtime.kernels.triton.layout import Panels
from nvfp4_runtime.kernels.triton.linear_kernels import add_splits, gemm, write_out
from nvfp4_runtime.kernels.triton.quantize_activation import ActivationQuantizer
from nvfp4_runtime.kernels.triton.scratch import Scratch, multiprocessors
from nvfp4_runtime.kernels.triton.tuning import FUSED_ROWS, tiles, workspace_values
from nvfp4_runtime.kernels.upload import upload
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

_SUM_COLUMNS = 512  # outputs one block of add_splits makes
WRITTEN_VALUES = 1 << 26  # of a weight written out at a time: 128 MiB of scratch, whatever the head's size


def triton_linear(weight: Weight, spec: LinearSpec, scratch: Scratch) -> LinearKernel:
    """The kernel for `weight`, which is copied to the device of `scratch`."""
    packed = pack(weight, spec, scratch.device)
    if isinstance(packed, DenseWeight):
        return DenseLinear(packed, spec)
    return PackedLinear(packed, spec, scratch)


@dataclass(frozen=True)
class Packed:
    """A weight in panels with all its kernel needs beside them.

    format        gemm_pieces' FOUR_BIT or FP8
    group_rows    row groups of one multiplier each, where there are few; else empty
    fp8_scales    fp32 [.., N] of FP8 scales that change along K, every `scale_blocks` blocks; else None and 0
    bias          fp32 [N] or None
    input_scale   set for W4A4 only; already part of row_scale
    """

    panels: Panels
    group_rows: tuple[int, ...]
    bias: Tensor | None
    format: int = FOUR_BIT.value
    fp8_scales: Tensor | None = None
    scale_blocks: int = 0
    input_scale: float | None = None

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.fp8_scales is None else self.fp8_scales.nbytes)


def pack(weight: Weight, spec: LinearSpec, device: torch.device) -> Packed | DenseWeight:
    """`weight` on `device` as its kernel wants it. KernelError names NaN scales and codes."""
    weight = upload(weight, device)
    bias = None if weight.bias is None else weight.bias.to(torch.float32)
    if isinstance(weight, NVFP4Weight):
        panels, input_scale = layout.pack_nvfp4(weight), None
        if spec.numerics == "w4a4":
            input_scale = checked_input_scale(weight)
            panels.row_scale.mul_(input_scale)
        return Packed(panels, weight.group_rows, bias, input_scale=input_scale)
    if isinstance(weight, FP8Weight):
        panels = layout.pack_fp8(weight)
        if weight.scales_rows:
            return Packed(panels, (), bias, format=FP8.value)
        scale_blocks = weight.block[1] // layout.STEP
        return Packed(panels, (), bias, FP8.value, layout.block_scales(weight), scale_blocks)
    if isinstance(weight, MXFP4Weight):
        made = layout.pack_mxfp4(weight)
        return DenseWeight(weight.dequantize(), weight.bias) if made is None else Packed(made, (), bias)
    return weight


def checked_input_scale(weight: NVFP4Weight) -> float:
    """W4A4's input_scale as float32 holds it."""
    if weight.input_scale is None:
        raise ConfigError("w4a4 needs an input_scale and this weight has none; use --numerics w4a16")
    scale = float(torch.tensor(weight.input_scale, dtype=torch.float32))
    if not scale > 0:
        raise KernelError(f"w4a4 needs a positive input_scale, found {scale}; calibrate the layer again")
    return scale


class PackedLinear:
    """An NVFP4, MXFP4 or FP8 weight in panels (see layout.py).

    Up to FUSED_ROWS rows one kernel decodes the weight in registers; beyond, the weight is written to scratch in
    bfloat16, exactly, and cuBLAS multiplies. Sums are FP32, row_scale multiplies each once, one rounding ends it.
    W4A4: x is quantised first, bit for bit as codec.quantize_activation does, and enters as code * block scale.
    FP8 whose scales change along K is always decoded in registers: bfloat16 would round it.
    weight_bytes  of the panels and scales
    """

    def __init__(self, weight: Packed, spec: LinearSpec, scratch: Scratch) -> None:
        self.weight, self.scratch = weight, scratch
        self.n, self.k = spec.n, spec.k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.weight_bytes = weight.nbytes
        self._quantize = None
        if weight.input_scale is not None:
            self._quantize = ActivationQuantizer(weight.input_scale, spec.k, scratch.device)
        self._float32 = self.dtype == torch.float32
        self._multiprocessors = multiprocessors(scratch.device)
        self._rows_at_a_time = max(1, WRITTEN_VALUES // spec.k // layout.PANEL) * layout.PANEL
        self._fused_rows = FUSED_ROWS if weight.fp8_scales is None else None  # None: always
        self._ignored = torch.zeros((), dtype=torch.bfloat16, device=scratch.device)
        self._alphas = _group_alphas(weight)
        partial_sums = workspace_values(spec.n, spec.k, self._multiprocessors, self._float32)
        scratch.reserve("splits", partial_sums, torch.float32)
        if self._fused_rows is not None:
            scratch.reserve("weight", min(spec.n, self._rows_at_a_time) * spec.k, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        check_rows(x, self.dtype, self.k)
        if self._quantize is not None:
            x = self._quantize.operand(x)
        if self._fused_rows is not None and x.shape[0] > self._fused_rows:
            return self._written_out(x)
        out = torch.empty((x.shape[0], self.n), dtype=self.out_dtype, device=x.device)
        if x.shape[0]:
            self._decoded(x, out)
        return out

    def _decoded(self, x: Tensor, out: Tensor) -> None:
        w, m = self.weight, x.shape[0]
        how = tiles(m, self.n, self.k, self._multiprocessors, self._float32)
        blocks = w.panels.blocks
        splits = how.splits if m <= FUSED_ROWS else 1  # beyond, only FP8 with scales along K comes here: rows abound
        partial = self.scratch.view("splits", torch.float32, splits, m, self.n) if splits > 1 else out
        gemm[(triton.cdiv(self.n, how.columns), splits, triton.cdiv(m, how.rows))](
            x,
            w.panels.words,
            w.panels.scales if w.fp8_scales is None else w.fp8_scales,
            w.panels.row_scale,
            w.bias,
            out,
            partial,
            m,
            self.n,
            self.k,
            w.panels.words.shape[0],
            blocks,
            how.blocks if splits > 1 else blocks,
            FORMAT=w.format,
            SCALE_BLOCKS=w.scale_blocks,
            BASE=w.panels.base,
            SPLITS=splits,
            HAS_BIAS=w.bias is not None,
            EVEN_K=self.k % layout.STEP == 0,
            COLUMNS=how.columns,
            ROWS=how.rows,
            EMULATED=emulated(),
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
        if splits > 1:
            self._finish(partial, splits, out)

    def _finish(self, sums: Tensor, splits: int, out: Tensor) -> None:
        """FP32 sums [splits, M, N] to results."""
        w = self.weight
        add_splits[(out.shape[0], triton.cdiv(self.n, _SUM_COLUMNS))](
            sums,
            w.panels.row_scale,
            w.bias,
            out,
            out.shape[0],
            self.n,
            SPLITS=splits,
            HAS_BIAS=w.bias is not None,
            COLUMNS=_SUM_COLUMNS,
            EMULATED=emulated(),
        )

    def _written_out(self, x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], self.n), dtype=self.out_dtype, device=x.device)
        # alpha meets cuBLAS's FP32 sums before their one rounding
        by_alpha = bool(self._alphas) and x.dtype == out.dtype == torch.bfloat16 and self.weight.bias is None
        sums = None if by_alpha else torch.empty(out.shape, dtype=torch.float32, device=x.device)
        for start in range(0, self.n, self._rows_at_a_time):
            operand = self._operand(start, min(start + self._rows_at_a_time, self.n))
            if sums is not None:
                sums[:, start : start + operand.shape[0]] = float32_sums(x, operand)
                continue
            for low, high, alpha in self._alphas:
                low, high = max(low - start, 0), min(high - start, operand.shape[0])
                if low < high:
                    columns = out[:, start + low : start + high]
                    torch.addmm(self._ignored, x, operand[low:high].t(), beta=0, alpha=alpha, out=columns)
        if sums is not None:
            self._finish(sums, 1, out)
        return out

    def _operand(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the weight in scratch, as the kernels multiply it; `start` begins a panel."""
        panels = self.weight.panels
        operand = self.scratch.view("weight", self.dtype, stop - start, self.k)
        first, last = start // layout.PANEL, triton.cdiv(stop, layout.PANEL)
        write_out[(panels.blocks, last - first)](
            panels.words[first:last],
            None if panels.scales is None else panels.scales[first:last],
            operand,
            stop - start,
            self.k,
            panels.blocks,
            FORMAT=self.weight.format,
            BASE=panels.base,
            EVEN_K=self.k % layout.STEP == 0,
            EMULATED=emulated(),
        )
        return operand


class DenseLinear:
    """A plain weight, by cuBLAS. float16, or float32 where activations are bfloat16, is kept as float32: exact.

    weight_bytes  of the weight as kept
    """

    def __init__(self, weight: DenseWeight, spec: LinearSpec) -> None:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        self.dtype, self.k = dtype, spec.k
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        same = weight.weight.dtype == dtype
        self.weight = (weight.weight if same else weight.weight.to(torch.float32)).contiguous()
        self.bias = weight.bias
        self._one_gemm = self.weight.dtype == self.out_dtype and (
            weight.bias is None or weight.bias.dtype == self.out_dtype
        )
        self.weight_bytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        check_rows(x, self.dtype, self.k)
        if self._one_gemm:
            return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        y = float32_sums(x, self.weight)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(self.out_dtype)


def float32_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in FP32, bfloat16 operands multiplied as such where a GPU does it."""
    if x.dtype == weight.dtype == torch.bfloat16 and x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.mm(x.to(torch.float32), weight.to(torch.float32).t())


def check_rows(x: Tensor, dtype: torch.dtype, k: int) -> None:
    """Raise KernelError unless x is a contiguous [M, k] of `dtype`."""
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != k or not x.is_contiguous():
        raise KernelError(f"x: expected a contiguous {dtype} [M, {k}], found {x.dtype} {list(x.shape)}")


def _group_alphas(weight: Packed) -> Sequence[tuple[int, int, float]]:
    """(first row, last row + 1, multiplier) of each row group, host numbers; empty where each row has its own."""
    if len(weight.group_rows) > 8:
        return ()
    bounds = [0, *accumulate(weight.group_rows)]
    return [(low, high, float(weight.panels.row_scale[low])) for low, high in pairwise(bounds) if low < high]
