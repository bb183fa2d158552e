"""RMSNorm and silu_mul against float64."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.config import Dtype
from nvfp4_runtime.kernels.ops import ActivationSpec, NormSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend

BACKEND = ReferenceBackend()
# one rounding to the type, plus a few FP32 operations before it
RTOL = {"bfloat16": 2.0**-8, "float32": 2.0**-20}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_is_the_formula_and_carries_the_rounded_sum(dtype: Dtype, with_residual: bool, size: float) -> None:
    torch_dtype = getattr(torch, dtype)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 96, generator=g) * size).to(torch_dtype)
    residual = (torch.randn(5, 96, generator=g) * size).to(torch_dtype) if with_residual else None
    weight = torch.randn(96, generator=g)
    total = x if residual is None else (x.double() + residual.double()).to(torch_dtype)
    wide = total.double()
    want = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed, carried = BACKEND.rms_norm(NormSpec(96, dtype, dtype))(x, residual, weight, 1e-5)
    assert normed.dtype == carried.dtype == torch_dtype
    assert torch.equal(carried, total)
    torch.testing.assert_close(normed.double(), want, rtol=RTOL[dtype], atol=0)


def test_rms_norm_of_zeros_is_zero_and_nan_stays_in_its_row() -> None:
    x = torch.zeros(3, 32)
    x[1] = float("nan")
    normed, _ = BACKEND.rms_norm(NormSpec(32, "float32", "float32"))(x, None, torch.ones(32), 1e-6)
    assert bool(normed[1].isnan().all())
    assert not bool(normed[[0, 2]].any())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_silu_mul_takes_the_gate_from_the_first_half(dtype: Dtype) -> None:
    x = (torch.randn(4, 2 * 48, generator=torch.Generator().manual_seed(0)) * 5).to(getattr(torch, dtype))
    gate, up = x.double().chunk(2, dim=-1)
    want = gate / (1 + torch.exp(-gate)) * up
    y = BACKEND.silu_mul(ActivationSpec(48, dtype, dtype))(x)
    assert y.shape == (4, 48)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), want, rtol=RTOL[dtype], atol=1e-30)


def test_silu_mul_saturates_without_overflow() -> None:
    x = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0]])
    y = BACKEND.silu_mul(ActivationSpec(3, "float32", "float32"))(x)
    assert y.tolist() == [[0.0, 2e4, 0.0]]
