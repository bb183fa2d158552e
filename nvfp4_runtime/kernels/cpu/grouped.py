"""Experts' linear layers over rows sorted by expert, natively."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_matrix
from nvfp4_runtime.kernels.cpu.linear import NativeLinear, NativeLinearNVFP4
from nvfp4_runtime.kernels.cpu.linear_formats import NativeLinearMXFP4
from nvfp4_runtime.kernels.offsets import expert_bounds
from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearKernel


class NativeGroupedLinear:
    """See `GroupedLinearKernel`; a row has the bits its expert's plain kernel gives it.

    NVFP4 and MXFP4 experts run in one native call: the rows of all are packed once, then the threads share the pieces
    of all weights at once, so that experts with few rows leave no thread idle. Plain and FP8 experts run one by one.
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
        self._natives = tuple(natives)
        packed = isinstance(experts[0], NativeLinearNVFP4 | NativeLinearMXFP4)
        self._together = native.ExpertsNVFP4(natives) if packed else None
        self._run, self._run_together = context.linear, context.grouped_nvfp4

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        offsets = offsets.contiguous()
        bounds = expert_bounds(offsets, len(self.experts), rows)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        if self._together is not None:
            self._run_together(
                self._together, x.data_ptr(), self._type, offsets.data_ptr(), rows, out.data_ptr(), self._out_type
            )
            return out
        x_row, out_row = self.k * x.element_size(), self.n * out.element_size()
        for expert, (start, end) in zip(self._natives, pairwise(bounds), strict=True):
            if end > start:
                x_at, out_at = x.data_ptr() + start * x_row, out.data_ptr() + start * out_row
                self._run(expert, x_at, self._type, end - start, out_at, self._out_type)
        return out
