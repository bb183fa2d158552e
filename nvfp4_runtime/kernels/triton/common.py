"""Pieces every Triton kernel shares: numbers by their bits, and what Triton's interpreter gets wrong done by hand.

Kernels take a constexpr EMULATED, true under the interpreter. There `tl.dot` on bfloat16 gives garbage, float32 to
bfloat16 truncates, float8 conversions lose NaN and saturation, and inline assembly does not exist. On a GPU the same
source uses the instructions. E4M3 is always read as bytes: sm_80 has no float8 type, and bits are exact everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def emulated() -> bool:
    """Whether kernels run under the interpreter: the value of their EMULATED."""
    return bool(triton.knobs.runtime.interpret)


def as_bytes(tensor: Tensor) -> Tensor:
    """A float8 tensor as the bytes kernels read."""
    return tensor.view(torch.uint8)


@triton.jit
def e4m3_to_float(byte):
    """E4M3 bytes (uint8) as float32, exactly; subnormals, -0 and NaN (0x7f, 0xff) too."""
    bits = byte.to(tl.int32)
    # exponent and mantissa moved to float32's place are the value times 2^-120, subnormals included
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where((bits & 0x80) != 0, -magnitude, magnitude)


@triton.jit
def e2m1_to_float(code):
    """E2M1 codes (int32, 0..15) as float32, exactly; code 8 is -0."""
    magnitude = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return tl.where((code & 8) != 0, -magnitude, magnitude)


@triton.jit
def float_to_bfloat16(x, EMULATED: tl.constexpr):
    """float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    if EMULATED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def round_to(x, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """float32 as `dtype` (bfloat16 or float32), rounded once: for the last line of a kernel."""
    if dtype == tl.bfloat16:
        return float_to_bfloat16(x, EMULATED)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc, EMULATED: tl.constexpr):
    """acc + a b in FP32. Operands are bfloat16 (exact products) or float32, which never becomes TF32."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def float_to_e4m3(x):
    """float32 to E4M3 bytes (uint8): nearest, ties to even, saturating at 448; NaN becomes 0x7f, the sign is kept."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # normal results: the exponent re-biased (127 -> 7) and 20 of 23 mantissa bits rounded away, ties to even
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # below 2^-6 the step is 2^-9: adding 2^14 (whose last bit is 2^-9) rounds to it, ties to even
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude >= 0x43E00000, 0x7E, code)  # 448 and beyond, infinity too
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def float_to_e2m1(y):
    """float32 to E2M1 codes (int32, 0..15): nearest, ties to even, saturating at 6; NaN has magnitude 6, sign kept."""
    bits = y.to(tl.int32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    code = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 7, code)
    return code | ((bits >> 28) & 8)
