"""Linear layers of the native backend whose weights are stored as FP8 or MXFP4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_matrix
from nvfp4_runtime.kernels.cpu.linear import NUMERICS_CODES
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight


class _Native:
    """What both do with a weight once the native side holds it."""

    native: Any

    def __init__(self, context: Any, n: int, k: int, spec: LinearSpec) -> None:
        self._run = context.linear
        self.n, self.k = n, k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]

    def __call__(self, x: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        self._run(self.native, x.data_ptr(), self._type, rows, out.data_ptr(), self._out_type)
        return out


class NativeLinearFP8(_Native):
    """An FP8 weight, read from the tensor it came in, one byte a weight.

    Codes are widened exactly (to FP32, or BF16 pairs in the avx512bf16 variant with bfloat16 activations), products
    are exact or fused into the addition, sums are the chains of `NativeLinearDense`, 16 over K and a tree. Where a row
    has one scale it multiplies the finished sum: before the final rounding the error is at most
    (K/16 + 7) * 2^-24 * sum |x w|. Scales in blocks of K: one such chain per block and lane, multiplied by its scale
    and added to the lane's total, then the tree: (B/16 + K/B + 6) * 2^-24 * sum |x w| for blocks of B.

    Raises KernelError where a code is NaN, naming its place.
    weight_bytes  bytes of codes and scales
    """

    def __init__(self, native: Any, context: Any, weight: FP8Weight, spec: LinearSpec) -> None:
        super().__init__(context, weight.n, weight.k, spec)
        self.codes = _on_cpu("weight", weight.codes)
        self.scale = _on_cpu("weight_scale", weight.scale)
        self.bias = None if weight.bias is None else _on_cpu("bias", weight.bias.to(torch.float32))
        if (place := native.find_nan_e4m3(self.codes.data_ptr(), self.codes.numel())) >= 0:
            raise KernelError(
                f"FP8 weight [{place // self.k}, {place % self.k}] is NaN; expected finite values: "
                "quantise the layer again"
            )
        self.native = native.PlainWeight(
            self.codes.data_ptr(),
            TYPE_CODES[torch.float8_e4m3fn],
            0 if self.bias is None else self.bias.data_ptr(),
            self.n,
            self.k,
        )
        rows, columns = weight.block
        self.native.scale_by(self.scale.data_ptr(), min(rows, max(1, self.n)), min(columns, max(1, self.k)))
        self.weight_bytes: int = self.native.nbytes


class NativeLinearMXFP4(_Native):
    """An MXFP4 weight in the panels of `NativeLinearNVFP4`, each scale standing twice; the given tensors are copied.

    Chain and error bound are those of NativeLinearNVFP4 in W4A16.
    weight_bytes  bytes of the panels
    """

    def __init__(self, context: Any, weight: MXFP4Weight, spec: LinearSpec) -> None:
        super().__init__(context, weight.n, weight.k, spec)
        codes, scales = _on_cpu("weight", weight.packed), _on_cpu("weight_scale", weight.block_scale)
        ones = torch.ones(weight.n)
        bias = None if weight.bias is None else _on_cpu("bias", weight.bias.to(torch.float32))
        self.native = context.pack_nvfp4(
            [(codes.data_ptr(), scales.data_ptr(), weight.n)],
            ones.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            weight.k,
            NUMERICS_CODES["w4a16"],
            0.0,
            True,
        )
        self.weight_bytes: int = self.native.nbytes


def _on_cpu(name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise KernelError(f"the cpu backend got {name} on {tensor.device}; load the checkpoint on the CPU")
    return tensor.contiguous()
