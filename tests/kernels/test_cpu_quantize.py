"""Quantising a weight at load: native code gives the bits that nvfp4/fp8.py and nvfp4/codec.py define."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.kernels.ops import QuantizeSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4.weight import DenseWeight
from tests.kernels.conftest import cpu_backend


def hard_weight(k: int, dtype: torch.dtype) -> Tensor:
    """Rows of ties, zeros, tiny, huge and ordinary values."""
    g = torch.Generator().manual_seed(k)
    ties = torch.tensor([0.25, -0.75, 1.25, 1.75, -2.5, 3.5, 5.0, 6.0]).repeat(k // 8 + 1)[:k]
    rows = [ties, torch.zeros(k), -torch.zeros(k), torch.full((k,), 1e-7), torch.randn(k, generator=g) * 3e3]
    return torch.cat([torch.stack(rows), torch.randn(60, k, generator=g)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("form", "k"), [("fp8", 100), ("fp8", 1), ("fp8", 576), ("nvfp4", 16), ("nvfp4", 592)])
def test_native_code_quantises_bit_for_bit_as_the_definition(isa: str, form: Any, k: int, dtype: torch.dtype) -> None:
    weight = DenseWeight(hard_weight(k, dtype))
    spec = QuantizeSpec(weight.n, k, weight.format, form)
    found, wanted = cpu_backend(isa).quantize(weight, spec), ReferenceBackend().quantize(weight, spec)
    for name in ("codes", "scale") if form == "fp8" else ("packed", "block_scale", "weight_scale_2"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.shape == b.shape
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["mse", "4over6"])
def test_the_native_search_finds_the_scales_of_the_definition(isa: str, method: Any, dtype: Any, weighed: bool) -> None:
    k = 208
    weight = DenseWeight(torch.cat([hard_weight(k, dtype), 2.0 ** torch.randint(-30, 4, (40, k)).to(dtype)]))
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)) ** 4 if weighed else None
    spec = QuantizeSpec(weight.n, k, weight.format, "nvfp4", method)
    for scale_2 in (None, torch.tensor(0.37), torch.tensor(1e-42), torch.tensor(0.0)):  # shared ones need not fit
        found = cpu_backend(isa).quantize(weight, spec, scale_2, importance)
        wanted = ReferenceBackend().quantize(weight, spec, scale_2, importance)
        for name in ("packed", "block_scale", "weight_scale_2"):
            a, b = (getattr(one, name).view(torch.uint8) for one in (found, wanted))
            assert torch.equal(a, b), (name, scale_2)


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_weight_of_zeros_stays_zero(isa: str, form: Any) -> None:
    weight = DenseWeight(torch.zeros(5, 32, dtype=torch.bfloat16))
    assert not bool(cpu_backend(isa).quantize(weight, QuantizeSpec(5, 32, "bf16", form)).dequantize().any())


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(isa: str, form: Any, bad: float) -> None:
    weight = DenseWeight(torch.ones(20, 48, dtype=torch.bfloat16))
    weight.weight[17, 40] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        cpu_backend(isa).quantize(weight, QuantizeSpec(20, 48, "bf16", form))


def test_nvfp4_needs_whole_blocks() -> None:
    with pytest.raises(NVFP4ShapeError, match="multiple of 16"):
        cpu_backend().quantize(DenseWeight(torch.ones(4, 20)), QuantizeSpec(4, 20, "fp32", "nvfp4"))
