"""The canonical weights: shape checks, dequantising, and fusing by rows."""

import pytest
import torch

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, can_fuse, fuse


def packed_weight(n: int, k: int, seed: int, input_scale: float | None = None, bias: bool = False) -> NVFP4Weight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
    scale_2 = codec.weight_scale_2(w.abs().max())
    packed, scale = codec.quantize(w, scale_2)
    return NVFP4Weight(packed, scale, scale_2.reshape(1), (n,), input_scale, torch.arange(n).float() if bias else None)


def test_fused_parts_keep_their_own_scale_and_dequantise_to_the_same_rows():
    parts = [packed_weight(32, 64, 0, 0.1), packed_weight(16, 64, 1, 0.3), packed_weight(16, 64, 2, 0.2)]
    whole = fuse(parts)
    assert isinstance(whole, NVFP4Weight)
    assert whole.group_rows == (32, 16, 16)
    assert len(set(whole.weight_scale_2.tolist())) == 3
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert whole.input_scale == 0.3


def test_operand_times_row_scale_is_the_weight():
    weight = packed_weight(16, 32, 3)
    # dequantise rounds scale * scale_2 first: one rounding apart, so within 2 float32 ulps
    torch.testing.assert_close(
        weight.operand().float() * weight.row_scale_2()[:, None], weight.dequantize(), rtol=2**-22, atol=0
    )


def test_a_missing_bias_is_zero_in_the_fused_bias():
    whole = fuse([packed_weight(16, 32, 0, bias=True), packed_weight(8, 32, 1)])
    assert whole.bias is not None
    assert whole.bias.tolist() == [*map(float, range(16)), *[0.0] * 8]


def test_formats_widths_and_input_scales_that_differ_do_not_fuse():
    dense = DenseWeight(torch.zeros(4, 64, dtype=torch.bfloat16))
    assert not can_fuse([packed_weight(16, 64, 0), dense])
    assert not can_fuse([packed_weight(16, 64, 0), packed_weight(16, 32, 0)])
    assert not can_fuse([packed_weight(16, 64, 0, 0.1), packed_weight(16, 64, 1)])
    with pytest.raises(NVFP4ShapeError, match=r"nvfp4\[16, 64\], bf16\[4, 64\]"):
        fuse([packed_weight(16, 64, 0), dense])


def test_dense_parts_fuse_by_rows():
    parts = [DenseWeight(torch.full((n, 8), float(n))) for n in (2, 3)]
    whole = fuse(parts)
    assert isinstance(whole, DenseWeight)
    assert whole.format == "fp32"
    assert whole.weight[:, 0].tolist() == [2.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("packed", "scale", "scale_2", "rows", "message"),
    [
        ((4, 12), (4, 2), 1, (4,), "positive multiple of 16"),
        ((4, 16), (4, 4), 1, (4,), r"need block scales \[4, 2\], found \[4, 4\]"),
        ((4, 16), (4, 2), 2, (4,), "do not describe 4 rows"),
        ((4, 16), (4, 2), 2, (4, 4), "do not describe 4 rows"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(packed, scale, scale_2, rows, message):
    with pytest.raises(NVFP4ShapeError, match=message):
        NVFP4Weight(
            torch.zeros(packed, dtype=torch.uint8),
            torch.zeros(scale, dtype=torch.uint8).view(torch.float8_e4m3fn),
            torch.ones(scale_2),
            rows,
        )


def test_wrong_dtypes_are_refused():
    with pytest.raises(NVFP4ShapeError, match="expected uint8 codes and float8_e4m3fn scales"):
        NVFP4Weight(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2), torch.ones(1), (4,))


def test_fused_parts_are_joined_only_when_somebody_asks():
    parts = [packed_weight(32, 64, 0, 0.1), packed_weight(16, 64, 1, 0.3)]
    whole = fuse([fuse(parts), packed_weight(16, 64, 2, 0.2)])
    assert (whole.n, whole.k, whole.format) == (64, 64, "nvfp4")
    assert whole.nbytes == 64 * 32 + 64 * 4 + 3 * 4
    assert [p.data_ptr() for p, _ in whole.parts[:2]] == [p.packed.data_ptr() for p in parts], "nothing was copied"
    assert "packed" not in vars(whole)
    assert torch.equal(whole.packed[:32], parts[0].packed)
    assert whole.packed is whole.packed
    assert whole.block_scale.dtype == torch.float8_e4m3fn
    assert whole.row_scale_2().tolist() == [s for p in (*parts, packed_weight(16, 64, 2)) for s in p.row_scale_2()]
    with pytest.raises(AttributeError, match="no 'scales'"):
        whole.scales


def test_a_divisor_is_divided_by_and_survives_fusing() -> None:
    """3 has no exact reciprocal: products and quotients differ in the last bit of some blocks."""
    packed, scale = codec.quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.tensor(1 / 3))
    divisor = torch.tensor([3.0])
    weight = NVFP4Weight(packed, scale, 1 / divisor, (8,), divisor=divisor)
    product = NVFP4Weight(packed, scale, 1 / divisor, (8,))
    want = codec.decode_e2m1(codec.unpack_codes(packed)) * (scale.float() / 3).repeat_interleave(16, 1)
    assert torch.equal(weight.dequantize(), want)
    assert not torch.equal(product.dequantize(), want)
    both = fuse([weight, product])
    assert isinstance(both, NVFP4Weight)
    assert torch.equal(both.dequantize(), torch.cat([weight.dequantize(), product.dequantize()]))


@pytest.mark.parametrize(
    ("scales", "fusable"), [((None, None), True), ((2.0, 2.0), True), ((2.0, 3.0), False), ((2.0, None), False)]
)
def test_parts_fuse_only_behind_one_pre_quant_scale(scales, fusable) -> None:
    parts = [
        NVFP4Weight(
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.zeros(4, 2).to(torch.float8_e4m3fn),
            torch.ones(1),
            (4,),
            pre_quant_scale=None if s is None else torch.full((32,), s),
        )
        for s in scales
    ]
    assert can_fuse(parts) is fusable
    if fusable:
        fused = fuse(parts)
        assert isinstance(fused, NVFP4Weight)
        assert (fused.pre_quant_scale is None) is (scales[0] is None)


@pytest.mark.parametrize(
    "extra", [{"divisor": torch.ones(2)}, {"pre_quant_scale": torch.ones(16)}, {"divisor": torch.ones(1).double()}]
)
def test_extras_of_a_wrong_shape_or_type_are_refused(extra) -> None:
    with pytest.raises(NVFP4ShapeError, match="float32"):
        NVFP4Weight(
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.zeros(4, 2).to(torch.float8_e4m3fn),
            torch.ones(1),
            (4,),
            **extra,
        )
