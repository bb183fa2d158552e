"""RMSNorm with its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.ops import NormOp
from nvfp4_runtime.kernels.registry import Kernels


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps), with the residual sum in front. The weight is float32 [H], contiguous."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, prefix: str, hidden: int, eps: float) -> None:
        self.weight = load_norm_weight(ckpt, kernels, prefix, hidden)
        self.eps = eps
        self._kernel = kernels.rms_norm(hidden)
        self.op = NormOp(self._kernel, self.weight, eps)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, H] (+ residual [T, H]) -> (normed, the sum to carry on). The residual's memory may be reused."""
        return self._kernel(x, residual, self.weight, self.eps)


def load_norm_weight(ckpt: Checkpoint, kernels: Kernels, prefix: str, size: int) -> Tensor:
    """`prefix.weight` as float32 on the kernels' device: exact whatever it is stored in."""
    return kernels.place(ckpt.tensor(f"{prefix}.weight", (size,)).to(torch.float32).contiguous())
