"""Every format's linear layer against exact arithmetic in FP64, with bounds from counted roundings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import ConfigError, KernelError
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton import linear
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight
from tests.kernels.conftest import random_nvfp4, random_tensor, same_bits
from tests.kernels.numerics import INPUT_SCALE

TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
ODD = [(1, 64, 64), (3, 100, 80), (17, 65, 336), (16, 128, 1024)]


def spec_of(weight: Weight, x: Tensor, out: torch.dtype, numerics: Any = None) -> LinearSpec:
    block = weight.block if isinstance(weight, FP8Weight) else None
    if isinstance(weight, NVFP4Weight) and numerics is None:
        numerics = "w4a16"
    return LinearSpec(weight.n, weight.k, weight.format, numerics, TYPES[x.dtype], TYPES[out], block)


def assert_exact_but_for_sums(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """y = x w^T + bias, x and w exact in fp64. Room: K roundings of FP32 sums in whatever order, one for the row's
    scale, one for the bias, a few for splits; then y's own rounding."""
    exact, room = x.double() @ w.t(), (x.shape[1] + 20) * 2.0**-24 * (x.double().abs() @ w.abs().t())
    if bias is not None:
        exact = exact + bias.double()
    room = room + {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[y.dtype] * exact.abs() + 2.0**-120
    excess = (y.cpu().double() - exact).abs() - room
    assert not (excess > 0).any(), f"{float(excess.max())} beyond the bound at {excess.argmax()}"
    assert y.isfinite().all()


def run(backend: TritonBackend, weight: Weight, x: Tensor, out: torch.dtype, numerics: Any = None) -> Tensor:
    spec = spec_of(weight, x, out, numerics)
    assert backend.refuses(spec) is None
    return backend.linear(weight, spec)(x.to(backend.device))


@pytest.mark.parametrize(("m", "n", "k"), ODD)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_w4a16(triton_backend: TritonBackend, m: int, n: int, k: int, out: torch.dtype) -> None:
    weight = random_nvfp4(n, k, seed=k, groups=(n - 7, 7), bias=m % 2 == 1)
    x = random_tensor(m, k, seed=m)
    w = weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)
    assert_exact_but_for_sums(run(triton_backend, weight, x, out), x, w, weight.bias)


def test_w4a16_with_float32_activations_rounds_none_of_them(triton_backend: TritonBackend) -> None:
    weight, x = random_nvfp4(70, 96, seed=1), random_tensor(5, 96, seed=2, dtype=torch.float32)
    w = weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)
    assert_exact_but_for_sums(run(triton_backend, weight, x, torch.float32), x, w, None)


def test_many_rows_go_through_the_written_out_weight_to_the_same_result(
    triton_backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "FUSED_ROWS", 16)
    monkeypatch.setattr(linear, "WRITTEN_VALUES", 64 * 80)  # one panel at a time, so that groups and pieces overlap
    for bias, out in ((False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)):
        weight = random_nvfp4(100, 80, seed=3, groups=(60, 40), bias=bias)
        x = random_tensor(17, 80, seed=4)
        w = weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)
        assert_exact_but_for_sums(run(triton_backend, weight, x, out), x, w, weight.bias)


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7E, 0x80, 0xFE])
def test_extreme_and_negative_block_scales(triton_backend: TritonBackend, byte: int) -> None:
    weight = random_nvfp4(64, 64, seed=byte)
    weight.block_scale.view(torch.uint8)[:, ::2] = byte
    x = random_tensor(2, 64, seed=5)
    w = weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)
    assert_exact_but_for_sums(run(triton_backend, weight, x, torch.float32), x, w, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoilt_row_spoils_only_itself(triton_backend: TritonBackend, value: float) -> None:
    weight, x = random_nvfp4(64, 128, seed=6), random_tensor(3, 128, seed=7)
    spoilt = x.clone()
    spoilt[1, 40] = value
    good, found = run(triton_backend, weight, x, torch.float32), run(triton_backend, weight, spoilt, torch.float32)
    assert same_bits(good[[0, 2]], found[[0, 2]])
    reference = ReferenceBackend().linear(weight, spec_of(weight, x, torch.float32))(spoilt)
    assert torch.equal(found[1].cpu().isfinite(), reference[1].isfinite())


def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it(triton_backend: TritonBackend) -> None:
    weight, x = random_nvfp4(64, 512, seed=8), random_tensor(9, 512, seed=9)
    together = run(triton_backend, weight, x, torch.float32)
    assert all(same_bits(run(triton_backend, weight, x[i : i + 1], torch.float32)[0], together[i]) for i in (0, 8))


@pytest.mark.parametrize(("m", "n", "k"), ODD[:3])
def test_w4a4_multiplies_the_checkpoint_s_own_operands(triton_backend: TritonBackend, m: int, n: int, k: int) -> None:
    weight = random_nvfp4(n, k, seed=k, groups=(n - 7, 7), input_scale=INPUT_SCALE)
    x = random_tensor(m, k, seed=m)
    operand = codec.activation_operand(x, torch.tensor(INPUT_SCALE))
    scale = (torch.tensor(INPUT_SCALE) * weight.row_scale_2()).double().unsqueeze(1)
    y = run(triton_backend, weight, x, torch.float32, "w4a4")
    assert_exact_but_for_sums(y, operand, weight.operand().double() * scale, None)


def test_w4a4_needs_a_positive_input_scale(triton_backend: TritonBackend) -> None:
    x = random_tensor(1, 64, seed=1)
    with pytest.raises(ConfigError, match="needs an input_scale"):
        run(triton_backend, random_nvfp4(64, 64, seed=1), x, torch.float32, "w4a4")
    with pytest.raises(KernelError, match="positive input_scale, found 0"):
        run(triton_backend, random_nvfp4(64, 64, seed=1, input_scale=0.0), x, torch.float32, "w4a4")


@pytest.mark.parametrize("block", [(1, 0), (0, 0), (16, 128), (128, 64)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 256), (18, 100, 208)])
def test_fp8(triton_backend: TritonBackend, m: int, n: int, k: int, block: tuple[int, int]) -> None:
    block = (block[0] or n, block[1] or k)
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 255, (n, k), generator=g, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).to(torch.uint8)
    scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=g) + 0.01
    weight = FP8Weight(codes.view(torch.float8_e4m3fn), scale, block, bias=random_tensor(n, seed=1))
    x = random_tensor(m, k, seed=m)
    exact = weight.codes.double() * weight.spread_scale().double()
    assert_exact_but_for_sums(run(triton_backend, weight, x, torch.bfloat16), x, exact, weight.bias)


@pytest.mark.parametrize("span", [12, 60], ids=["panels", "dequantised"])
def test_mxfp4(triton_backend: TritonBackend, span: int) -> None:
    g = torch.Generator().manual_seed(span)
    packed = torch.randint(0, 256, (70, 48), generator=g, dtype=torch.uint8)
    scales = torch.randint(110, 110 + span, (70, 3), generator=g).to(torch.uint8)
    weight, x = MXFP4Weight(packed, scales), random_tensor(4, 96, seed=3)
    assert_exact_but_for_sums(run(triton_backend, weight, x, torch.bfloat16), x, weight.dequantize().double(), None)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_plain_weights(triton_backend: TritonBackend, stored: torch.dtype, out: torch.dtype) -> None:
    weight = DenseWeight(random_tensor(70, 96, seed=1, dtype=stored), random_tensor(70, seed=2))
    x = random_tensor(5, 96, seed=3)
    y = run(triton_backend, weight, x, out)
    assert_exact_but_for_sums(y, x, weight.weight.double(), weight.bias)


def test_no_rows_give_no_rows(triton_backend: TritonBackend) -> None:
    y = run(triton_backend, random_nvfp4(64, 64, seed=1), torch.empty(0, 64, dtype=torch.bfloat16), torch.bfloat16)
    assert y.shape == (0, 64)


def test_activations_of_another_shape_or_type_are_refused(triton_backend: TritonBackend) -> None:
    weight = random_nvfp4(64, 64, seed=1)
    kernel = triton_backend.linear(weight, LinearSpec(64, 64, "nvfp4", "w4a16", "bfloat16", "bfloat16"))
    with pytest.raises(KernelError, match="expected a contiguous"):
        kernel(torch.zeros(2, 32, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="expected a contiguous"):
        kernel(torch.zeros(2, 64))
