"""NVFP4 in plain PyTorch: E2M1 codes, E4M3 block scales, one FP32 tensor scale. This file defines correct.

w = e2m1(code) * e4m3(block_scale) * scale_2, sixteen consecutive values of the last axis sharing a block scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
SCALE_2_DENOMINATOR = E2M1_MAX * E4M3_MAX  # 2688: the tensor's maximum gets block scale 448 and code 6

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Midpoints between neighbours. Ties go to the even code: down at 0.25, 1.25, 2.5 and 5 (so the boundary is the next
# float above), up at 0.75, 1.75 and 3.5.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_BOUNDARIES = tuple(
    float(torch.nextafter(torch.tensor(m), torch.tensor(math.inf))) if i % 2 == 0 else m
    for i, m in enumerate(_MIDPOINTS)
)


def e2m1_table(device: torch.device | None = None) -> Tensor:
    """Values of codes 0..15, float32 [16]; code 8 is -0."""
    positive = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
    return torch.cat([positive, -positive])


def encode_e2m1(y: Tensor) -> Tensor:
    """Round float32 values to E2M1 codes (uint8, 0..15): nearest, ties to even, saturating at 6, sign of zero kept.

    NaN becomes a code of magnitude 6, as the hardware's saturating conversion does; its block scale carries the NaN.
    """
    boundaries = torch.tensor(_BOUNDARIES, dtype=torch.float32, device=y.device)
    magnitude = torch.bucketize(y.abs().contiguous(), boundaries, right=True, out_int32=True)
    return (magnitude | (torch.signbit(y).to(torch.int32) << 3)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes 0..15 (uint8) to their float32 values."""
    return e2m1_table(codes.device)[codes.to(torch.int32)]


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes [..., K] to bytes [..., K/2]: even k in the low nibble, odd k in the high nibble."""
    if codes.shape[-1] % 2:
        raise NVFP4ShapeError(f"cannot pack an odd number of codes ({codes.shape[-1]}); K must be even")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] to codes [..., K]; the inverse of `pack_codes`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def check_k(k: int) -> None:
    """Raise NVFP4ShapeError unless `k` is a positive multiple of the block size."""
    if k <= 0 or k % BLOCK:
        raise NVFP4ShapeError(
            f"the last axis has {k} values; NVFP4 needs a positive multiple of {BLOCK}: pad with zeros, "
            "or leave this layer unquantised"
        )


def _blocks(x: Tensor) -> Tensor:
    """[..., K] as [..., K/16, 16]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def weight_scale_2(amax: Tensor) -> Tensor:
    """The FP32 tensor scale for a largest magnitude `amax` (shared by fused siblings); 0 stays 0."""
    return amax.to(torch.float32) / SCALE_2_DENOMINATOR


def quantize(w: Tensor, scale_2: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to NVFP4 with block scales from each block's maximum, bit for bit as ModelOpt does.

    w         float [N, K]      K a multiple of 16, every value finite
    scale_2   fp32  []          amax / 2688, of this tensor or of its fused group
    returns   uint8 [N, K/2]    even k in the low nibble
              e4m3  [N, K/16]   row-major, never swizzled

    A block of zeros stores scale 1.0. Raises NVFP4ShapeError when K % 16 != 0, ValueError on NaN or Inf.
    Source: the formulas of ModelOpt's exporter (max calibration), in float32.
    """
    check_k(w.shape[-1])
    blocks = _blocks(w.to(torch.float32))
    amax = blocks.abs().amax(dim=-1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("cannot quantise weights that hold NaN or Inf")
    scale_2 = scale_2.to(torch.float32)
    scale = amax / (E2M1_MAX * scale_2)
    scale = torch.where((scale == 0) | (scale_2 == 0), torch.ones_like(scale), scale)
    block_scale = scale.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    return encode_blocks(blocks, block_scale, scale_2), block_scale


def encode_blocks(blocks: Tensor, block_scale: Tensor, scale_2: Tensor) -> Tensor:
    """fp32 [N, K/16, 16] under given scales to packed codes uint8 [N, K/2]; a step of 0 gives codes of 0."""
    step = (block_scale.to(torch.float32) * scale_2).unsqueeze(-1)
    codes = encode_e2m1(torch.where(step == 0, blocks * 0, blocks / step))
    return pack_codes(codes.flatten(-2))


def dequantize(packed: Tensor, block_scale: Tensor, scale_2: Tensor) -> Tensor:
    """NVFP4 back to float32 [N, K]; `scale_2` is a scalar or one value per row [N, 1].

    The two scales are multiplied first, as ModelOpt does, so results agree to the last bit.
    """
    return scale_blocks(packed, block_scale.to(torch.float32) * scale_2.to(torch.float32))


def scale_blocks(packed: Tensor, step: Tensor) -> Tensor:
    """Packed codes [N, K/2] times the step of their block, fp32 [N, K/16]; float32 [N, K]."""
    values = _blocks(decode_e2m1(unpack_codes(packed)))
    return (values * step.unsqueeze(-1)).flatten(-2)


def operand(packed: Tensor, block_scale: Tensor) -> Tensor:
    """code * block scale as bfloat16 [N, K]: always exact (at most 6 significant bits). scale_2 is left out."""
    return dequantize(packed, block_scale, torch.ones((), device=packed.device)).to(torch.bfloat16)


def quantize_activation(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations as the hardware path does: dynamic block scales under a static tensor scale.

    x            float [M, K]
    input_scale  fp32  []          amax / 2688 of the calibrated activations
    returns      uint8 [M, K] codes (not packed), e4m3 [M, K/16]

    With G = 1/input_scale: scale = e4m3(G * (amax * (1/6))), saturating; code = rne(x * 1/(scale * (1/G))).
    Reciprocals are correctly rounded; GPUs use rcp.approx (1 ulp), which moves about 1e-4 of codes, all on ties.
    A block whose scale rounds to 0 gets zero codes. Source: the recipe of vLLM's and FlashInfer's CUDA quantisers.
    """
    check_k(x.shape[-1])
    blocks = _blocks(x.to(torch.float32))
    global_scale = 1.0 / input_scale.to(torch.float32)
    amax = blocks.abs().amax(dim=-1)
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=x.device)
    block_scale = (global_scale * (amax * sixth)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    scale = block_scale.to(torch.float32)
    output_scale = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / (scale * (1.0 / global_scale)))
    codes = encode_e2m1((blocks * output_scale.unsqueeze(-1)).flatten(-2))
    return codes, block_scale


def activation_operand(x: Tensor, input_scale: Tensor) -> Tensor:
    """`quantize_activation` as exact bfloat16 operands code * block scale, [M, K]; input_scale is left out."""
    codes, block_scale = quantize_activation(x, input_scale)
    values = _blocks(decode_e2m1(codes)) * block_scale.to(torch.float32).unsqueeze(-1)
    return values.flatten(-2).to(torch.bfloat16)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of W4A8: signed bytes with one scale per 16 inputs, x ~ code * scale.

    x        float [M, K]
    returns  int8 [M, K] codes, |code| <= 127; fp32 [M, K/16] scales of four significant bits, as E4M3 has

    scale = amax / 127 rounded up to four significant bits, code = rne(x * (1 / scale)): off by half a step, 0.45 % of
    the block's largest value, at most. Such scales times weight block scales are exact, and cost a kernel nothing (see
    docs/numerics.md). A block of at most 2^-100 is zero; one with NaN, infinity, 2^100 or more has a NaN scale.
    """
    check_k(x.shape[-1])
    blocks = _blocks(x.to(torch.float32))
    amax = blocks.abs().amax(dim=-1)
    sound, zero = amax < 2.0**100, amax <= 2.0**-100
    wanted = torch.where(sound & ~zero, amax, torch.ones_like(amax)) / torch.full_like(amax, 127.0)
    scale = ((wanted.view(torch.int32) + 0xFFFFF) & ~0xFFFFF).view(torch.float32)
    inverse = torch.where(sound & ~zero, 1.0 / scale, torch.zeros_like(scale))
    codes = torch.round((blocks * inverse.unsqueeze(-1)).nan_to_num(nan=0.0)).to(torch.int8).flatten(-2)
    scale = torch.where(zero, torch.zeros_like(scale), scale)
    return codes, torch.where(sound, scale, torch.full_like(scale, torch.nan))


def int8_operand(x: Tensor) -> Tensor:
    """`quantize_int8` as values code * scale, fp32 [M, K]."""
    codes, scale = quantize_int8(x)
    return (_blocks(codes.to(torch.float32)) * scale.unsqueeze(-1)).flatten(-2)
