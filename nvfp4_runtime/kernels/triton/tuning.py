"""Tiles and splits by shape: a small fixed table, so that serving never tunes and equal shapes give equal bits.

None of these figures was measured: they follow from counting bytes in flight and blocks per multiprocessor (see
docs/kernel-log.md, "GPU"). `make bench-gpu` is what would change them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_runtime.kernels.triton.layout import PANEL, STEP

# Above this many rows weights are dequantised to bfloat16 and multiplied by cuBLAS: the break-even, in one place.
FUSED_ROWS = 128
_LEAST_BLOCKS = 4  # of STEP inputs per split: fewer, and the loop's start-up is most of it


@dataclass(frozen=True)
class Tiles:
    """rows (of x) and columns (of y) one thread block makes, and how many blocks share K."""

    rows: int
    columns: int
    splits: int
    num_warps: int
    num_stages: int


def tiles(m: int, n: int, k: int, multiprocessors: int) -> Tiles:
    """How to multiply x [m, k] by a weight [n, k]; the same answer for every m of a bucket (16, 32, 64)."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    columns = 64 if rows < 64 else 128  # x is read again by every block: 64 rows of it weigh more than the weight
    # 3 stages of 2.25 KiB in flight a block, 23 KiB hide the latency of an H200's memory: 4 blocks a multiprocessor at
    # least, 6 to even out the last wave
    wanted = multiprocessors * (6 if rows < 64 else 2)
    blocks = -(-n // columns) * (-(-m // rows) if m > 64 else 1)
    steps = -(-k // STEP)
    splits = max(1, min(-(-wanted // blocks), steps // _LEAST_BLOCKS, 16))
    splits = -(-steps // -(-steps // splits))  # every split has work
    # two warps: every weight is decoded by one thread, and Hopper multiplies by mma.sync, which waits less than wgmma
    # does when a tile of x is this narrow
    return Tiles(rows, columns, splits, 2 if rows < 64 else 4, 4 if rows < 64 else 3)


def workspace_values(n: int, k: int, multiprocessors: int) -> int:
    """The most FP32 partial sums any m up to FUSED_ROWS needs for this weight."""
    found = 0
    for m in (16, 32, 64, FUSED_ROWS):
        splits = tiles(m, n, k, multiprocessors).splits
        found = max(found, splits * m * n if splits > 1 else 0)
    return found


assert PANEL == 64  # columns are whole panels
