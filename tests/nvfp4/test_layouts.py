"""The 128x4 scale swizzle: a permutation, with its inverse."""

import pytest
import torch

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4.layouts import swizzle_scales, swizzled_offset, swizzled_shape, unswizzle_scales

SHAPES = [(1, 1), (31, 3), (128, 4), (129, 5), (192, 36), (256, 8), (300, 17)]


def numbered(rows: int, cols: int) -> torch.Tensor:
    """Distinct bytes wherever 255 different values allow, none of them the padding's 0."""
    return (torch.arange(rows * cols) % 255 + 1).to(torch.uint8).reshape(rows, cols)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_scale_lies_where_the_offset_formula_says_and_padding_is_zero(rows, cols):
    scales = numbered(rows, cols)
    swizzled = swizzle_scales(scales)
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    expected = torch.zeros(padded_rows * padded_cols, dtype=torch.uint8)
    c4 = padded_cols // 4
    for r in range(rows):
        for c in range(cols):
            # the published formula, written out independently of the implementation
            at = ((r // 128) * c4 + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + (c % 4)
            assert swizzled_offset(r, c, cols) == at
            expected[at] = scales[r, c]
    assert torch.equal(swizzled, expected)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_unswizzle_is_the_inverse(rows, cols):
    scales = numbered(rows, cols).view(torch.float8_e4m3fn)
    back = unswizzle_scales(swizzle_scales(scales), rows, cols)
    assert back.dtype == scales.dtype
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_offsets_of_a_padded_matrix_are_a_permutation():
    offsets = {swizzled_offset(r, c, 8) for r in range(256) for c in range(8)}
    assert offsets == set(range(256 * 8))


def test_wrong_sizes_and_dtypes_are_refused():
    with pytest.raises(NVFP4ShapeError, match="512 elements, found 100"):
        unswizzle_scales(torch.zeros(100, dtype=torch.uint8), 128, 4)
    with pytest.raises(NVFP4ShapeError, match="one-byte dtype"):
        swizzle_scales(torch.zeros(4, 4))
