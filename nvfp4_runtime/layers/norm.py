"""RMSNorm with its weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype
from nvfp4_runtime.kernels.ops import NormOp, QuantizedRows, QuantizingNorm
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps), with the residual sum in front. The weight is float32 [H], contiguous.

    zero_centred  the files hold the weight less 1
    out_dtype     of the normed rows, None: what multiplications take
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        prefix: str,
        hidden: int,
        eps: float,
        *,
        zero_centred: bool = False,
        out_dtype: Dtype | None = None,
    ) -> None:
        self.weight = load_norm_weight(ckpt, kernels, prefix, hidden, zero_centred)
        self.eps = eps
        self._kernel = kernels.rms_norm(hidden, out_dtype)
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


def load_norm_weight(ckpt: Checkpoint, kernels: Kernels, prefix: str, size: int, zero_centred: bool = False) -> Tensor:
    """`prefix.weight` as float32 on the kernels' device, exact whatever it is stored in; plus 1 if `zero_centred`."""
    weight = ckpt.tensor(f"{prefix}.weight", (size,)).to(torch.float32)
    return kernels.place((weight + 1 if zero_centred else weight).contiguous())
