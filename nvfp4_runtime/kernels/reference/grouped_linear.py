"""Experts' linear layers over rows sorted by expert: one plain kernel each, called on its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nvfp4_runtime.kernels.offsets import expert_bounds
from nvfp4_runtime.kernels.ops import GroupedLinearSpec
from nvfp4_runtime.kernels.reference.linear import reference_linear
from nvfp4_runtime.nvfp4.weight import Weight


class ReferenceGroupedLinear:
    """See `GroupedLinearKernel`. weight_bytes  those of all experts' kernels."""

    def __init__(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> None:
        self.experts = [reference_linear(weight, spec.each) for weight in weights]
        self.n = spec.n
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.weight_bytes = sum(expert.weight_bytes for expert in self.experts)

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        bounds = expert_bounds(offsets, len(self.experts), x.shape[0])
        out = torch.empty(x.shape[0], self.n, dtype=self.out_dtype, device=x.device)
        for expert, (start, end) in zip(self.experts, pairwise(bounds), strict=True):
            if end > start:
                out[start:end] = expert(x[start:end])
        return out
