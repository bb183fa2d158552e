"""Linear layers of the native backend: a packed copy of NVFP4 weights, or plain weights read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.errors import ConfigError, KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, aligned, check_bias, check_matrix
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight

NUMERICS_CODES = {"w4a16": 0, "w4a8": 1, "w4a4": 2}  # csrc/packed.h: Numerics


class NativeLinear:
    """What every native linear does once the native side holds its weight."""

    native: Any
    weight_bytes: int

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


def pack_panels(
    context: Any,
    parts: Sequence[tuple[Tensor, Tensor]],
    row_scale: Tensor,
    bias: Tensor | None,
    *,
    numerics: Numerics = "w4a16",
    input_scale: float = 0.0,
    e8m0: bool = False,
) -> Any:
    """The native panels of packed codes [N, K/2] and their block scales, which may lie in several runs of rows.

    KernelError names a NaN scale's place.
    row_scale  fp32 [N], multiplies each sum once
    """
    parts = [(on_cpu("weight", codes), on_cpu("weight_scale", scales)) for codes, scales in parts]
    row_scale = on_cpu("weight_scale_2", row_scale)
    bias = check_bias(bias, row_scale.size(0))
    try:
        return context.pack_nvfp4(
            [(codes.data_ptr(), scales.data_ptr(), codes.size(0)) for codes, scales in parts],
            row_scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            2 * parts[0][0].size(1),
            NUMERICS_CODES[numerics],
            input_scale,
            e8m0,
        )
    except ValueError as e:  # a NaN scale; the message says where
        raise KernelError(str(e)) from e


def on_cpu(name: str, tensor: Tensor) -> Tensor:
    """`aligned`, or KernelError where the tensor is elsewhere."""
    if tensor.device.type != "cpu":
        raise KernelError(f"the cpu backend got {name} on {tensor.device}; load the checkpoint on the CPU")
    return aligned(tensor)


class NativeLinearNVFP4(NativeLinear):
    """An NVFP4 weight in panels of 16 rows; the given tensors are copied and not kept.

    Every output is one fixed chain of operations: 16 products are summed, multiplied by their scales and added to the
    FP32 total; the total is multiplied once by weight_scale_2 (W4A4: and input_scale). Against the exact result of the
    operands below, the error before the final rounding is at most (K/16 + 18) * 2^-24 * sum |x w|: K/16 roundings
    across groups, 2 at the end, and inside a group at most 16, or none where it is summed in integers.

    W4A16  what x becomes depends on the ISA variant (CPUBackend.describe names it). "bfloat16 pairs" and "float32" are
           x itself (vdpbf16ps takes subnormals, below 2^-126, for zero). "two int8 digits" rounds x to 1/32512 of the
           largest of its block of 16: off by 1.5e-5 of that largest at most, where bfloat16 itself keeps 2e-3 to 4e-3
           of each value. float32 activations are never rounded.
    W4A8   x is rounded to 1/127 of the largest of its block of 16: codec.quantize_int8. Group sums are exact.
    W4A4   x is quantised first, bit for bit as codec.quantize_activation does. Group sums are exact.
    weight_bytes  bytes of the panels
    """

    def __init__(self, context: Any, weight: NVFP4Weight, spec: LinearSpec) -> None:
        super().__init__(context, weight.n, weight.k, spec)
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
        self.native = pack_panels(
            context,
            weight.parts,
            row_scale,
            weight.bias,
            numerics=spec.numerics or "w4a16",
            input_scale=input_scale,
        )
        self.weight_bytes = self.native.nbytes


class NativeLinearDense(NativeLinear):
    """A plain weight, read from the tensor it came in (a tied embedding is not copied).

    Widened to FP32, multiplied and added in FP32: 16 interleaved chains over K, then a fixed tree. With bfloat16 on
    both sides the avx512bf16 variant multiplies pairs by vdpbf16ps: subnormals (below 2^-126) count as zero.
    Error before the final rounding at most (K/16 + 6) * 2^-24 * sum |x w|.
    weight_bytes  bytes of that tensor
    """

    def __init__(self, native: Any, context: Any, weight: DenseWeight, spec: LinearSpec) -> None:
        super().__init__(context, weight.n, weight.k, spec)
        self.weight = on_cpu("weight", weight.weight)
        self.bias = check_bias(weight.bias, weight.n)
        self.native = native.PlainWeight(
            self.weight.data_ptr(),
            TYPE_CODES[self.weight.dtype],
            0 if self.bias is None else self.bias.data_ptr(),
            weight.n,
            weight.k,
        )
        self.weight_bytes = self.weight.nbytes
