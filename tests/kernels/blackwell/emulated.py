"""torch's NVFP4 scaled_mm in plain PyTorch, for machines without FP4 tensor cores: what it must compute from its bytes.

Every call is first made with meta tensors of the same shapes, so that PyTorch's own checks see counts, dtypes, recipes
and swizzles; then the scales are put back in order with the layout's inverse and the product is taken in FP64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import unswizzle_scales

real_scaled_mm = F.scaled_mm


def meta(value: Any) -> Any:
    """`value` with its tensors on the meta device, strides kept."""
    if isinstance(value, list):
        return [meta(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class EmulatedScaledMM:
    """Stands in for F.scaled_mm. calls: how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        checked = real_scaled_mm(meta(a), meta(b), **{name: meta(value) for name, value in options.items()})
        x = self._values(a, options["scale_a"])
        w = self._values(b.t(), options["scale_b"])
        y = x @ w.t()
        assert y.shape == checked.shape
        if options["bias"] is not None:
            y = y + options["bias"].double()
        return y.to(checked.dtype)

    @staticmethod
    def _values(codes: Tensor, scales: list[Tensor]) -> Tensor:
        """What one side stands for, FP64 [R, K]."""
        packed = codes.view(torch.uint8)
        rows, k = packed.shape[0], packed.shape[1] * 2
        block = unswizzle_scales(scales[0], rows, k // 16)
        values = codec.dequantize(packed, block, torch.ones(())).double()
        return values * scales[1].double() if len(scales) == 2 else values
