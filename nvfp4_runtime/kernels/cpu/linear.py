"""Linear layers of the native backend: a packed copy of NVFP4 weights, or plain weights read where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.errors import ConfigError, KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_matrix
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight


class NativeLinearNVFP4:
    """An NVFP4 weight in panels of 16 rows; the given tensors are copied and not kept.

    Every product is exact (code values are decoded to FP32) and every output is one fixed chain of FP32 operations:
    16 products are summed, multiplied by their block scale and added to the running sum, then once by weight_scale_2.
    Against the exact result the error before the final rounding is at most (K/16 + 18) * 2^-24 * sum |x w|: 16
    roundings inside a group, K/16 across groups, 2 at the end. With bfloat16 activations the avx512bf16 variant
    multiplies pairs by vdpbf16ps: the same bound, but subnormal activations (below 2^-126) count as zero.

    W4A4 quantises x first, bit for bit as codec.quantize_activation does; its group sums are exact.
    weight_bytes  bytes of the panels
    """

    def __init__(self, native: Any, context: Any, weight: NVFP4Weight, spec: LinearSpec) -> None:
        input_scale = 0.0
        row_scale = weight.row_scale_2().to(torch.float32)
        if spec.numerics == "w4a4":
            if weight.input_scale is None:
                raise ConfigError("w4a4 needs an input_scale and this weight has none; use --numerics w4a16")
            scale = torch.tensor(weight.input_scale, dtype=torch.float32)
            input_scale = float(scale)
            if not input_scale > 0:
                raise KernelError(f"w4a4 needs a positive input_scale, found {input_scale}; calibrate the layer again")
            row_scale = scale * row_scale
        codes = weight.packed.contiguous()
        scales = weight.block_scale.contiguous()
        row_scale = row_scale.contiguous()
        bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
        for tensor, name in (
            (codes, "weight"),
            (scales, "weight_scale"),
            (row_scale, "weight_scale_2"),
            (bias, "bias"),
        ):
            if tensor is not None and tensor.device.type != "cpu":
                raise KernelError(f"the cpu backend got {name} on {tensor.device}; load the checkpoint on the CPU")
        try:
            self.packed = native.PackedNVFP4(
                codes.data_ptr(),
                scales.data_ptr(),
                row_scale.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                weight.n,
                weight.k,
                input_scale,
            )
        except ValueError as e:  # a NaN scale; the message says where
            raise KernelError(str(e)) from e
        self._run = context.linear_nvfp4
        self.n, self.k = weight.n, weight.k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]
        self.weight_bytes: int = self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        self._run(self.packed, x.data_ptr(), self._type, rows, out.data_ptr(), self._out_type)
        return out


class NativeLinearDense:
    """A plain weight, read from the tensor it came in (a tied embedding is not copied).

    Widened to FP32, multiplied and added in FP32: 16 interleaved chains over K, then a fixed tree. With bfloat16 on
    both sides the avx512bf16 variant multiplies pairs by vdpbf16ps: subnormals (below 2^-126) count as zero.
    Error before the final rounding at most (K/16 + 6) * 2^-24 * sum |x w|.
    weight_bytes  bytes of that tensor
    """

    def __init__(self, context: Any, weight: DenseWeight, spec: LinearSpec) -> None:
        self.weight = weight.weight.contiguous()
        if self.weight.device.type != "cpu":
            raise KernelError(f"the cpu backend got a weight on {self.weight.device}; load the checkpoint on the CPU")
        self.bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
        self._run = context.linear_dense
        self.n, self.k = weight.n, weight.k
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._head = (
            self.weight.data_ptr(),
            TYPE_CODES[self.weight.dtype],
            0 if self.bias is None else self.bias.data_ptr(),
        )
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]
        self.weight_bytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        self._run(*self._head, x.data_ptr(), self._type, rows, self.n, self.k, out.data_ptr(), self._out_type)
        return out

    def into(self, x_at: int, rows: int, out_at: int) -> None:
        """The same on addresses that the caller has checked."""
        self._run(*self._head, x_at, self._type, rows, self.n, self.k, out_at, self._out_type)


class NativeLinearFP8:
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
        self.codes = weight.codes.contiguous()
        self.scale = weight.scale.contiguous()
        self.bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
        for tensor, name in ((self.codes, "weight"), (self.scale, "weight_scale"), (self.bias, "bias")):
            if tensor is not None and tensor.device.type != "cpu":
                raise KernelError(f"the cpu backend got {name} on {tensor.device}; load the checkpoint on the CPU")
        self.n, self.k = weight.n, weight.k
        if (place := native.find_nan_e4m3(self.codes.data_ptr(), self.codes.numel())) >= 0:
            raise KernelError(
                f"FP8 weight [{place // self.k}, {place % self.k}] is NaN; expected finite values: "
                "quantise the layer again"
            )
        self._run = context.linear_fp8
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._head = (
            self.codes.data_ptr(),
            self.scale.data_ptr(),
            min(weight.block[0], max(1, self.n)),
            min(weight.block[1], self.k),
            0 if self.bias is None else self.bias.data_ptr(),
        )
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]
        self.weight_bytes: int = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.k)
        rows = x.size(0)
        out = torch.empty((rows, self.n), dtype=self.out_dtype)
        self._run(*self._head, x.data_ptr(), self._type, rows, self.n, self.k, out.data_ptr(), self._out_type)
        return out

    def into(self, x_at: int, rows: int, out_at: int) -> None:
        """The same on addresses that the caller has checked."""
        self._run(*self._head, x_at, self._type, rows, self.n, self.k, out_at, self._out_type)
