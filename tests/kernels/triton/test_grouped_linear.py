"""Rows sorted by expert: each result is what the expert's own weight gives, whatever the routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import GroupedLinearSpec
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.kernels.triton.grouped_linear import row_tile
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight
from tests.kernels.conftest import random_nvfp4, random_tensor
from tests.kernels.numerics import INPUT_SCALE
from tests.kernels.triton.test_linear import assert_exact_but_for_sums

N, K, EXPERTS = 70, 96, 5
ROUTINGS = [[0, 3, 3, 20, 20, 24], [0, 0, 0, 0, 0, 1], [0, 33, 34, 34, 40, 41]]


def experts(form: str) -> list[Weight]:
    g = torch.Generator().manual_seed(7)
    if form == "nvfp4":
        return [random_nvfp4(N, K, seed=e, bias=True, input_scale=INPUT_SCALE * (e + 1)) for e in range(EXPERTS)]
    if form == "fp8":
        codes = [torch.randint(0, 0x7F, (N, K), generator=g, dtype=torch.uint8) for _ in range(EXPERTS)]
        return [FP8Weight(c.view(torch.float8_e4m3fn), torch.rand(2, 2, generator=g) + 0.1, (64, 64)) for c in codes]
    if form.startswith("mxfp4"):
        spans = [8] * (EXPERTS - 1) + [60 if form.endswith("wide") else 8]
        return [
            MXFP4Weight(
                torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8),
                torch.randint(100, 100 + span, (N, K // 32), generator=g).to(torch.uint8),
            )
            for span in spans
        ]
    return [DenseWeight(random_tensor(N, K, seed=e, dtype=getattr(torch, form))) for e in range(EXPERTS)]


def exact(weight: Weight, numerics: Any) -> torch.Tensor:
    if isinstance(weight, NVFP4Weight):
        scale = weight.row_scale_2()
        if numerics == "w4a4":
            scale = torch.tensor(weight.input_scale) * scale
        return weight.operand().double() * scale.double().unsqueeze(1)
    if isinstance(weight, FP8Weight):
        return weight.codes.double() * weight.spread_scale().double()
    return weight.weight.double() if isinstance(weight, DenseWeight) else weight.dequantize().double()


def spec_of(weights: Sequence[Weight], numerics: Any) -> GroupedLinearSpec:
    one = weights[0]
    block = one.block if isinstance(one, FP8Weight) else None
    return GroupedLinearSpec(len(weights), N, K, one.format, numerics, "bfloat16", "float32", block)


@pytest.mark.parametrize("bounds", ROUTINGS, ids=["uneven", "one row", "two tiles"])
@pytest.mark.parametrize(
    ("form", "numerics"),
    [
        ("nvfp4", "w4a16"),
        ("nvfp4", "w4a4"),
        ("fp8", None),
        ("mxfp4", None),
        ("mxfp4 wide", None),
        ("bfloat16", None),
        ("float16", None),
    ],
)
def test_each_row_meets_its_own_expert(
    triton_backend: TritonBackend, form: str, numerics: Any, bounds: list[int]
) -> None:
    weights, x = experts(form), random_tensor(bounds[-1], K, seed=1)
    spec = spec_of(weights, numerics)
    assert triton_backend.refuses(spec) is None
    offsets = torch.tensor(bounds, dtype=torch.int32, device=triton_backend.device)
    y = triton_backend.grouped_linear(weights, spec)(x.to(triton_backend.device), offsets).cpu()
    for weight, start, stop in zip(weights, bounds, bounds[1:], strict=False):
        rows = x[start:stop]
        if numerics == "w4a4" and isinstance(weight, NVFP4Weight):
            rows = codec.activation_operand(rows, torch.tensor(weight.input_scale))
        if stop > start:
            assert_exact_but_for_sums(y[start:stop], rows, exact(weight, numerics), weight.bias)


def test_offsets_of_another_form_are_refused(triton_backend: TritonBackend) -> None:
    weights = experts("bfloat16")
    kernel = triton_backend.grouped_linear(weights, spec_of(weights, None))
    x = random_tensor(2, K, seed=1).to(triton_backend.device)
    for wrong in (torch.tensor([0, 2], dtype=torch.int32), torch.zeros(EXPERTS + 1, dtype=torch.int64)):
        with pytest.raises(KernelError, match="offsets: expected an int32"):
            kernel(x, wrong)


def test_offsets_beyond_the_rows_write_nothing_outside(triton_backend: TritonBackend) -> None:
    weights = experts("bfloat16")
    kernel = triton_backend.grouped_linear(weights, spec_of(weights, None))
    x = random_tensor(4, K, seed=1).to(triton_backend.device)
    y = kernel(x, torch.tensor([0, 2, 99, 99, 99, 99], dtype=torch.int32, device=triton_backend.device))
    assert y.shape == (4, N)
    assert_exact_but_for_sums(y[:2].cpu(), x[:2].cpu(), exact(weights[0], None), None)


@pytest.mark.parametrize(("rows", "tile"), [(1, 16), (8, 16), (1000, 16), (2048, 32), (100_000, 64)])
def test_the_tile_follows_the_average_routing(rows: int, tile: int) -> None:
    assert row_tile(rows, 128) == tile
