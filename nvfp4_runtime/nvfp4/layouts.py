"""Scale layouts of hardware kernels as pure permutations, each with its inverse. Index arithmetic only."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError

TILE_ROWS = 128
TILE_COLS = 4


def swizzled_shape(rows: int, cols: int) -> tuple[int, int]:
    """Rows padded to 128, columns to 4: what a swizzled scale of [rows, cols] occupies."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-cols // TILE_COLS) * TILE_COLS


def swizzled_offset(row: int, col: int, cols: int) -> int:
    """Where scale (row, col) of a matrix with `cols` columns lies, in elements from the start."""
    tile = (row // TILE_ROWS) * -(-cols // TILE_COLS) + col // TILE_COLS
    return tile * (TILE_ROWS * TILE_COLS) + (row % 32) * 16 + (row % TILE_ROWS) // 32 * 4 + col % TILE_COLS


def swizzle_scales(scales: Tensor) -> Tensor:
    """Block scales [R, C] in the 128x4 layout of Blackwell's block-scaled MMA, padding zero.

    scales   any 1-byte dtype [R, C]      row-major, C = K / 16
    returns  same dtype [R' * C']         R' = R padded to 128, C' = C padded to 4

    Tiles of 128 rows x 4 columns follow each other along a row of tiles; inside a tile, row r and column c sit at
    (r % 32) * 16 + (r // 32) * 4 + c. Source: cuBLASLt's documentation of block-scaling factors; the same layout in
    CUTLASS and torch's SWIZZLE_32_4_4.
    """
    _check(scales)
    rows, cols = scales.shape
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    raw = torch.zeros(padded_rows, padded_cols, dtype=torch.uint8, device=scales.device)
    raw[:rows, :cols] = scales.view(torch.uint8)
    tiles = raw.reshape(padded_rows // TILE_ROWS, 4, 32, padded_cols // TILE_COLS, TILE_COLS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `swizzle_scales`: [rows, cols] row-major, padding dropped."""
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    if swizzled.numel() != padded_rows * padded_cols:
        raise NVFP4ShapeError(
            f"a swizzled scale of [{rows}, {cols}] has {padded_rows * padded_cols} elements, found {swizzled.numel()}"
        )
    tiles = swizzled.view(torch.uint8).reshape(padded_rows // TILE_ROWS, padded_cols // TILE_COLS, 32, 4, TILE_COLS)
    raw = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols)
    return raw[:rows, :cols].contiguous().view(swizzled.dtype)


def _check(scales: Tensor) -> None:
    if scales.dim() != 2 or scales.element_size() != 1 or scales.numel() == 0:
        raise NVFP4ShapeError(
            f"expected block scales [R, C] of a one-byte dtype, found {list(scales.shape)} {scales.dtype}"
        )
