"""E2M1 and E4M3 as operands of a multiplication, and whole blocks of NVFP4: what common.py's bits are put together to.

Exact everywhere: the results are those of nvfp4/codec.py, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvfp4_runtime.kernels.triton.common import e2m1_to_float, e4m3_to_float, float_to_e2m1, float_to_e4m3


def has_e4m3(device: torch.device) -> bool:
    """The device converts float32 to E4M3 itself (compute capability 8.9 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def e4m3_bytes(x, HARDWARE_E4M3: tl.constexpr):
    """`float_to_e4m3`, by the conversion instruction where there is one; it drops the sign of a NaN."""
    if HARDWARE_E4M3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return float_to_e4m3(x)


@triton.jit
def e4m3_operand(byte, dtype: tl.constexpr, HARDWARE_E4M3: tl.constexpr, EMULATED: tl.constexpr):
    """Bytes of E4M3 as `dtype` (float16 or float32), exactly; NaN too."""
    if EMULATED or dtype == tl.float32:
        return e4m3_to_float(byte).to(dtype)
    elif HARDWARE_E4M3:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # the bits as a float16 are 2^8 too small, subnormals included; its products keep subnormals
        wide = byte.to(tl.int16)
        value = (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)
        value *= tl.full([], 256.0, tl.float16)
        return tl.where((wide & 0x7F) == 0x7F, tl.full([], float("nan"), tl.float16), value)


@triton.jit
def e2m1_operand(code, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """Codes 0..15 of E2M1, times 2^-14, as `dtype` (float16 or float32), exactly.

    So small they are a float16's bits as they stand. A product with an E4M3 scale is a multiple of 2^-24, float16's
    smallest step, and has at most 6 significant bits: exact as well.
    """
    if EMULATED or dtype == tl.float32:
        return (e2m1_to_float(code.to(tl.int32)) * 6.103515625e-05).to(dtype)
    else:
        wide = code.to(tl.int16)
        return (((wide & 7) << 9) | ((wide & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def quantize_blocks(blocks, scale):
    """codec.quantize_activation on float32 `blocks` [.., 16] under the tensor scale `scale` (fp32, a scalar).

    Returns codes int32 [.., 16] and the bytes of the E4M3 block scales, uint8 [..].
    """
    global_scale = tl.div_rn(1.0, scale)
    # the largest magnitude as integers: exact, and a NaN is the largest of all
    magnitudes = blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitudes, axis=-1).to(tl.float32, bitcast=True)
    stored = float_to_e4m3(global_scale * (amax * 0.16666667163372040))  # 1/6 as a float32
    step = e4m3_to_float(stored)
    inverse = tl.where(step == 0.0, 0.0, tl.div_rn(1.0, step * tl.div_rn(1.0, global_scale)))
    return float_to_e2m1(blocks * tl.expand_dims(inverse, -1)), stored
