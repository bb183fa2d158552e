"""The activation quantiser: the codec's bits, in the layout that scaled_mm wants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.kernels.blackwell.quantize import SIXTH, ActivationQuantizer
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import swizzled_shape, unswizzle_scales
from tests.kernels.blackwell.conftest import Place


def quantize(x: Tensor, input_scale: float, k_padded: int, place: Place) -> tuple[Tensor, Tensor]:
    """Codes uint8 [M, k_padded / 2], and the scales as they lie, both on the CPU."""
    quantizer = ActivationQuantizer(input_scale, x.shape[1], k_padded, place.emulated)
    found = quantizer(x.to(place.device), None)
    return found.codes.cpu(), found.scales.cpu()


def test_one_sixth_is_the_codecs():
    assert float(torch.tensor(1.0 / 6.0, dtype=torch.float32)) == SIXTH.value


@pytest.mark.parametrize(
    ("m", "k", "k_padded", "input_scale"),
    [
        (1, 16, 32, 0.0017),
        (3, 64, 64, 2.0**-10),
        (3, 64, 64, 0.3),
        (5, 272, 288, 0.0017),
        (66, 512, 512, 0.3),
        (130, 96, 96, 0.0017),
    ],
)
def test_codes_and_scales_are_the_codecs_and_padding_is_zero(m, k, k_padded, input_scale, place):
    g = torch.Generator().manual_seed(m * k)
    x = (torch.randn(m, k, generator=g) * torch.exp(torch.randn(m, k, generator=g) * 2)).to(torch.bfloat16)
    x[0, :16] = 0.0  # a block of zeros
    x[-1, -16:] *= 1e-30  # one whose scale underflows
    x[m // 2, :16] *= 1e30  # one that saturates
    found_codes, found_scales = quantize(x, input_scale, k_padded, place)
    codes, scales = codec.quantize_activation(x, torch.tensor(input_scale))
    assert torch.equal(found_codes[:, : k // 2], codec.pack_codes(codes))
    assert not found_codes[:, k // 2 :].any()
    padded_rows, padded_cols = swizzled_shape(m, k_padded // 16)
    everything = unswizzle_scales(found_scales, padded_rows, padded_cols)
    assert torch.equal(everything[:m, : k // 16], scales.view(torch.uint8))
    everything[:m, : k // 16] = 0
    assert not everything.any()


def test_every_tie_and_every_block_scale_is_rounded_as_the_codec_rounds(place):
    # block maxima that pass through every e4m3 value and every midpoint, subnormals and saturation included
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    maxima = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([449.0, 464.0, 480.0, 1e4])]) * 6
    ties = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, -0.25]) / 6
    x = maxima.unsqueeze(1) * ties  # [R, 16]
    x = torch.cat([x, -x], dim=1)
    found_codes, found_scales = quantize(x, 1.0, 32, place)
    codes, scales = codec.quantize_activation(x, torch.tensor(1.0))
    assert torch.equal(found_codes, codec.pack_codes(codes))
    assert torch.equal(unswizzle_scales(found_scales, x.shape[0], 2), scales.view(torch.uint8))


def test_nan_and_infinity_keep_their_place(place):
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[0, 3], x[1, 20] = float("nan"), float("inf")
    found_codes, found_scales = quantize(x, 0.01, 32, place)
    codes, scales = codec.quantize_activation(x, torch.tensor(0.01))
    assert torch.equal(found_codes, codec.pack_codes(codes))
    assert torch.equal(unswizzle_scales(found_scales, 2, 2), scales.view(torch.uint8))
