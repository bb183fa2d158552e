"""y = x W^T (+ bias) in plain PyTorch: exact operands, FP32 sums, each global scale multiplied once.

NVFP4 weights are kept as code * block_scale, which bfloat16 holds exactly; FP8 codes as bfloat16, exact as well. No
rounding happens before the end. FP8 scales that change along K multiply their block's sum; MXFP4 is dequantised to
float32, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import LinearKernel, LinearSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight

_CHUNK_VALUES = 1 << 18  # 1 MiB of float32: a widened piece of the weight stays in the core's cache


def reference_linear(weight: Weight, spec: LinearSpec) -> LinearKernel:
    if isinstance(weight, FP8Weight) and not weight.scales_rows:
        return ReferenceBlockFP8(weight, spec)
    return ReferenceLinear(weight, spec)


class ReferenceLinear:
    """One linear layer: its operand, its multipliers, its bias.

    weight_bytes  bytes of the operand as kept: 16 bits per value, 32 when activations are float32
    """

    def __init__(self, weight: Weight, spec: LinearSpec) -> None:
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.bias = None if weight.bias is None else weight.bias.to(torch.float32)
        self.multipliers: Tensor | None = None  # fp32 [G], one per row group
        self.group_rows: tuple[int, ...] = (weight.n,)
        self.input_scale: Tensor | None = None  # set for W4A4 only
        if isinstance(weight, NVFP4Weight):
            operand = weight.operand()
            self.multipliers, self.group_rows = weight.weight_scale_2, weight.group_rows
            if spec.numerics == "w4a4":
                assert weight.input_scale is not None  # Kernels.linear refuses w4a4 without it
                self.input_scale = torch.tensor(weight.input_scale, dtype=torch.float32, device=operand.device)
                self.multipliers = self.input_scale * weight.weight_scale_2
        elif isinstance(weight, FP8Weight):  # a row has one scale
            operand = weight.codes.to(torch.bfloat16)
            self.multipliers, self.group_rows = weight.spread_scale().flatten(), (1,) * weight.n
        elif isinstance(weight, MXFP4Weight):
            operand = weight.dequantize()
        else:
            operand = weight.weight
        if spec.dtype == "float32":
            operand = operand.to(torch.float32)
        self.operand = operand.contiguous()
        self.weight_bytes = self.operand.nbytes
        self._alphas = [float(m) for m in self.multipliers] if isinstance(weight, NVFP4Weight) else None  # type: ignore[union-attr]  # NVFP4 has them
        self._row_multipliers = (
            None
            if self.multipliers is None
            else torch.repeat_interleave(
                self.multipliers, torch.tensor(self.group_rows, device=self.multipliers.device)
            )
        )
        # one bfloat16 GEMM sums in FP32 and rounds once; a bias would have to enter before that rounding
        whole_groups = self.multipliers is None or isinstance(weight, NVFP4Weight)
        self._one_gemm = operand.dtype == self.out_dtype == torch.bfloat16 and self.bias is None and whole_groups
        self._int8 = spec.numerics == "w4a8"
        self._ignored = torch.zeros((), dtype=torch.bfloat16, device=operand.device)

    def __call__(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = codec.activation_operand(x, self.input_scale)
        if self._int8:
            x = codec.int8_operand(x)
        if self._one_gemm and x.dtype == torch.bfloat16:
            return self._bfloat16_gemm(x)
        y = self._float32_sums(x)
        if self._row_multipliers is not None:
            y.mul_(self._row_multipliers)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(self.out_dtype)

    def _bfloat16_gemm(self, x: Tensor) -> Tensor:
        """The multiplier rides as addmm's alpha, which meets the FP32 sum before its one rounding."""
        if self._alphas is None:
            return torch.mm(x, self.operand.t())
        parts = [
            torch.addmm(self._ignored, x, rows.t(), beta=0, alpha=alpha)
            for rows, alpha in zip(torch.split(self.operand, list(self.group_rows)), self._alphas, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _float32_sums(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        if self.operand.dtype == torch.float32:
            return torch.mm(x, self.operand.t())
        chunks = torch.split(self.operand, max(1, _CHUNK_VALUES // self.operand.shape[1]))
        return torch.cat([torch.mm(x, rows.to(torch.float32).t()) for rows in chunks], dim=1)


class ReferenceBlockFP8:
    """FP8 whose scales change along K: each block's FP32 sum is multiplied by its scale, then added up in FP32.

    weight_bytes  bytes of codes and scales
    """

    def __init__(self, weight: FP8Weight, spec: LinearSpec) -> None:
        self.weight = weight
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self.weight.block
        y = torch.zeros(x.shape[0], self.weight.n, device=x.device)
        for block, start in enumerate(range(0, self.weight.k, columns)):
            span = slice(start, start + columns)
            scale = self.weight.scale[:, block].repeat_interleave(rows)[: self.weight.n]
            y += torch.mm(x[:, span].to(torch.float32), self.weight.codes[:, span].to(torch.float32).t()) * scale
        if self.weight.bias is not None:
            y += self.weight.bias.to(torch.float32)
        return y.to(self.out_dtype)
