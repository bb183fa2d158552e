"""The table of tiles: every block of K is in exactly one split, and memory reserved at load is enough."""

from __future__ import annotations

import pytest

from nvfp4_runtime.kernels.triton.tuning import FUSED_ROWS, tiles, workspace_values

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (576, 576), (64, 16), (1, 64)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("multiprocessors", [4, 108, 132, 188])
@pytest.mark.parametrize("float32", [False, True])
def test_splits_cover_k_and_none_is_empty(n: int, k: int, multiprocessors: int, float32: bool) -> None:
    blocks = -(-k // 64)
    for m in range(1, FUSED_ROWS + 1):
        how = tiles(m, n, k, multiprocessors, float32)
        each = how.blocks
        assert each % 2 == 0
        assert how.splits >= 1
        assert (how.splits - 1) * each < blocks <= how.splits * each
        assert how.splits == 1 or how.splits * m * n <= workspace_values(n, k, multiprocessors, float32)


def test_small_layers_are_split_so_that_every_multiprocessor_has_work() -> None:
    down = tiles(1, 4096, 14336, 132)
    assert 4096 // down.columns * down.splits >= 132 * 4


def test_rows_of_one_bucket_share_their_tiles() -> None:
    for low, high in ((1, 16), (17, 32), (33, 64)):
        assert len({tiles(m, 4096, 4096, 132) for m in range(low, high + 1)}) == 1
