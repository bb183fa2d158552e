"""Counting over stored bytes: scales by histogram, codes sixteen at a time as 64-bit words, a megabyte in hand.

Everything works on views of mapped files and holds no more than a chunk of its own; NumPy and torch release the
interpreter lock in these loops, so threads use all cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvfp4_runtime.nvfp4.layouts import TILE_COLS, TILE_ROWS, unswizzle_scales

Bytes = NDArray[np.uint8]
Advance = Callable[[int], None]

CHUNK_BYTES = 1 << 20
E4M3_NAN, E4M3_MAX_BYTE, SIGN = 0x7F, 0x7E, 0x80
_MAGNITUDES = np.uint64(0x7777777777777777)
_ONES = np.uint64(0x1111111111111111)
_TOPS = np.uint64(0x8888888888888888)
_STRIPS = 8  # of 128 rows: what the order of scales is judged by

E4M3_VALUES: NDArray[np.float32] = (
    torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
)


@dataclass(frozen=True)
class E4M3Counts:
    """What a tensor of E4M3 bytes holds. `least` and `most` are its smallest and largest positive values."""

    total: int
    nan: int
    negative: int
    zero: int
    at_max: int
    least: float | None
    most: float | None


@dataclass(frozen=True)
class CodeCounts:
    """What the blocks of an NVFP4 tensor hold.

    zero_blocks       blocks without a nonzero code
    full_blocks       blocks that hold a code of magnitude 6
    lost_blocks       scale 0 above nonzero codes: what they held now reads as zero
    top_blocks        blocks whose scale is E4M3's largest, 448
    clipped_blocks    of these, blocks with three or more codes of magnitude 6
    """

    blocks: int
    zero_blocks: int
    full_blocks: int
    lost_blocks: int
    top_blocks: int
    clipped_blocks: int


@dataclass(frozen=True)
class PlainCounts:
    """What a plain tensor holds."""

    total: int
    nonfinite: int
    zero: int


def raw_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a tensor, flat, without a copy where it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def count_e4m3(raw: Bytes, advance: Advance = lambda _: None) -> E4M3Counts:
    """Histogram E4M3 bytes. -0 counts as zero, not as negative: it scales like zero."""
    histogram = np.zeros(256, np.int64)
    for start in range(0, raw.size, CHUNK_BYTES):
        chunk = raw[start : start + CHUNK_BYTES]
        histogram += torch.bincount(torch.from_numpy(chunk), minlength=256).numpy()
        advance(chunk.size)
    nan = int(histogram[E4M3_NAN] + histogram[E4M3_NAN | SIGN])
    zero = int(histogram[0] + histogram[SIGN])
    present = np.flatnonzero(histogram[1:E4M3_NAN]) + 1
    return E4M3Counts(
        total=raw.size,
        nan=nan,
        negative=int(histogram[SIGN + 1 : 255].sum()),
        zero=zero,
        at_max=int(histogram[E4M3_MAX_BYTE]),
        least=float(E4M3_VALUES[present[0]]) if present.size else None,
        most=float(E4M3_VALUES[present[-1]]) if present.size else None,
    )


def count_codes(packed: Bytes, scales: Bytes, group: int, advance: Advance = lambda _: None) -> CodeCounts:
    """Look at every block of `group` codes (16 or 32) beside its E4M3 scale.

    A block is one or two 64-bit words. Masked to magnitudes, a nibble is 7 (code 6) exactly when adding 1 sets its
    top bit, and no nibble carries into the next.
    """
    words_per_block = group // 16
    assert packed.size == scales.size * group // 2, f"{packed.size} bytes of codes, {scales.size} scales of {group}"
    words = packed.view(np.uint64)
    zero = full = lost = top = clipped = 0
    step = CHUNK_BYTES // (8 * words_per_block)
    for start in range(0, scales.size, step):
        scale = scales[start : start + step]
        magnitude = words[start * words_per_block : (start + scale.size) * words_per_block] & _MAGNITUDES
        sixes = np.bitwise_count((magnitude + _ONES) & _TOPS)
        if words_per_block > 1:
            magnitude = np.bitwise_or.reduce(magnitude.reshape(-1, words_per_block), axis=1)
            sixes = sixes.reshape(-1, words_per_block).sum(axis=1)
        nonzero = magnitude != 0
        zero += scale.size - int(np.count_nonzero(nonzero))
        full += int(np.count_nonzero(sixes))
        lost += int(np.count_nonzero(nonzero & ((scale & 0x7F) == 0)))
        at_top = scale == E4M3_MAX_BYTE
        top += int(np.count_nonzero(at_top))
        clipped += int(np.count_nonzero(sixes[at_top] >= 3))
        advance(8 * words_per_block * scale.size)
    return CodeCounts(scales.size, zero, full, lost, top, clipped)


def count_plain(tensor: Tensor, advance: Advance = lambda _: None) -> PlainCounts:
    """Non-finite values and zeros of a BF16, FP16 or FP32 tensor, by its exponent bits."""
    exponent_bits = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80_0000}[tensor.dtype]
    magnitude_bits = (1 << (8 * tensor.element_size() - 1)) - 1
    width: type[np.unsignedinteger[Any]] = np.uint32 if tensor.element_size() == 4 else np.uint16
    raw: NDArray[np.unsignedinteger[Any]] = raw_bytes(tensor).view(width)
    nonfinite = zero = 0
    step = CHUNK_BYTES // tensor.element_size()
    for start in range(0, raw.size, step):
        chunk = raw[start : start + step]
        nonfinite += int(np.count_nonzero((chunk & exponent_bits) == exponent_bits))
        zero += chunk.size - int(np.count_nonzero(chunk & magnitude_bits))
        advance(chunk.nbytes)
    return PlainCounts(raw.size, nonfinite, zero)


@dataclass(frozen=True)
class Order:
    """How much of the scales' variance rows and columns explain, read as stored and read as 128 x 4 tiles.

    Rows and columns of real weights have sizes of their own, so the right reading explains more. 0 is chance.
    """

    as_stored: float
    as_tiles: float


def order_of_scales(scales: Tensor) -> Order | None:
    """Judge the order of E4M3 scales [N, K/16] by their first 1024 rows; None for matrices too small to tell.

    Only whole tiles of 128 rows and 4 columns can be swizzled in place; others would change their shape.
    """
    rows, cols = scales.shape
    if rows % TILE_ROWS or cols % TILE_COLS or cols < 2 * TILE_COLS:
        return None
    strip = scales.view(torch.uint8)[: TILE_ROWS * _STRIPS].contiguous()
    tiled = unswizzle_scales(strip.reshape(-1), strip.shape[0], cols)
    return Order(_explained(strip.numpy()), _explained(tiled.numpy()))


def _explained(raw: Bytes) -> float:
    """The share of log2(scale)'s variance that row and column means explain, adjusted so that chance gives 0."""
    x = _LOG2[raw]
    x = x - x.mean()
    rows, cols = x.shape
    total = float(np.square(x).sum())
    if total == 0:
        return 0.0
    by_rows = float(np.square(x.mean(axis=1)).sum()) * cols
    by_cols = float(np.square(x.mean(axis=0)).sum()) * rows
    chance = (rows + cols - 2) / (rows * cols - 1)
    return float(((by_rows + by_cols) / total - chance) / (1 - chance))


def _log2_of_scales() -> NDArray[np.float32]:
    values = np.nan_to_num(np.abs(E4M3_VALUES), nan=0.0)
    logarithms: NDArray[np.float32] = np.log2(np.maximum(values, np.float32(2.0**-10)))
    return logarithms


_LOG2 = _log2_of_scales()
