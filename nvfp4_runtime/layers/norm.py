"""RMSNorm with its weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.ops import NormOp, QuantizedRows, QuantizingNorm
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps), with the residual sum in front. The weight is float32 [H], contiguous."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, prefix: str, hidden: int, eps: float) -> None:
        self.weight = load_norm_weight(ckpt, kernels, prefix, hidden)
        self.eps = eps
        self._kernel = kernels.rms_norm(hidden)
        self.op = NormOp(self._kernel, self.weight, eps)
        self._quantizes: QuantizingNorm | None = None
        self._quantized_under: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, H] (+ residual [T, H]) -> (normed, the sum to carry on). The residual's memory may be reused."""
        return self._kernel(x, residual, self.weight, self.eps)

    def feed(self, linear: Linear, kernels: Kernels, group: str) -> None:
        """What `fed` gives goes to `linear` alone: it is written quantised where both kernels can do that."""
        taker, kernel = linear.takes_quantized, cast(object, self._kernel)
        if taker is not None and isinstance(kernel, QuantizingNorm):
            self._quantizes, self._quantized_under = kernel, taker.quantized_input_scale
            kernels.record_fusion("rms_norm", group)

    def fed(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor | QuantizedRows, Tensor]:
        """As __call__, for the linear of `feed`."""
        if self._quantizes is not None and self._quantized_under is not None:
            return self._quantizes.quantize(x, residual, self.weight, self.eps, self._quantized_under, True)
        return self(x, residual)


def load_norm_weight(ckpt: Checkpoint, kernels: Kernels, prefix: str, size: int) -> Tensor:
    """`prefix.weight` as float32 on the kernels' device: exact whatever it is stored in."""
    return kernels.place(ckpt.tensor(f"{prefix}.weight", (size,)).to(torch.float32).contiguous())
