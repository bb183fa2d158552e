"""The plain linear kernel against float64: exact operands, one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.config import Dtype, Numerics
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, fuse

BACKEND = ReferenceBackend()


def random_nvfp4(n: int, k: int, seed: int, scale_2: float = 3e-4, bias: bool = False) -> NVFP4Weight:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    scales = (torch.rand(n, k // 16, generator=g) * 200 + 0.01).to(torch.float8_e4m3fn)
    # a bias as large as the outputs, so that rounding before it would show
    b = (torch.randn(n, generator=g) * 2).to(torch.bfloat16) if bias else None
    return NVFP4Weight(packed, scales, torch.tensor([scale_2]), (n,), input_scale=2.5e-3, bias=b)


def random_x(m: int, k: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spec(weight: NVFP4Weight | DenseWeight, numerics: Numerics | None, dtype: Dtype, out: Dtype) -> LinearSpec:
    return LinearSpec(weight.n, weight.k, weight.format, numerics, dtype, out)  # type: ignore[arg-type]  # a Literal


def exact(weight: NVFP4Weight, x: Tensor, numerics: Numerics) -> tuple[Tensor, Tensor]:
    """The op's value in float64, and the sum of absolute products, which bounds FP32 accumulation error."""
    operand, multiplier = weight.operand().double(), weight.row_scale_2().double()
    if numerics == "w4a4":
        assert weight.input_scale is not None
        input_scale = torch.tensor(weight.input_scale)
        x = codec.activation_operand(x, input_scale)
        multiplier = (input_scale * weight.row_scale_2()).double()
    y = x.double() @ operand.T * multiplier
    size = x.double().abs() @ operand.abs().T * multiplier
    return (y if weight.bias is None else y + weight.bias.double()), size


def assert_one_rounding(found: Tensor, want: Tensor, size: Tensor, k: int) -> None:
    """`found` is `want` after FP32 accumulation and a single rounding to found's type.

    FP32 sums of k exact products err by at most k * 2^-24 * sum|products|; the final rounding adds half a spacing.
    A second rounding would add up to another half, so half a spacing plus the FP32 part separates the two.
    """
    half = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}[found.dtype]
    exponent = torch.frexp(want).exponent
    half_spacing = torch.ldexp(torch.ones_like(want), exponent) * half
    error = (found.double() - want).abs()
    assert bool((error <= half_spacing + (k + 2) * 2.0**-24 * size + 2.0**-24 * want.abs()).all())


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (1, 64, 128), (1, 1536, 576), (5, 33, 48), (64, 96, 1536)])
@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_nvfp4_linear_rounds_once_after_the_scale_and_the_bias(
    m: int, n: int, k: int, numerics: Numerics, dtype: Dtype, bias: bool
) -> None:
    weight = random_nvfp4(n, k, seed=n, bias=bias)
    x = random_x(m, k, 1, getattr(torch, dtype))
    y = BACKEND.linear(weight, spec(weight, numerics, dtype, dtype))(x)
    assert y.shape == (m, n)
    assert y.dtype == getattr(torch, dtype)
    want, size = exact(weight, x, numerics)
    assert_one_rounding(y, want, size, k)


def test_bfloat16_addmm_applies_alpha_to_the_float32_sum() -> None:
    """What the bfloat16 path rests on. Nearly every value must equal the once-rounded float64 result.

    Two roundings (sum to bfloat16, then times alpha) would differ in about a third of the values; an FP32 sum differs
    from float64 only where the result lies within an FP32 error of a bfloat16 tie (2^-24 * sqrt(k) over 2^-9).
    """
    weight = random_nvfp4(512, 576, seed=3, scale_2=1.2345678e-4)
    for m in (1, 2, 17, 64):
        x = random_x(m, 576, m, torch.bfloat16)
        y = BACKEND.linear(weight, spec(weight, "w4a16", "bfloat16", "bfloat16"))(x)
        want, _ = exact(weight, x, "w4a16")
        twice = (x.double() @ weight.operand().double().T).float().bfloat16() * 1.2345678e-4
        assert (twice != want.float().bfloat16()).double().mean() > 0.1
        assert (y != want.float().bfloat16()).double().mean() < 2e-3


def test_fused_parts_keep_their_own_scale() -> None:
    parts = [random_nvfp4(32, 64, 1, 1e-4), random_nvfp4(16, 64, 2, 7e-4), random_nvfp4(48, 64, 3, 3e-5)]
    fused = fuse(parts)
    x = random_x(3, 64, 9, torch.bfloat16)
    for numerics in ("w4a16", "w4a4"):
        together = BACKEND.linear(fused, spec(fused, numerics, "bfloat16", "bfloat16"))(x)
        apart = [BACKEND.linear(p, spec(p, numerics, "bfloat16", "bfloat16"))(x) for p in parts]
        torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=2**-8, atol=0)  # at most the last bit


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_linear_sums_in_float32_and_rounds_once(
    stored: torch.dtype, dtype: Dtype, out: Dtype, bias: bool
) -> None:
    n, k = 300, 1000  # not a multiple of anything
    g = torch.Generator().manual_seed(0)
    weight = DenseWeight(torch.randn(n, k, generator=g).to(stored), torch.randn(n, generator=g).to(stored))
    if not bias:
        weight = DenseWeight(weight.weight)
    x = random_x(7, k, 2, getattr(torch, dtype))
    y = BACKEND.linear(weight, spec(weight, None, dtype, out))(x)
    want = x.double() @ weight.weight.double().T
    size = x.double().abs() @ weight.weight.double().abs().T
    if weight.bias is not None:
        want += weight.bias.double()
    assert y.dtype == getattr(torch, out)
    assert_one_rounding(y, want, size, k)


def test_float32_logits_of_bfloat16_inputs_are_not_rounded_to_bfloat16() -> None:
    weight = random_nvfp4(64, 128, 5)
    x = random_x(2, 128, 6, torch.bfloat16)
    y = BACKEND.linear(weight, spec(weight, "w4a16", "bfloat16", "float32"))(x)
    assert bool((y != y.bfloat16().float()).any())


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
def test_a_nan_row_stays_in_its_row(numerics: Numerics) -> None:
    weight = random_nvfp4(64, 128, 5)
    kernel = BACKEND.linear(weight, spec(weight, numerics, "bfloat16", "bfloat16"))
    x = random_x(4, 128, 6, torch.bfloat16)
    clean = kernel(x)
    x[2, 17] = float("nan")
    y = kernel(x)
    assert bool(y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_weight_bytes_are_what_the_kernel_keeps() -> None:
    weight = random_nvfp4(64, 128, 5)
    assert BACKEND.linear(weight, spec(weight, "w4a16", "bfloat16", "bfloat16")).weight_bytes == 64 * 128 * 2
    assert BACKEND.linear(weight, spec(weight, "w4a16", "float32", "float32")).weight_bytes == 64 * 128 * 4


def test_float16_activations_are_refused_with_a_reason() -> None:
    reason = BACKEND.refuses(LinearSpec(64, 128, "nvfp4", "w4a16", "float16", "float16"))
    assert reason is not None
    assert "float16" in reason
