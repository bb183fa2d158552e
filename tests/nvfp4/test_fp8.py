"""FP8 weights: shapes, scales per tensor, row and block, quantising by row, fusing."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, can_fuse, fuse


def make(n: int, k: int, block: tuple[int, int], seed: int = 0, input_scale: float | None = None) -> FP8Weight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, k, generator=g).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=g) + 0.01
    return FP8Weight(codes, scale, block, input_scale)


@pytest.mark.parametrize("block", [(40, 96), (1, 96), (16, 96), (1, 32), (128, 128), (16, 32), (7, 10)])
def test_every_value_is_its_code_times_the_scale_of_its_block(block: tuple[int, int]) -> None:
    weight = make(40, 96, block)
    values = weight.dequantize()
    for n, k in [(0, 0), (39, 95), (17, 33), (6, 9), (7, 10), (15, 31), (16, 32)]:
        scale = weight.scale[n // block[0], k // block[1]]
        assert values[n, k] == weight.codes.float()[n, k] * scale
    assert weight.nbytes == 40 * 96 + weight.scale.numel() * 4


def test_quantised_rows_are_the_nearest_codes_under_a_scale_per_row() -> None:
    w = torch.randn(30, 100, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 30)[:, None]
    w[3] = 0
    codes, scale = fp8.quantize_rows(w)
    assert torch.equal(codes[3].float(), torch.zeros(100))
    assert scale[3] == 1
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = torch.cat([-values.flip(0), values])
    for row in (0, 7, 29):
        assert float(codes[row].float().abs().max()) == 448
        nearest = (w[row] / scale[row]).unsqueeze(1).sub(grid).abs().amin(dim=1)
        assert torch.equal((w[row] / scale[row] - codes[row].float()).abs(), nearest)


def test_rows_are_quantised_alike_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    whole = fp8.quantize_rows(w)
    monkeypatch.setattr(fp8, "_CHUNK_VALUES", 64 * 7)
    pieces = fp8.quantize_rows(w)
    assert torch.equal(whole[0].view(torch.uint8), pieces[0].view(torch.uint8))
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_quantised(bad: float) -> None:
    w = torch.ones(4, 32)
    w[2, 5] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        fp8.quantize_rows(w)


@pytest.mark.parametrize("blocks", [[(40, 64), (24, 64)], [(1, 64), (24, 64)], [(8, 32), (8, 32)]])
def test_fused_parts_dequantise_to_the_same_rows(blocks: list[tuple[int, int]]) -> None:
    parts = [make(n, 64, block, n, 0.1 * n) for n, block in zip((40, 24), blocks, strict=True)]
    whole = fuse(parts)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))  # type: ignore[union-attr]  # FP8
    assert whole.input_scale == pytest.approx(4.0)  # type: ignore[union-attr]  # FP8


def test_parts_that_cannot_share_scales_stay_apart() -> None:
    assert not can_fuse([make(12, 64, (8, 32)), make(8, 64, (8, 32))])  # the first ends inside a block
    assert not can_fuse([make(8, 64, (8, 32)), make(8, 64, (1, 64))])
    assert not can_fuse([make(8, 64, (1, 64)), make(8, 32, (1, 32))])
    assert not can_fuse([make(8, 64, (1, 64), input_scale=0.1), make(8, 64, (1, 64))])
    assert not can_fuse([make(8, 64, (1, 64)), DenseWeight(torch.zeros(8, 64))])


@pytest.mark.parametrize(
    ("codes", "scale", "block", "message"),
    [
        (torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), (1, 32), "expected a float8_e4m3fn matrix"),
        (torch.zeros(4, dtype=torch.float8_e4m3fn), torch.ones(4, 1), (1, 32), "expected a float8_e4m3fn matrix"),
        (torch.zeros(4, 32, dtype=torch.float8_e4m3fn), torch.ones(4), (1, 32), r"need float32 scales \[4, 1\]"),
        (torch.zeros(4, 32, dtype=torch.float8_e4m3fn), torch.ones(4, 2), (1, 32), r"need float32 scales \[4, 1\]"),
        (torch.zeros(4, 32, dtype=torch.float8_e4m3fn), torch.ones(4, 1).half(), (1, 32), "found torch.float16"),
        (torch.zeros(4, 32, dtype=torch.float8_e4m3fn), torch.ones(4, 1), (0, 32), "at least 1 row"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], message: str
) -> None:
    with pytest.raises(NVFP4ShapeError, match=message):
        FP8Weight(codes, scale, block)
