"""Weights quantised at load by native code, bit for bit as nvfp4/fp8.py and nvfp4/codec.py define."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight


def quantize_fp8(context: Any, weight: DenseWeight) -> FP8Weight:
    """`fp8.quantize_rows`. Raises ValueError on NaN or Inf."""
    w = _source(weight)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    amax = _row_amax(context, w, codes)
    scale = (amax / codec.E4M3_MAX).unsqueeze(1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return FP8Weight(codes.view(torch.float8_e4m3fn), scale, (1, weight.k), bias=weight.bias)


def quantize_nvfp4(context: Any, weight: DenseWeight) -> NVFP4Weight:
    """`codec.quantize` under the whole tensor's weight_scale_2. Raises ValueError on NaN or Inf."""
    codec.check_k(weight.k)
    w = _source(weight)
    scale_2 = codec.weight_scale_2(_row_amax(context, w, None).max())
    packed = torch.empty(weight.n, weight.k // 2, dtype=torch.uint8)
    scales = torch.empty(weight.n, weight.k // codec.BLOCK, dtype=torch.uint8)
    context.quantize_weight(
        w.data_ptr(), TYPE_CODES[w.dtype], weight.n, weight.k, packed.data_ptr(), 0, scales.data_ptr(), float(scale_2)
    )
    return NVFP4Weight(packed, scales.view(torch.float8_e4m3fn), scale_2.reshape(1), (weight.n,), bias=weight.bias)


def _source(weight: DenseWeight) -> Tensor:
    if weight.weight.device.type != "cpu":
        raise KernelError(f"the cpu backend got a weight on {weight.weight.device}; load the checkpoint on the CPU")
    return weight.weight.contiguous()


def _row_amax(context: Any, w: Tensor, codes: Tensor | None) -> Tensor:
    """Largest magnitude of each row, fp32 [N]; fills `codes` with E4M3 under amax / 448 where given."""
    n, k = w.shape
    amax = torch.empty(n)
    context.quantize_weight(
        w.data_ptr(), TYPE_CODES[w.dtype], n, k, 0 if codes is None else codes.data_ptr(), amax.data_ptr(), 0, 0.0
    )
    if bool(amax.isnan().any()):
        raise ValueError("cannot quantise weights that hold NaN or Inf")
    return amax
