"""Experts' linear layers over rows sorted by expert, natively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_matrix
from nvfp4_runtime.kernels.cpu.linear import NativeLinear
from nvfp4_runtime.kernels.offsets import expert_bounds
from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearKernel


class NativeGroupedLinear:
    """See `GroupedLinearKernel`; a row has the bits its expert's plain kernel gives it.

    One native call: the rows of all experts are packed once, then the threads share the pieces of all weights at once,
    so that experts with few rows leave no thread idle.
    weight_bytes  of all experts
    """

    def __init__(self, native: Any, context: Any, experts: Sequence[LinearKernel], spec: GroupedLinearSpec) -> None:
        self.experts = tuple(experts)
        self.n, self.k = spec.n, spec.k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.weight_bytes = sum(expert.weight_bytes for expert in experts)
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]
        natives = []
        for expert in experts:
            assert isinstance(expert, NativeLinear)
            natives.append(expert.native)
        self.native = native.Experts(natives)
        self._run = context.grouped

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        offsets = offsets.contiguous()
        expert_bounds(offsets, len(self.experts), rows)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        self._run(self.native, x.data_ptr(), self._type, offsets.data_ptr(), rows, out.data_ptr(), self._out_type)
        return out
