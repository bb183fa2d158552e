"""How Triton's GEMM kernels keep weights: panels of 64 rows, 16-bit words that decode two at a time without shuffles.

A word of a four-bit weight holds four codes, one of each of four groups: word w (0..15) of block b holds inputs
64 b + 16 i + w, i = 0..3. The four "planes" i are then plain matrices [64, 16], one block scale a row, that meet 16
consecutive inputs each. Neighbouring words are neighbouring inputs, so a register with two words becomes, by one mask,
the register with two bfloat16 that the tensor core wants. The bits of a code c = s e e m lie where the mask finds them:

    plane 0   s........ eem at bits 15 and 8..6     as bfloat16 has them: (-1)^s * value * 2^-126, the word itself
    plane 1   bits 12 and 5..3                      the word shifted left by 3
    plane 2   bits 9 and 2..0                       by 6
    plane 3   the rest: s 14, e 13, em 11..10       three pieces

Scales become bytes with five exponent and three mantissa bits, so that bfloat16 bits are (byte << 4) + a constant:
E4M3's subnormals are normalised, a block under scale 0 gets codes 0, one under a negative scale the opposite signs.
E8M0 scales (MXFP4) are first divided by the largest of their row. All of it is exact, in plain PyTorch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.nvfp4 import codec, mx
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

PANEL = 64  # rows
STEP = 64  # inputs of one block: 16 words of four codes, or 32 words of two FP8 codes
_ROWS_AT_A_TIME = 1024  # repacked at once: bounds what loading needs beside the weight

# bfloat16 bits of a scale are (byte << 4) + base, code bits are value * 2^-126; multiplied: value * scale * factor.
NVFP4_BASE = 235 << 7  # byte 8 * (e + 10) + mantissa for e = -9..8: exponent field 245 + e, which is 2^(118 + e)
NVFP4_FACTOR = 2.0**-8
MXFP4_BASE = 222 << 7  # byte 8 * (31 + e - largest e of the row): field 253 for the largest, which is 2^126
_MXFP4_OCTAVES = 31


@dataclass(frozen=True)
class Panels:
    """A repacked weight [N, K].

    words      int16 [P, B, 64, 16]   four-bit codes, or [P, B, 64, 32] of FP8; P panels, B blocks, zeros as padding
    scales     int32 [P, B, 64]       four scale bytes, of planes 0..3 from the lowest; FP8 has none
    row_scale  fp32  [N]              multiplies each finished sum, `factor` divided out
    base       bfloat16 bits of scale byte 0
    """

    n: int
    k: int
    words: Tensor
    scales: Tensor | None
    row_scale: Tensor
    base: int

    @property
    def blocks(self) -> int:
        return self.words.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.row_scale.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack_nvfp4(weight: NVFP4Weight) -> Panels:
    """An NVFP4 weight's panels; KernelError names the place of a NaN scale."""
    words, scales, at = [], [], 0
    for packed, block_scale in weight.parts:
        _refuse_nan("weight_scale", block_scale.view(torch.uint8), at)
        at += packed.shape[0]
    packed_parts = [packed for packed, _ in weight.parts]
    scale_parts = [scale.view(torch.uint8) for _, scale in weight.parts]
    table = _scale_bytes(packed_parts[0].device)
    for start in range(0, weight.n, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, weight.n)
        codes = codec.unpack_codes(_rows(packed_parts, start, stop))
        raw = _rows(scale_parts, start, stop)
        codes = codes ^ ((raw & 0x80) >> 4).repeat_interleave(codec.BLOCK, dim=1)
        codes = torch.where((raw & 0x7F) == 0, 0, 1).repeat_interleave(codec.BLOCK, dim=1).to(torch.uint8) * codes
        piece = _four_bit_words(codes, table[(raw & 0x7F).to(torch.int64)])
        words.append(piece[0])
        scales.append(piece[1])
    row_scale = weight.row_scale_2().to(torch.float32) / NVFP4_FACTOR
    return Panels(weight.n, weight.k, torch.cat(words), torch.cat(scales), row_scale, NVFP4_BASE)


def pack_mxfp4(weight: MXFP4Weight) -> Panels | None:
    """An MXFP4 weight's panels; None where the scales of a row span more than 2^30, which five bits cannot hold."""
    words, scales, multipliers = [], [], []
    for start in range(0, weight.n, _ROWS_AT_A_TIME):
        codes = codec.unpack_codes(weight.packed[start : start + _ROWS_AT_A_TIME])
        exponent = weight.block_scale[start : start + _ROWS_AT_A_TIME].to(torch.int32)
        used = (codes & 7).view(codes.shape[0], -1, 32).amax(dim=2) > 0
        largest = torch.where(used, exponent, 0).amax(dim=1, keepdim=True)
        byte = torch.where(used, _MXFP4_OCTAVES + exponent - largest, 0)
        if bool((used & (byte < 1)).any()):
            return None
        piece = _four_bit_words(codes, (byte * 8).to(torch.uint8).repeat_interleave(2, dim=1))
        words.append(piece[0])
        scales.append(piece[1])
        multipliers.append(mx.decode_e8m0(largest.flatten()))
    return Panels(weight.n, weight.k, torch.cat(words), torch.cat(scales), torch.cat(multipliers), MXFP4_BASE)


def pack_fp8(weight: FP8Weight) -> Panels:
    """An FP8 weight's panels: word w (0..31) of block b holds inputs 64 b + w (low byte) and 64 b + 32 + w.

    row_scale is 1 where scales change along K: see `block_scales`. KernelError names the place of a NaN.
    """
    codes = weight.codes.view(torch.uint8)
    _refuse_nan("FP8 weight", codes, 0)
    words = []
    for start in range(0, weight.n, _ROWS_AT_A_TIME):
        planes = _blocks(codes[start : start + _ROWS_AT_A_TIME], 2).to(torch.int32)  # [P, B, 64, 2, 32]
        words.append((planes[..., 0, :] | (planes[..., 1, :] << 8)).to(torch.int16))
    row_scale = weight.spread_scale().flatten() if weight.scales_rows else torch.ones_like(weight.scale[0, :1])
    return Panels(weight.n, weight.k, torch.cat(words), None, row_scale.expand(weight.n).contiguous(), 0)


def block_scales(weight: FP8Weight) -> Tensor:
    """FP8 scales that change along K, spread over rows: fp32 [ceil(K / block), N], so that rows are neighbours."""
    return weight.scale.repeat_interleave(weight.block[0], dim=0)[: weight.n].t().contiguous()


def _blocks(values: Tensor, planes: int) -> Tensor:
    """[n, K] padded with zeros and cut: [P, B, 64, planes, 64 / planes]."""
    n, k = values.shape
    padded = torch.nn.functional.pad(values, (0, -k % STEP, 0, -n % PANEL))
    cut = padded.view(-1, PANEL, padded.shape[1] // STEP, planes, STEP // planes)
    return cut.permute(0, 2, 1, 3, 4).contiguous()


def _four_bit_words(codes: Tensor, scale_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, K] codes and [n, K/16] bytes as words and scales of `Panels`."""
    c = _blocks(codes, 4).to(torch.int32)
    sign, magnitude = c >> 3, c & 7
    words = (sign[..., 0, :] << 15) | (magnitude[..., 0, :] << 6)
    words |= (sign[..., 1, :] << 12) | (magnitude[..., 1, :] << 3)
    words |= (sign[..., 2, :] << 9) | magnitude[..., 2, :]
    last = magnitude[..., 3, :]
    words |= (sign[..., 3, :] << 14) | ((last >> 2) << 13) | ((last & 3) << 10)
    spread = torch.nn.functional.pad(scale_bytes, (0, -scale_bytes.shape[1] % 4, 0, -scale_bytes.shape[0] % PANEL))
    bytes_of_block = spread.view(-1, PANEL, spread.shape[1] // 4, 4).permute(0, 2, 1, 3).contiguous()
    return words.to(torch.int16), bytes_of_block.view(torch.int32).squeeze(-1)


def _scale_bytes(device: torch.device) -> Tensor:
    """E4M3 magnitudes 0..126 -> scale bytes, uint8 [127]: 8 * (e + 10) + mantissa for mantissa.. * 2^e, 0 for 0."""
    exponents, mantissas = [], []
    for byte in range(127):
        exponent, mantissa = (byte >> 3) - 7, byte & 7
        if byte < 8:  # a subnormal: mantissa * 2^-9
            top = max(mantissa.bit_length(), 1) - 1
            exponent, mantissa = top - 9, (mantissa << (3 - top)) & 7
        exponents.append(exponent + 10 if byte else 0)
        mantissas.append(mantissa)
    table = [8 * e + m for e, m in zip(exponents, mantissas, strict=True)]
    return torch.tensor(table, dtype=torch.uint8, device=device)


def _rows(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start..stop of tensors that lie one after the other."""
    found, low = [], 0
    for part in parts:
        high = low + part.shape[0]
        if start < high and stop > low:
            found.append(part[max(start - low, 0) : stop - low])
        low = high
    return found[0] if len(found) == 1 else torch.cat(found)


def _refuse_nan(what: str, e4m3_bytes: Tensor, first_row: int) -> None:
    nan = (e4m3_bytes & 0x7F) == 0x7F
    if bool(nan.any()):
        row, column = nan.nonzero()[0].tolist()
        raise KernelError(
            f"{what} [{row + first_row}, {column}] is NaN; expected finite values: quantise the layer again"
        )
