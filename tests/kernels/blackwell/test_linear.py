"""A whole W4A4 layer against the reference: padding, parts with their own scales, bias.

Without FP4 tensor cores torch's scaled_mm is emulated, and how often it is called is looked at as well.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nvfp4_runtime.kernels.blackwell import probe
from nvfp4_runtime.kernels.blackwell.capability import INTERPRETED, TILES, capability
from nvfp4_runtime.kernels.blackwell.few_tokens import MAX_TOKENS, FewTokens
from nvfp4_runtime.kernels.blackwell.linear import BlackwellLinear, upload
from nvfp4_runtime.kernels.blackwell.quantize import ActivationQuantizer
from nvfp4_runtime.kernels.blackwell.scaled_mm import Operand
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, fuse
from tests.kernels.blackwell.conftest import Place
from tests.kernels.blackwell.emulated import EmulatedScaledMM
from tests.kernels.conftest import random_nvfp4, random_tensor

INPUT_SCALE = 0.0017


@pytest.fixture
def scaled_mm(monkeypatch: pytest.MonkeyPatch, place: Place) -> EmulatedScaledMM | None:
    """The emulation, or None where torch's own runs."""
    if not place.emulated:
        return None
    found = EmulatedScaledMM()
    monkeypatch.setattr(F, "scaled_mm", found)
    return found


def make(weight: NVFP4Weight, place: Place, out_dtype: str = "bfloat16", few: bool = False) -> BlackwellLinear:
    """The layer as the backend makes it, here."""
    spec = LinearSpec(weight.n, weight.k, "nvfp4", "w4a4", "bfloat16", out_dtype)
    operand = upload(weight, place.device)
    assert weight.input_scale is not None
    quantizer = ActivationQuantizer(weight.input_scale, weight.k, operand.codes.shape[1] * 2, place.emulated)
    tile = INTERPRETED if place.emulated else TILES[capability(place.device)]

    def make_few(whole: Operand, multipliers: Tensor, bias: Tensor | None) -> FewTokens:
        return FewTokens(whole, weight.n, multipliers, bias, getattr(torch, out_dtype), tile, 2, place.emulated)

    return BlackwellLinear(operand, weight, spec, quantizer, make_few if few else None, MAX_TOKENS)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "bias", "calls"),
    [
        (1, 128, 64, None, False, 1),
        (7, 40, 48, None, True, 1),  # N to 48, K to 64
        (130, 192, 96, (128, 64), False, 2),  # parts that begin at tiles of scales: one call each
        (5, 290, 80, (128, 128, 34), True, 3),  # and the last one padded
        (5, 96, 96, (32, 64), True, 1),  # parts that do not: one call, multiplied row by row
    ],
)
def test_layer_matches_the_reference(scaled_mm, place, m, n, k, groups, bias, calls, out_dtype):
    weight = random_nvfp4(n, k, seed=k, groups=groups, bias=bias, input_scale=INPUT_SCALE)
    x = random_tensor(m, k, seed=m)
    y = make(weight, place, out_dtype)(x.to(place.device)).cpu()
    if scaled_mm is not None:
        assert scaled_mm.calls == (1 if bias and out_dtype == "float32" else calls)
    spec = LinearSpec(n, k, "nvfp4", "w4a4", "bfloat16", out_dtype)
    expected = ReferenceBackend().linear(weight, spec)(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (expected.shape, expected.dtype, True)
    # the same exact products, summed in another order; one rounding each.
    rtol, atol = (
        (2.0**-7 if out_dtype == "bfloat16" else 1e-4),
        1e-4 if place.emulated else 0.02 * float(expected.std()),
    )
    torch.testing.assert_close(y.float(), expected.float(), rtol=rtol, atol=atol)


def test_both_products_of_a_layer_agree(scaled_mm, place):
    weight = random_nvfp4(200, 160, seed=1, groups=(72, 128), bias=True, input_scale=INPUT_SCALE)
    x = random_tensor(9, 160, seed=2).to(place.device)
    few, large = make(weight, place, "float32", few=True), make(weight, place, "float32")
    torch.testing.assert_close(few(x), large(x), rtol=1e-4, atol=1e-5 if place.emulated else 1e-2)
    assert scaled_mm is None or scaled_mm.calls == 1  # the first one did not need it
    many = random_tensor(MAX_TOKENS + 1, 160, seed=3).to(place.device)
    assert few(many).shape == (MAX_TOKENS + 1, 200)
    assert scaled_mm is None or scaled_mm.calls == 2  # too many rows for the kernel for few


def test_parts_that_lie_apart_are_uploaded_without_being_joined(scaled_mm, place):
    parts = [random_nvfp4(n, 64, seed=n, input_scale=INPUT_SCALE) for n in (128, 48)]
    joined = fuse(parts)
    operand = upload(joined, place.device)
    assert "packed" not in vars(joined)
    assert torch.equal(operand.codes.cpu(), torch.cat([part.packed for part in parts]))
    x = random_tensor(3, 64, seed=0).to(place.device)
    apart = torch.cat([make(part, place)(x) for part in parts], dim=1)
    torch.testing.assert_close(make(joined, place)(x), apart)


def test_no_rows_give_no_rows(scaled_mm, place):
    weight = random_nvfp4(32, 64, seed=0, input_scale=INPUT_SCALE)
    assert make(weight, place)(random_tensor(0, 64, seed=0).to(place.device)).shape == (0, 32)
    assert scaled_mm is None or scaled_mm.calls == 0


def test_the_probe_passes_right_products_and_tells_wrong_ones(scaled_mm, place, monkeypatch):
    plain = functools.partial(make, place=place)
    assert probe.check(plain, 128, place.device) is None
    assert probe.check(functools.partial(plain, few=True), 1, place.device) is None
    right = F.scaled_mm
    monkeypatch.setattr(F, "scaled_mm", lambda a, b, **options: right(a, b, **options) * 1.02)
    assert "came out wrong at M=128" in str(probe.check(plain, 128, place.device))

    def broken(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(F, "scaled_mm", broken)
    assert "CUBLAS_STATUS_NOT_SUPPORTED" in str(probe.check(plain, 128, place.device))
