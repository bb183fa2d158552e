"""Parts of weights stand for the same values, to the bit, as the whole does there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec, mx, slices
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight, fuse

N, K = 96, 128


def nvfp4(seed: int = 0, rows: int = N, first: int = 0) -> NVFP4Weight:
    w = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))
    scale_2 = w.abs().amax() / (6 * 448)
    packed, scale = codec.quantize(w, scale_2)
    bias = torch.arange(first, first + rows, dtype=torch.float32)
    return NVFP4Weight(packed, scale, scale_2.reshape(1), (rows,), 0.01 * (seed + 1), bias)


def fp8(block: tuple[int, int]) -> FP8Weight:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-N // block[0]), -(-K // block[1]), generator=generator) + 0.5
    return FP8Weight(codes, scale, block, 0.5, torch.arange(N, dtype=torch.float32))


def mxfp4() -> mx.MXFP4Weight:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(9))
    return mx.MXFP4Weight(*mx.quantize(w), torch.arange(N, dtype=torch.float32))


WEIGHTS: dict[str, Weight] = {
    "nvfp4": nvfp4(),
    "nvfp4, fused parts of their own scales": fuse([nvfp4(1, 32), nvfp4(2, 64, first=32)]),
    "nvfp4, divisors": replace(nvfp4(3), divisor=torch.tensor([1234.5])),
    "fp8, per tensor": fp8((N, K)),
    "fp8, per row": fp8((1, K)),
    "fp8, in blocks": fp8((32, 32)),
    "mxfp4": mxfp4(),
    "plain": DenseWeight(torch.randn(N, K, dtype=torch.bfloat16), torch.arange(N, dtype=torch.float32)),
}


def values(weight: Weight) -> Tensor:
    return weight.weight if isinstance(weight, DenseWeight) else weight.dequantize()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("runs", [[range(0, 48)], [range(16, 96)], [range(8, 24), range(40, 41), range(64, 96)]])
def test_rows_keep_their_values_scales_and_biases(name: str, runs: list[range]) -> None:
    weight = WEIGHTS[name]
    part = slices.rows(weight, runs)
    kept = [i for run in runs for i in run]
    assert torch.equal(values(part), values(weight)[kept])
    assert part.bias is not None
    assert part.bias.tolist() == kept
    assert getattr(part, "input_scale", None) == getattr(weight, "input_scale", None)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("run", [range(0, 64), range(64, 128), range(32, 96)])
def test_columns_keep_their_values_and_one_part_the_bias(name: str, run: range) -> None:
    weight = WEIGHTS[name]
    for with_bias in (True, False):
        part = slices.columns(weight, run, with_bias)
        assert torch.equal(values(part), values(weight)[:, run.start : run.stop])
        assert (part.bias is not None) is with_bias


def test_columns_of_one_block_are_enough_for_nvfp4_and_its_pre_quant_scale_is_cut_along() -> None:
    weight = replace(nvfp4(), pre_quant_scale=torch.rand(K))
    part = slices.columns(weight, range(16, 32), with_bias=False)
    assert isinstance(part, NVFP4Weight)
    assert torch.equal(values(part), values(weight)[:, 16:32])
    assert part.pre_quant_scale is not None
    assert weight.pre_quant_scale is not None
    assert torch.equal(part.pre_quant_scale, weight.pre_quant_scale[16:32])


@pytest.mark.parametrize(
    ("name", "run"), [("nvfp4", range(0, 24)), ("mxfp4", range(16, 64)), ("fp8, in blocks", range(0, 48))]
)
def test_a_cut_through_a_block_is_refused(name: str, run: range) -> None:
    with pytest.raises(NVFP4ShapeError, match="cut through a block"):
        slices.columns(WEIGHTS[name], run, with_bias=True)


def test_rows_are_views_and_copy_nothing() -> None:
    weight = nvfp4()
    part = slices.rows(weight, [range(32, 64)])
    assert isinstance(part, NVFP4Weight)
    assert part.packed.untyped_storage().data_ptr() == weight.packed.untyped_storage().data_ptr()
    assert slices.rows(weight, [range(N)]) is weight
