"""Tiles and splits by shape: a small fixed table, so that serving never tunes and equal shapes give equal bits.

None of these figures was measured: they follow from counting bytes in flight and blocks per multiprocessor (see
docs/kernel-log.md, "GPU"). `make bench-gpu` is what would change them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_runtime.kernels.triton.layout import PANEL, STEP

# Above this many rows weights are dequantised to bfloat16 and multiplied by cuBLAS: the break-even, in one place.
FUSED_ROWS = 128
_LEAST_PAIRS = 2  # of blocks of STEP inputs per split: fewer, and the loop's start-up is most of it


@dataclass(frozen=True)
class Tiles:
    """rows (of x) and columns (of y) one thread block makes; `splits` of them share K, `blocks` of STEP inputs each."""

    rows: int
    columns: int
    splits: int
    blocks: int
    num_warps: int
    num_stages: int


def tiles(m: int, n: int, k: int, multiprocessors: int, float32: bool = False) -> Tiles:
    """How to multiply x [m, k] by a weight [n, k]; the same answer for every m of a bucket (16, 32, 64).

    float32  of x: no tensor core multiplies it exactly, and wider tiles spill
    """
    rows = 16 if m <= 16 or float32 else 32 if m <= 32 else 64
    columns = 64 if rows < 64 else 128  # x is read again by every block: 64 rows of it weigh more than the weight
    # two stages of two blocks of 2.25 KiB in flight, 23 KiB hide the latency of an H200's memory: 3 thread blocks a
    # multiprocessor at least, 6 to even out the last wave
    wanted = multiprocessors * (6 if rows < 64 else 2)
    programs = -(-n // columns) * (-(-m // rows) if m > 64 or float32 else 1)
    pairs = -(-k // (2 * STEP))  # the loop takes two blocks at a time: splits end where pairs end
    splits = max(1, min(-(-wanted // programs), pairs // _LEAST_PAIRS, 16))
    each = -(-pairs // splits)
    splits = -(-pairs // each)  # every split has work
    if float32:
        return Tiles(rows, columns, splits, 2 * each, 4, 2)
    # two warps: every weight is decoded by one thread, and Hopper multiplies by mma.sync, which waits less than wgmma
    # does when a tile of x is this narrow
    return Tiles(rows, columns, splits, 2 * each, 2 if rows < 64 else 4, 3)


def workspace_values(n: int, k: int, multiprocessors: int, float32: bool = False) -> int:
    """The most FP32 partial sums any m up to FUSED_ROWS needs for this weight."""
    found = 0
    for m in (16, 32, 48, 64, 80, 96, 112, FUSED_ROWS):
        splits = tiles(m, n, k, multiprocessors, float32).splits
        found = max(found, splits * m * n if splits > 1 else 0)
    return found


assert PANEL == 64  # columns are whole panels
