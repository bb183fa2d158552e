"""MXFP4: E8M0 scales against torch's own type, the format against an explicit table, the specification's rounding."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec, mx
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import fuse

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_all_256_scale_bytes_decode_as_torch_decodes_them() -> None:
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    found, wanted = mx.decode_e8m0(scales), scales.view(torch.float8_e8m0fnu).to(torch.float32)
    assert torch.equal(found[:255], wanted[:255])
    assert torch.equal(found[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
    assert bool(found[255].isnan())


def test_every_code_times_every_scale_is_the_product_of_the_tables() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.int32).to(torch.uint8).unsqueeze(1)
    found = MXFP4Weight(codec.pack_codes(codes), scales).dequantize()
    table = torch.tensor([*VALUES, *[-v for v in VALUES]], dtype=torch.float64).repeat(2)
    wanted = table * 2.0 ** (torch.arange(255).double() - 127).unsqueeze(1)
    assert torch.equal(found, wanted.to(torch.float32))  # to(): infinite beyond float32


def test_quantising_takes_the_specifications_scale_and_saturates() -> None:
    w = torch.zeros(6, 32)
    w[0, 0], w[0, 1] = 6.0, 0.25  # floor(log2 6) - 2 = 0: 6 stays 6, 0.25 is a tie and goes to 0
    w[1, 0] = 7.9  # scale 1, beyond 6: saturates
    w[2, 0] = -8.0  # scale 2: -4
    w[3, 0] = 1e-40  # the smallest scale, 2^-127
    w[4, 0] = 3e38
    packed, scale = mx.quantize(w)
    found = MXFP4Weight(packed, scale).dequantize()
    assert found[0, :2].tolist() == [6.0, 0.0]
    assert found[1, 0] == 6.0
    assert found[2, 0] == -8.0
    assert scale.flatten().tolist()[:4] == [127, 127, 128, 0]
    assert found[3, 0] == pytest.approx(1e-40, abs=2.0**-129)  # half a step of 2^-128
    assert found[4, 0] == pytest.approx(3e38, rel=0.25)
    assert scale[5] == 0


def test_quantising_what_the_format_holds_gives_it_back() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 64), generator=g, dtype=torch.uint8)
    codes[:, ::32] = 7  # every block holds a 6, so that its scale is the one it came from
    scales = torch.randint(40, 200, (40, 2), generator=g, dtype=torch.uint8)
    weight = MXFP4Weight(codec.pack_codes(codes), scales)
    packed, again = mx.quantize(weight.dequantize())
    assert torch.equal(again, scales)
    assert torch.equal(packed, weight.packed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_quantised(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        mx.quantize(torch.full((1, 32), bad))


def test_fused_parts_dequantise_to_the_same_rows() -> None:
    parts = [MXFP4Weight(*mx.quantize(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)))) for n in (8, 3)]
    whole = fuse(parts)
    assert isinstance(whole, MXFP4Weight)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert whole.nbytes == 11 * (32 + 2)


def test_wrong_shapes_types_and_nan_scales_are_refused() -> None:
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(NVFP4ShapeError, match="positive multiple of 32"):
        MXFP4Weight(codes[:, :24], scales)
    with pytest.raises(NVFP4ShapeError, match=r"need block scales \[4, 2\], found \[4, 4\]"):
        MXFP4Weight(codes, torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(NVFP4ShapeError, match="expected uint8 codes and uint8 E8M0 scales"):
        MXFP4Weight(codes, scales.float())
    scales[2, 1] = 255
    with pytest.raises(NVFP4ShapeError, match=r"block scale \[2, 1\] is 255"):
        MXFP4Weight(codes, scales)
