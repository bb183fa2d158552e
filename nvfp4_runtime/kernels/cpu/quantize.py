"""Weights quantised by native code, bit for bit as nvfp4/fp8.py and nvfp4/block_scales.py define."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_tensor
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.block_scales import BlockMethod, tensor_scale
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight

METHOD_CODES: dict[BlockMethod, int] = {"max": 0, "mse": 1, "4over6": 2}  # csrc/types.h: BlockScales


def quantize_fp8(context: Any, weight: DenseWeight) -> FP8Weight:
    """`fp8.quantize_rows`. Raises ValueError on NaN or Inf."""
    w = _source(weight)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    amax = _finite(row_amax(context, weight, codes))
    scale = (amax / codec.E4M3_MAX).unsqueeze(1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return FP8Weight(codes.view(torch.float8_e4m3fn), scale, (1, weight.k), bias=weight.bias)


def quantize_nvfp4(
    context: Any,
    weight: DenseWeight,
    method: BlockMethod = "max",
    scale_2: Tensor | None = None,
    importance: Tensor | None = None,
) -> NVFP4Weight:
    """`block_scales.quantize`, under the whole tensor's scale unless `scale_2` is given. ValueError on NaN or Inf."""
    codec.check_k(weight.k)
    w = _source(weight)
    amax = _finite(row_amax(context, weight)).max()
    if scale_2 is None:
        scale_2 = tensor_scale(amax, method)
    if importance is not None:
        check_tensor("importance", importance, torch.float32, (weight.k,))
    packed = torch.empty(weight.n, weight.k // 2, dtype=torch.uint8)
    scales = torch.empty(weight.n, weight.k // codec.BLOCK, dtype=torch.uint8)
    context.quantize_weight(
        w.data_ptr(),
        TYPE_CODES[w.dtype],
        weight.n,
        weight.k,
        packed.data_ptr(),
        0,
        scales.data_ptr(),
        float(scale_2),
        METHOD_CODES[method],
        0 if importance is None else importance.data_ptr(),
    )
    return NVFP4Weight(
        packed,
        scales.view(torch.float8_e4m3fn),
        scale_2.to(torch.float32).reshape(1),
        (weight.n,),
        bias=weight.bias,
    )


def _source(weight: DenseWeight) -> Tensor:
    if weight.weight.device.type != "cpu":
        raise KernelError(f"the cpu backend got a weight on {weight.weight.device}; load the checkpoint on the CPU")
    w = weight.weight.contiguous()
    # A safetensors header may have any length, so a mapped matrix may begin at any address.
    return w if w.data_ptr() % w.element_size() == 0 else w.clone()


def row_amax(context: Any, weight: DenseWeight, codes: Tensor | None = None) -> Tensor:
    """Largest magnitude of each row, fp32 [N], NaN where it holds NaN or Inf.

    Fills `codes`, uint8 [N, K], with E4M3 under amax / 448 where given.
    """
    w = _source(weight)
    amax = torch.empty(weight.n)
    codes_at = 0 if codes is None else codes.data_ptr()
    context.quantize_weight(
        w.data_ptr(), TYPE_CODES[w.dtype], weight.n, weight.k, codes_at, amax.data_ptr(), 0, 0.0, 0, 0
    )
    return amax


def _finite(amax: Tensor) -> Tensor:
    if bool(amax.isnan().any()):
        raise ValueError("cannot quantise weights that hold NaN or Inf")
    return amax
