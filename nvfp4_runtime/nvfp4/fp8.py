"""FP8 weights: E4M3 codes under FP32 scales, one per tensor, per output row, or per block of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4.codec import E4M3_MAX

_CHUNK_VALUES = 1 << 22  # weights quantised at a time: 16 MB in float32


@dataclass(frozen=True)
class FP8Weight:
    """E4M3 codes [N, K] and their scales: w[n, k] = code[n, k] * scale[n // block[0], k // block[1]].

    codes        e4m3 [N, K]
    scale        fp32 [ceil(N / block[0]), ceil(K / block[1])]; multiplies
    block        rows and columns under one scale: (N, K) per tensor, (1, K) per row, (128, 128) and the like;
                 the last row and column of blocks may be cut short
    input_scale  amax / 448 of the layer's input, or None. Kept for W8A8 backends; W8A16 does not use it
    bias         [N] or None
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]
    input_scale: float | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.float8_e4m3fn or self.codes.dim() != 2:
            raise NVFP4ShapeError(
                f"expected a float8_e4m3fn matrix of FP8 codes, found {self.codes.dtype} {list(self.codes.shape)}"
            )
        if min(self.block) < 1:
            raise NVFP4ShapeError(f"a block of FP8 weights has at least 1 row and 1 column, found {self.block}")
        wanted = tuple(-(-size // step) for size, step in zip(self.codes.shape, self.block, strict=True))
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) != wanted:
            raise NVFP4ShapeError(
                f"FP8 codes [{self.n}, {self.k}] in blocks of {self.block[0]} x {self.block[1]} need float32 scales "
                f"{list(wanted)}, found {self.scale.dtype} {list(self.scale.shape)}"
            )

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def format(self) -> Literal["fp8"]:
        return "fp8"

    @property
    def scales_rows(self) -> bool:
        """Whether a row has one scale: it can multiply the finished sum."""
        return self.block[1] >= self.k

    def spread_scale(self) -> Tensor:
        """The scale of every value, fp32 [N, K] (or [N, 1] where a row has one)."""
        rows = self.scale.repeat_interleave(self.block[0], dim=0)[: self.n]
        return rows if self.scales_rows else rows.repeat_interleave(self.block[1], dim=1)[:, : self.k]

    def dequantize(self) -> Tensor:
        """The weight in float32 [N, K]: one rounding per value."""
        return self.codes.to(torch.float32) * self.spread_scale()


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float matrix to E4M3 with one scale per row.

    weight   float [N, K]   every value finite
    returns  e4m3 [N, K]    rne(w / scale), saturating at 448
             fp32 [N, 1]    amax(|row|) / 448; 1 for a row of zeros

    Raises ValueError on NaN or Inf.
    """
    codes, scales = [], []
    for rows in torch.split(weight, max(1, _CHUNK_VALUES // max(1, weight.shape[1]))):
        values = rows.to(torch.float32)
        amax = values.abs().amax(dim=1, keepdim=True)
        if not bool(torch.isfinite(amax).all()):
            raise ValueError("cannot quantise weights that hold NaN or Inf")
        scale = amax / E4M3_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes.append((values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8))
        scales.append(scale)
    return torch.cat(codes).view(torch.float8_e4m3fn), torch.cat(scales)


def can_fuse(parts: Sequence[FP8Weight]) -> bool:
    """Whether the parts' rows can be joined into one FP8Weight: one K, one input_scale or none, scales that agree.

    Scales per tensor and per row become scales per row; blocks join where each part but the last ends with a block.
    """
    if len({p.k for p in parts}) != 1 or len({p.input_scale is None for p in parts}) != 1:
        return False
    if all(p.scales_rows for p in parts):
        return True
    return len({p.block for p in parts}) == 1 and all(p.n % p.block[0] == 0 for p in parts[:-1])


def fuse(parts: Sequence[FP8Weight], bias: Tensor | None) -> FP8Weight:
    """The joined rows of parts for which `can_fuse` holds; the largest input_scale serves them all."""
    by_row = all(p.scales_rows for p in parts)
    input_scales = [p.input_scale for p in parts if p.input_scale is not None]
    return FP8Weight(
        # cat is not implemented for float8 everywhere; bytes are bytes
        codes=torch.cat([p.codes.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        scale=torch.cat([p.spread_scale() if by_row else p.scale for p in parts]),
        block=(1, parts[0].k) if by_row else parts[0].block,
        input_scale=max(input_scales) if input_scales else None,
        bias=bias,
    )
