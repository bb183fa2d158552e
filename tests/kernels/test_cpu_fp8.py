"""Native FP8 linears on every ISA: exact codes, the stated error bound, one chain per output whatever M and threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from tests.kernels.conftest import cpu_backend, random_tensor, same_bits

DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def random_fp8(n: int, k: int, block: tuple[int, int], seed: int, bias: bool = False) -> FP8Weight:
    """Every code but NaN, subnormals and both zeros among them; scales over six decades."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (n, k), generator=g)
    codes = (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = 10 ** (torch.rand(-(-n // block[0]), -(-k // block[1]), generator=g) * 6 - 5)
    return FP8Weight(codes, scale, block, bias=torch.randn(n, generator=g) if bias else None)


def spec_of(w: FP8Weight, dtype: torch.dtype, out: torch.dtype) -> LinearSpec:
    return LinearSpec(w.n, w.k, "fp8", None, DTYPES[dtype], DTYPES[out], w.block)


def assert_within_the_stated_bound(y: Tensor, x: Tensor, w: FP8Weight) -> None:
    """NativeLinearFP8's bound on the FP32 chain; then a bias and one rounding to y's type."""
    values = w.codes.double() * w.spread_scale().double()
    exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
    steps = w.k / 16 + 7 if w.scales_rows else w.block[1] / 16 + w.k / w.block[1] + 7
    room = steps * 2.0**-24 * size + 1e-45  # the last: FP32's own subnormals
    if w.bias is not None:
        exact = exact + w.bias.double()
        room = room + 2.0**-24 * exact.abs()
    room = room + {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[y.dtype] * exact.abs()
    worst = ((y.double() - exact).abs() - room).max()
    assert worst <= 0, f"off by {float(worst)} more than the bound"


@pytest.mark.parametrize("block", [(10**6, 10**6), (1, 10**6), (128, 128), (16, 64), (1, 192)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (40, 64), (150, 200), (33, 576)])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 13, 34])
def test_fp8_agrees_with_fp64_within_the_stated_bound(isa: str, n: int, k: int, m: int, block: tuple[int, int]) -> None:
    block = (min(block[0], n), min(block[1], k)) if block[0] > 1000 or block[1] > 1000 else block
    weight = random_fp8(n, k, block, seed=n + k, bias=m == 5)
    for dtype in DTYPES:
        x = random_tensor(m, k, seed=m, dtype=dtype)
        for out in DTYPES:
            y = cpu_backend(isa).linear(weight, spec_of(weight, dtype, out))(x)
            assert y.dtype == out
            assert_within_the_stated_bound(y, x, weight)


@pytest.mark.parametrize("block", [(16, 64), (1, 256), (512, 256)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_code_is_decoded_exactly(isa: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    """Columns of the identity pick single codes, in both paths: few rows and many."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes[[0x7F, 0xFF]] = 0x80
    weight = FP8Weight(
        codes.repeat(16, 1).view(torch.float8_e4m3fn),
        torch.full((-(-16 // block[0]), -(-256 // block[1])), 0.5),
        block,
    )
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, dtype, torch.float32))
    eye = torch.eye(256, dtype=dtype)
    wanted = weight.codes.float() * 0.5
    assert torch.equal(kernel(eye), wanted.T)
    assert torch.equal(torch.cat([kernel(eye[i : i + 2]) for i in range(0, 256, 2)]), wanted.T)


@pytest.mark.parametrize("block", [(1, 592), (32, 64), (200, 592)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = 200, 592
    weight = random_fp8(n, k, block, seed=1)
    spec = spec_of(weight, dtype, torch.float32)
    x = random_tensor(40, k, seed=2, dtype=dtype)
    alone = cpu_backend(isa, 1).linear(weight, spec)
    rows = torch.cat([alone(x[i : i + 1]) for i in range(40)])
    kernels = {t: cpu_backend(isa, t).linear(weight, spec) for t in (1, 2, 3)}
    for m in range(1, 41):
        assert same_bits(kernels[1 + m % 3](x[:m]), rows[:m]), f"m={m}"
        assert same_bits(kernels[1 + (m + 1) % 3](x[40 - m :]), rows[40 - m :]), f"last {m} rows"
    many = random_tensor(600, k, seed=3, dtype=dtype)  # more than one pass holds
    assert same_bits(alone(many), torch.cat([alone(many[i : i + 37]) for i in range(0, 600, 37)]))


def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    weight = random_fp8(33, 100, (1, 100), seed=1)
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.bfloat16))
    for m in (3, 20):
        x = random_tensor(m, 100, seed=2)
        clean = kernel(x)
        x[1, 99], x[2, 64] = torch.nan, torch.inf
        y = kernel(x)
        assert bool(y[1].isnan().all())
        assert not bool(y[2].isfinite().any())
        keep = [i for i in range(m) if i not in (1, 2)]
        assert same_bits(y[keep], clean[keep])


def test_a_nan_code_is_refused_with_its_place() -> None:
    weight = random_fp8(300, 100, (1, 100), seed=1)
    weight.codes.view(torch.uint8)[270, 99] = 0xFF
    with pytest.raises(KernelError, match=r"FP8 weight \[270, 99\] is NaN"):
        cpu_backend().linear(weight, spec_of(weight, torch.bfloat16, torch.float32))


def test_the_weight_is_read_where_it_lies() -> None:
    weight = random_fp8(20, 64, (1, 64), seed=1)
    kernel = cpu_backend().linear(weight, spec_of(weight, torch.bfloat16, torch.float32))
    x = random_tensor(2, 64, seed=2)
    before = kernel(x)
    weight.codes.view(torch.uint8).bitwise_xor_(0x80)  # the very memory, not a copy
    assert torch.equal(kernel(x), -before)
    assert kernel.weight_bytes == weight.nbytes


def test_misaligned_weights_and_activations_are_read_correctly(isa: str) -> None:
    weight = random_fp8(19, 70, (1, 70), seed=1)
    storage = torch.empty(19 * 70 + 3, dtype=torch.uint8)
    storage[3:] = weight.codes.view(torch.uint8).flatten()
    odd = FP8Weight(storage[3:].view(19, 70).view(torch.float8_e4m3fn), weight.scale, weight.block)
    x = random_tensor(1 + 9 * 70, seed=2)[1:].view(9, 70)
    spec = spec_of(weight, torch.bfloat16, torch.float32)
    assert same_bits(cpu_backend(isa).linear(odd, spec)(x), cpu_backend(isa).linear(weight, spec)(x.clone()))


def test_an_empty_batch_gives_an_empty_result(isa: str) -> None:
    weight = random_fp8(16, 48, (1, 48), seed=1)
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.float32))
    assert kernel(random_tensor(0, 48, seed=1)).shape == (0, 16)


def test_scales_that_change_within_64_inputs_are_refused_and_left_to_the_reference() -> None:
    weight = random_fp8(16, 96, (1, 32), seed=1)
    spec = spec_of(weight, torch.bfloat16, torch.float32)
    reason = cpu_backend().refuses(spec)
    assert reason is not None
    assert "multiple of 64" in reason
    x = random_tensor(3, 96, seed=2)
    y = ReferenceBackend().linear(weight, spec)(x)
    torch.testing.assert_close(y, x.float() @ weight.dequantize().T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("numerics", "block", "message"), [("w4a16", (1, 64), "no choice"), (None, None, "the block")])
def test_combinations_that_mean_nothing_are_refused(numerics: Any, block: Any, message: str) -> None:
    reason = cpu_backend().refuses(LinearSpec(16, 64, "fp8", numerics, "bfloat16", "float32", block))
    assert reason is not None
    assert message in reason


def test_a_bias_shorter_than_the_weight_is_refused() -> None:
    weight = dataclasses.replace(random_fp8(32, 64, (1, 64), seed=1), bias=torch.zeros(31))
    with pytest.raises(KernelError, match=r"bias: expected \[32\] on cpu like its weight, found \[31\]"):
        cpu_backend().linear(weight, spec_of(weight, torch.bfloat16, torch.float32))
