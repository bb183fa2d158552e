"""The kernel for few rows: addresses, pieces of K and epilogue against FP64."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.kernels.blackwell.capability import INTERPRETED, TILES, capability
from nvfp4_runtime.kernels.blackwell.few_tokens import FewTokens, pieces_of_k
from nvfp4_runtime.kernels.blackwell.linear import upload
from nvfp4_runtime.kernels.blackwell.quantize import ActivationQuantizer
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import unswizzle_scales
from tests.kernels.conftest import random_nvfp4, random_tensor

INPUT_SCALE = 0.0017


@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "bias", "num_sms", "out_dtype"),
    [
        (1, 128, 128, None, False, 1, torch.bfloat16),  # one program, one piece
        (3, 200, 272, (72, 128), True, 1, torch.float32),  # rows, tokens and K beyond the tiles; two scales
        (17, 144, 512, None, True, 4, torch.bfloat16),  # more than 16 tokens, four pieces
        (2, 16, 640, None, False, 2, torch.float32),  # pieces of unequal length
    ],
)
def test_result_is_the_exact_product_rounded_once(m, n, k, groups, bias, num_sms, out_dtype, place):
    weight = random_nvfp4(n, k, seed=n, groups=groups, bias=bias, input_scale=INPUT_SCALE)
    tile = INTERPRETED if place.emulated else TILES[capability(place.device)]
    operand = upload(weight, place.device)
    multipliers = torch.tensor(INPUT_SCALE) * weight.row_scale_2()
    bias_values = None if weight.bias is None else weight.bias.float().to(place.device)
    on_device = multipliers.to(place.device)
    kernel = FewTokens(operand, n, on_device, bias_values, out_dtype, tile, num_sms, place.emulated)
    k_padded = operand.codes.shape[1] * 2
    x = random_tensor(m, k, seed=m).to(place.device)
    quantized = ActivationQuantizer(INPUT_SCALE, k, k_padded, place.emulated)(x, None)
    y = kernel(quantized).cpu()
    assert (tuple(y.shape), y.dtype) == ((m, n), out_dtype)
    scales = unswizzle_scales(quantized.scales.cpu(), m, k_padded // 16).view(torch.float8_e4m3fn)
    x_values = codec.dequantize(quantized.codes.cpu(), scales, torch.ones(())).double()[:, :k]
    w_values = weight.operand().double()
    exact = (x_values @ w_values.t()) * multipliers.double()
    # FP32 sums in any order; what adders inside the FP4 instruction keep is not published, and gets ten bits less
    unit = 2.0**-24 if place.emulated else 2.0**-14
    room = (k + 2 if place.emulated else 1) * unit * (x_values.abs() @ w_values.abs().t()) * multipliers.double()
    if weight.bias is not None:
        exact = exact + weight.bias.double()
    # one rounding
    room = room + exact.abs() * (2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-23)
    assert bool(((y.double() - exact).abs() <= room).all())


@pytest.mark.parametrize("target", sorted(TILES))
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (64, 32)])
def test_pieces_cover_k_and_give_every_multiprocessor_work(target, n, k):
    tile, num_sms = TILES[target], 148
    pieces, steps = pieces_of_k(n, k, tile, num_sms)
    covered = pieces * steps * tile.block_k
    assert covered >= k
    assert covered - k < steps * tile.block_k  # no piece begins beyond K
    programs = -(-n // tile.weight_rows) * pieces
    assert programs >= num_sms or steps == 1  # K is cut as finely as that takes, or as finely as it can be
