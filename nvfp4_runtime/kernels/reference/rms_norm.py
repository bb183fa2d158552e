"""RMSNorm with the residual sum fused in front."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x [T, H] (+ residual [T, H]) -> (normed, sum); see `RMSNormKernel`."""
    total = x if residual is None else (x.to(torch.float32) + residual.to(torch.float32)).to(x.dtype)
    return normalise(total.to(torch.float32), weight, eps).to(out_dtype), total


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, all float32."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(torch.float32)
