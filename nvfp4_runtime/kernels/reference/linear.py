"""y = x W^T (+ bias) in plain PyTorch: exact operands, FP32 sums, each global scale multiplied once.

NVFP4 weights are kept as code * block_scale, which bfloat16 holds exactly; no rounding happens before the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight

_CHUNK_VALUES = 1 << 18  # 1 MiB of float32: a widened piece of the weight stays in the core's cache


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
        else:
            operand = weight.weight
        if spec.dtype == "float32":
            operand = operand.to(torch.float32)
        self.operand = operand.contiguous()
        self.weight_bytes = self.operand.nbytes
        self._alphas = None if self.multipliers is None else [float(m) for m in self.multipliers]
        self._row_multipliers = (
            None
            if self.multipliers is None
            else torch.repeat_interleave(
                self.multipliers, torch.tensor(self.group_rows, device=self.multipliers.device)
            )
        )
        # one bfloat16 GEMM sums in FP32 and rounds once; a bias would have to enter before that rounding
        self._one_gemm = operand.dtype == self.out_dtype == torch.bfloat16 and self.bias is None
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
