"""MXFP4 in plain PyTorch: E2M1 codes, one E8M0 scale (a power of two) per 32 consecutive values of the last axis.

w = e2m1(code) * 2^(scale - 127). Source: OCP Microscaling Formats v1.0; a scale byte of 255 is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec

BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255
_E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2^2


def decode_e8m0(scale: Tensor) -> Tensor:
    """Scale bytes (uint8) to their float32 values 2^(byte - 127), exactly; 0 is the subnormal 2^-127, 255 is NaN."""
    exponent = scale.to(torch.int32)
    bits = torch.where(exponent == 0, torch.full_like(exponent, 1 << 22), exponent << 23)
    value = bits.view(torch.float32)
    return torch.where(exponent == E8M0_NAN, torch.full_like(value, torch.nan), value)


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to MXFP4 by the specification's rule: scale 2^(floor(log2(amax)) - 2), values saturate at 6.

    w        float [N, K]      K a multiple of 32, every value finite
    returns  uint8 [N, K/2]    even k in the low nibble
             uint8 [N, K/32]   E8M0; a block of zeros stores 0 (2^-127)

    Raises NVFP4ShapeError when K % 32 != 0, ValueError on NaN or Inf.
    """
    check_k(w.shape[-1])
    blocks = w.to(torch.float32).reshape(*w.shape[:-1], w.shape[-1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=-1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("cannot quantise weights that hold NaN or Inf")
    exponent = torch.frexp(amax).exponent - 1  # amax = m * 2^exponent with 1 <= m < 2
    scale = (exponent - _E2M1_MAX_EXPONENT + E8M0_BIAS).clamp(0, E8M0_NAN - 1)
    scale = torch.where(amax == 0, torch.zeros_like(scale), scale).to(torch.uint8)
    codes = codec.encode_e2m1((blocks.double() / decode_e8m0(scale).double().unsqueeze(-1)).to(torch.float32))
    return codec.pack_codes(codes.flatten(-2)), scale


def check_k(k: int) -> None:
    """Raise NVFP4ShapeError unless `k` is a positive multiple of the block size."""
    if k <= 0 or k % BLOCK:
        raise NVFP4ShapeError(
            f"the last axis has {k} values; MXFP4 needs a positive multiple of {BLOCK}: pad with zeros, "
            "or leave this layer unquantised"
        )


@dataclass(frozen=True)
class MXFP4Weight:
    """A packed MXFP4 weight.

    packed       uint8 [N, K/2]    even k in the low nibble
    block_scale  uint8 [N, K/32]   E8M0, none of them NaN (255): construction checks it
    bias         [N] or None
    """

    packed: Tensor
    block_scale: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_k(self.k)
        if self.packed.dtype != torch.uint8 or self.block_scale.dtype != torch.uint8:
            raise NVFP4ShapeError(
                f"expected uint8 codes and uint8 E8M0 scales, found {self.packed.dtype} and {self.block_scale.dtype}"
            )
        if tuple(self.block_scale.shape) != (self.n, self.k // BLOCK):
            raise NVFP4ShapeError(
                f"codes [{self.n}, {self.k // 2}] need block scales [{self.n}, {self.k // BLOCK}], "
                f"found {list(self.block_scale.shape)}"
            )
        if bool((self.block_scale == E8M0_NAN).any()):
            row, column = (self.block_scale == E8M0_NAN).nonzero()[0].tolist()
            raise NVFP4ShapeError(
                f"block scale [{row}, {column}] is 255, which is NaN in E8M0; expected 0 to 254: "
                "quantise the layer again"
            )

    @property
    def n(self) -> int:
        return self.packed.shape[0]

    @property
    def k(self) -> int:
        return self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.block_scale.nbytes

    @property
    def format(self) -> Literal["mxfp4"]:
        return "mxfp4"

    def dequantize(self) -> Tensor:
        """The weight in float32 [N, K]: exact wherever float32 can hold it (beyond 2^127 it is infinite)."""
        values = codec.decode_e2m1(codec.unpack_codes(self.packed)).view(self.n, -1, BLOCK)
        return (values * decode_e8m0(self.block_scale).unsqueeze(-1)).flatten(-2)
