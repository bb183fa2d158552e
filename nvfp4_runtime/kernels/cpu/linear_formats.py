"""Linear layers of the native backend whose weights are stored as FP8 or MXFP4."""

from __future__ import annotations

from typing import Any

import torch

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_bias
from nvfp4_runtime.kernels.cpu.linear import NativeLinear, on_cpu, pack_panels
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight


class NativeLinearFP8(NativeLinear):
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
        self.codes = on_cpu("weight", weight.codes)
        self.scale = on_cpu("weight_scale", weight.scale)
        self.bias = check_bias(weight.bias, weight.n)
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
        self.weight_bytes = self.native.nbytes


class NativeLinearMXFP4(NativeLinear):
    """An MXFP4 weight in the panels of `NativeLinearNVFP4`, each scale standing twice; the given tensors are copied.

    Chain and error bound are those of NativeLinearNVFP4 in W4A16.
    weight_bytes  bytes of the panels
    """

    def __init__(self, context: Any, weight: MXFP4Weight, spec: LinearSpec) -> None:
        super().__init__(context, weight.n, weight.k, spec)
        ones = torch.ones(weight.n)
        self.native = pack_panels(context, [(weight.packed, weight.block_scale)], ones, weight.bias, e8m0=True)
        self.weight_bytes = self.native.nbytes
