"""Native MXFP4 linears on every ISA against FP64 of the exact weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearSpec
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from tests.kernels.conftest import cpu_backend, random_tensor, same_bits

DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def random_mxfp4(n: int, k: int, seed: int, bias: bool = False) -> MXFP4Weight:
    """Uniform codes under scales of 2^-57 to 2^53."""
    g = torch.Generator().manual_seed(seed)
    return MXFP4Weight(
        torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        torch.randint(70, 181, (n, k // 32), generator=g, dtype=torch.uint8),
        torch.randn(n, generator=g) if bias else None,
    )


def spec_of(w: MXFP4Weight, dtype: torch.dtype, out: torch.dtype) -> LinearSpec:
    return LinearSpec(w.n, w.k, "mxfp4", None, DTYPES[dtype], DTYPES[out])


@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 64), (150, 96), (33, 576)])
@pytest.mark.parametrize("m", [1, 4, 7, 33])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_mxfp4_agrees_with_fp64_within_the_stated_bound(isa: str, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    """NativeLinearNVFP4's bound; where bfloat16 activations become two int8 digits, 1.6e-5 of their block's largest."""
    weight = random_mxfp4(n, k, seed=n + k, bias=m == 4)
    x, backend = random_tensor(m, k, seed=m, dtype=dtype), cpu_backend(isa)
    values = weight.dequantize().double()
    exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
    room = (k / 16 + 18) * 2.0**-24 * size
    if dtype == torch.bfloat16 and "digits" in backend.describe()["w4a16 operand"]:
        largest = x.double().abs().view(m, -1, 16).amax(-1, keepdim=True).expand(-1, -1, 16).reshape(m, k)
        room = room + 1.6e-5 * largest @ values.abs().T
    if weight.bias is not None:
        exact = exact + weight.bias.double()
        room = room + 2.0**-24 * exact.abs()
    for out in DTYPES:
        y = backend.linear(weight, spec_of(weight, dtype, out))(x)
        rounding = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[out] * exact.abs()
        worst = ((y.double() - exact).abs() - room - rounding).max()
        assert worst <= 0, f"off by {float(worst)} more than the bound"


def test_every_scale_byte_is_decoded(isa: str) -> None:
    """Code 1.0 under each finite scale whose product float32 holds as a normal number."""
    scales = torch.arange(1, 255, dtype=torch.int32).to(torch.uint8)
    weight = MXFP4Weight(torch.full((254, 16), 0x02, dtype=torch.uint8), scales.unsqueeze(1))
    x = torch.zeros(1, 32)
    x[0, 0] = 1.0  # code 2 is 1.0, at even k
    y = cpu_backend(isa).linear(weight, spec_of(weight, torch.float32, torch.float32))(x)
    assert torch.equal(y[0].double(), 2.0 ** (scales.double() - 127))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa: str, dtype: torch.dtype) -> None:
    weight = random_mxfp4(200, 608, seed=1)
    spec = spec_of(weight, dtype, torch.float32)
    x = random_tensor(40, 608, seed=2, dtype=dtype)
    alone, many = cpu_backend(isa, 1).linear(weight, spec), cpu_backend(isa, 3).linear(weight, spec)
    rows = torch.cat([alone(x[i : i + 1]) for i in range(40)])
    for m in (1, 2, 3, 5, 12, 13, 17, 31, 40):
        assert same_bits(many(x[:m]), rows[:m]), f"m={m}"


def test_grouped_mxfp4_experts_have_the_bits_of_their_plain_kernels(isa: str) -> None:
    weights = [random_mxfp4(40, 96, seed=e) for e in range(4)]
    spec = GroupedLinearSpec(4, 40, 96, "mxfp4", None, "bfloat16", "float32")
    x, offsets = random_tensor(25, 96, seed=9), torch.tensor([0, 1, 1, 20, 25], dtype=torch.int32)
    backend = cpu_backend(isa)
    y = backend.grouped_linear(weights, spec)(x, offsets)
    for e, weight in enumerate(weights):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert same_bits(y[rows], backend.linear(weight, spec.each)(x[rows]))
