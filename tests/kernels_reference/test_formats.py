"""The plain FP8 and MXFP4 linears against float64: exact operands, FP32 sums, one rounding."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.config import Dtype
from nvfp4_runtime.errors import NoBackendError
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from tests.kernels_reference.test_linear import assert_one_rounding, random_x

BACKEND = ReferenceBackend()


def random_mxfp4(n: int, k: int, seed: int, bias: bool = False) -> MXFP4Weight:
    g = torch.Generator().manual_seed(seed)
    return MXFP4Weight(
        torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        torch.randint(110, 130, (n, k // 32), generator=g, dtype=torch.uint8),
        torch.randn(n, generator=g) if bias else None,
    )


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 32), (1, 40, 96), (9, 33, 576)])
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("kind", ["tensor", "row", "block", "mxfp4"])
@pytest.mark.parametrize("bias", [False, True])
def test_other_formats_sum_exact_products_and_round_once(
    m: int, n: int, k: int, dtype: Dtype, out: Dtype, kind: str, bias: bool
) -> None:
    weight: FP8Weight | MXFP4Weight = random_mxfp4(n, k, n, bias)
    block = {"tensor": (n, k), "row": (1, k), "block": (16, 32)}.get(kind)
    if block is not None:
        g = torch.Generator().manual_seed(n)
        codes = (torch.randn(n, k, generator=g) * 30).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=g)
        weight = FP8Weight(codes, scale, block, bias=torch.randn(n, generator=g) if bias else None)
    x = random_x(m, k, 1, getattr(torch, dtype))
    y = BACKEND.linear(weight, LinearSpec(n, k, weight.format, None, dtype, out, block))(x)
    values = weight.dequantize().double()
    if isinstance(weight, FP8Weight):
        values = weight.codes.double() * weight.spread_scale().double()
    want, size = x.double() @ values.T, x.double().abs() @ values.abs().T
    if weight.bias is not None:
        want += weight.bias.double()
    assert y.dtype == getattr(torch, out)
    assert_one_rounding(y, want, size, k)


def test_the_registry_says_what_is_multiplied() -> None:
    kernels = Kernels([BACKEND], "bfloat16", "w4a4")  # W4A4 is a wish about NVFP4 layers
    kernels.linear("down_proj", FP8Weight(torch.zeros(8, 64).to(torch.float8_e4m3fn), torch.ones(8, 1), (1, 64)))
    kernels.linear("up_proj", random_mxfp4(8, 64, 0))
    assert [(c.stored, c.numerics) for c in kernels.choices] == [("fp8", "w8a16"), ("mxfp4", "w4a16")]
    assert [c.bits_per_weight for c in kernels.choices] == [8.5, 4.25]


def test_numerics_for_formats_that_have_no_choice_are_refused() -> None:
    for weight in ("fp8", "mxfp4", "bf16"):
        reason = BACKEND.refuses(LinearSpec(8, 64, weight, "w4a16", "bfloat16", "float32"))  # type: ignore[arg-type]  # a format
        assert reason is not None
        assert "no choice of numerics" in reason


def test_the_error_names_every_refusal() -> None:
    kernels = Kernels([BACKEND], "float16")
    with pytest.raises(NoBackendError, match="float16"):
        kernels.linear("x", random_mxfp4(8, 64, 0))
