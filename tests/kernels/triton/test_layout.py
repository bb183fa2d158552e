"""Panels say what the weight says: decoded by a restatement of their bits, for every code, scale and odd shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.triton import layout
from nvfp4_runtime.kernels.triton.layout import Panels
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, fuse
from tests.kernels.conftest import random_nvfp4


def bfloat16_bits(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32).double()


def unpacked(panels: Panels) -> Tensor:
    """fp64 [N, K] of four-bit panels, as layout.py's text describes them: no kernel's code is used here."""
    h = panels.words.to(torch.int32) & 0xFFFF  # [P, B, 64, 16]
    last = ((h << 1) & 0x8000) | ((h >> 5) & 0x0100) | ((h >> 4) & 0x00C0)
    planes = [bfloat16_bits(p) for p in (h & 0x81C0, (h << 3) & 0x81C0, (h << 6) & 0x81C0, last)]
    assert panels.scales is not None
    scales = [bfloat16_bits((((panels.scales >> (8 * i)) & 0xFF) << 4) + panels.base) for i in range(4)]
    values = torch.stack([p * s.unsqueeze(-1) for p, s in zip(planes, scales, strict=True)], dim=3)  # [P, B, 64, 4, 16]
    rows = values.permute(0, 2, 1, 3, 4).reshape(values.shape[0] * 64, -1)[: panels.n, : panels.k]
    return rows * panels.row_scale.double().unsqueeze(1)


def exact_nvfp4(weight: NVFP4Weight) -> Tensor:
    return weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 16), (100, 80), (65, 208), (2100, 32)])
def test_nvfp4_panels_hold_the_weight_exactly(n: int, k: int) -> None:
    weight = random_nvfp4(n, k, seed=n + k, groups=None if n < 3 else (n - 2, 2))
    assert torch.equal(unpacked(layout.pack_nvfp4(weight)), exact_nvfp4(weight))


def test_every_code_under_every_scale_byte_survives() -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    scales = scales[(scales & 0x7F) != 0x7F].repeat_interleave(4).view(-1, 4)  # one row per byte, NaN apart
    codes = torch.arange(16, dtype=torch.uint8).repeat(4).expand(scales.shape[0], 64)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    weight = NVFP4Weight(packed, scales.view(torch.float8_e4m3fn), torch.ones(1), (scales.shape[0],))
    assert torch.equal(unpacked(layout.pack_nvfp4(weight)), exact_nvfp4(weight))


def test_fused_parts_are_packed_as_if_they_were_one() -> None:
    parts = [random_nvfp4(n, 96, seed=n) for n in (70, 30, 1000)]
    fused = fuse(parts)
    assert isinstance(fused, NVFP4Weight)
    assert torch.equal(unpacked(layout.pack_nvfp4(fused)), torch.cat([exact_nvfp4(p) for p in parts]))


def test_a_nan_scale_is_refused_with_its_place() -> None:
    weight = random_nvfp4(70, 64, seed=1)
    weight.block_scale.view(torch.uint8)[66, 3] = 0xFF
    with pytest.raises(KernelError, match=r"weight_scale \[66, 3\] is NaN"):
        layout.pack_nvfp4(weight)


@pytest.mark.parametrize("span", [0, 30])
def test_mxfp4_panels_hold_the_weight_exactly(span: int) -> None:
    g = torch.Generator().manual_seed(span)
    packed = torch.randint(0, 256, (70, 48), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, span + 1, (70, 3), generator=g) + torch.randint(1, 200, (70, 1), generator=g)
    weight = MXFP4Weight(packed, scales.to(torch.uint8))
    panels = layout.pack_mxfp4(weight)
    assert panels is not None
    assert torch.equal(unpacked(panels), weight.dequantize().double())


def test_mxfp4_rows_that_span_more_than_five_bits_of_exponent_get_no_panels() -> None:
    scales = torch.tensor([[100, 131]], dtype=torch.uint8)
    assert layout.pack_mxfp4(MXFP4Weight(torch.full((1, 32), 0x22, dtype=torch.uint8), scales)) is None
    zeros = torch.full((1, 32), 0x22, dtype=torch.uint8)
    zeros[:, :16] = 0x80  # the small block holds only zeros: its scale does not matter
    assert layout.pack_mxfp4(MXFP4Weight(zeros, scales)) is not None


def test_fp8_panels_hold_two_inputs_a_word() -> None:
    codes = torch.randint(0, 0x7F, (70, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    weight = FP8Weight(codes.view(torch.float8_e4m3fn), torch.rand(70, 1), (1, 80))
    panels = layout.pack_fp8(weight)
    words = panels.words.to(torch.int32) & 0xFFFF  # [P, B, 64, 32]
    values = torch.stack([words & 0xFF, words >> 8], dim=3)  # [P, B, 64, 2, 32]
    rows = values.permute(0, 2, 1, 3, 4).reshape(128, -1)[:70, :80]
    assert torch.equal(rows.to(torch.uint8), codes)
    assert torch.equal(panels.row_scale, weight.scale.flatten())


def test_an_fp8_nan_is_refused_with_its_place() -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    codes[2, 5] = 0x7F
    with pytest.raises(KernelError, match=r"FP8 weight \[2, 5\] is NaN"):
        layout.pack_fp8(FP8Weight(codes.view(torch.float8_e4m3fn), torch.ones(4, 1), (1, 64)))
