"""Choosing block scales under a fixed tensor scale: from the maximum, by search, or the better of two. Defines correct.

Every method writes the same format; a reader need not know which was used. `codec.quantize` is "max".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nvfp4_runtime.nvfp4 import codec

BlockMethod = Literal["max", "mse", "4over6"]
BLOCK_METHODS: tuple[BlockMethod, ...] = get_args(BlockMethod)

# "mse" looks at these E4M3 codes around `max`'s, eight per octave. Downwards clips the largest value, and hardly ever
# pays; upwards brings it to 4 (code + 5 on average) or lower. A sweep over all 127 codes finds 0.001 % less error.
SEARCH_FROM, SEARCH_TO = -3, 7
_LEAST, _MOST = 1, 126  # E4M3 codes of 2^-9 and 448

FOUR_OVER_SIX_DENOMINATOR = codec.E2M1_MAX * 256.0  # the largest block may take 4 for its maximum: scale 384, not 448


def tensor_scale(amax: Tensor, method: BlockMethod) -> Tensor:
    """weight_scale_2 for a largest magnitude `amax`: amax / 2688, or amax / 1536 where "4over6" needs head-room."""
    if method == "4over6":
        return amax.to(torch.float32) / FOUR_OVER_SIX_DENOMINATOR
    return codec.weight_scale_2(amax)


def quantize(
    w: Tensor, scale_2: Tensor, method: BlockMethod = "max", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round weights to NVFP4 with block scales chosen by `method`.

    w           float [N, K]      K a multiple of 16, every value finite
    scale_2     fp32  []          see `tensor_scale`
    importance  fp32  [K]         what each input's squared error counts; None: all alike. Not for "max"
    returns     uint8 [N, K/2]    even k in the low nibble
                e4m3  [N, K/16]   row-major, never swizzled

    "mse" tries `max`'s code first, then SEARCH_FROM..SEARCH_TO around it in rising order; "4over6" the scales that
    bring the block's maximum to 6 and to 4. A later candidate wins only by a strictly smaller error. The error is the
    sum of ((|w| - |q|)^2 * importance), each operation rounded to FP32, added by halves of the block: 8, 4, 2, 1.
    Raises NVFP4ShapeError when K % 16 != 0, ValueError on NaN or Inf.
    """
    packed, block_scale = codec.quantize(w, scale_2)
    if method == "max":
        return packed, block_scale
    blocks = _blocks(w.to(torch.float32))
    counts = None if importance is None else _blocks(importance.to(torch.float32))
    scale_2 = scale_2.to(torch.float32)
    best_code = block_scale.view(torch.uint8).to(torch.int32)
    best_packed, best_error = packed, _error(blocks, packed, block_scale, scale_2, counts)
    for code in _candidates(blocks, best_code, scale_2, method):
        scale = code.to(torch.uint8).view(torch.float8_e4m3fn)
        packed = codec.encode_blocks(blocks, scale, scale_2)
        error = _error(blocks, packed, scale, scale_2, counts)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_code = torch.where(better, code, best_code)
        best_packed = torch.where(better.repeat_interleave(codec.BLOCK // 2, dim=-1), packed, best_packed)
    return best_packed, best_code.to(torch.uint8).view(torch.float8_e4m3fn)


def _candidates(blocks: Tensor, max_code: Tensor, scale_2: Tensor, method: BlockMethod) -> list[Tensor]:
    """E4M3 codes [N, K/16] to try after `max`'s, in order."""
    if method == "mse":
        offsets = [o for o in range(SEARCH_FROM, SEARCH_TO + 1) if o != 0]
        return [(max_code + offset).clamp(_LEAST, _MOST) for offset in offsets]
    amax = blocks.abs().amax(dim=-1)
    scale = amax / (4.0 * scale_2)
    scale = torch.where((scale == 0) | (scale_2 == 0), torch.ones_like(scale), scale)
    scale = scale.clamp(codec.E4M3_MIN_SUBNORMAL, codec.E4M3_MAX)
    return [scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)]


def _error(blocks: Tensor, packed: Tensor, scale: Tensor, scale_2: Tensor, counts: Tensor | None) -> Tensor:
    """Squared error of each block, fp32 [N, K/16]."""
    values = _blocks(codec.dequantize(packed, scale, scale_2))
    difference: Tensor = blocks.abs() - values.abs()
    squares = difference * difference
    if counts is not None:
        squares = squares * counts
    for half in (8, 4, 2, 1):
        squares = squares[..., :half] + squares[..., half:]
    return squares.squeeze(-1)


def _blocks(x: Tensor) -> Tensor:
    """[..., K] as [..., K/16, 16]."""
    return x.reshape(*x.shape[:-1], -1, codec.BLOCK)
