"""Grouped linears: every row has the bits its expert's plain kernel gives it; offsets that lie are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nvfp4_runtime.errors import ConfigError, KernelError
from nvfp4_runtime.kernels.ops import GroupedLinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight
from tests.kernels.conftest import cpu_backend, random_nvfp4, random_tensor, same_bits
from tests.kernels.test_cpu_fp8 import random_fp8

N, K = 136, 144  # neither the last panel nor the last block of 64 is full


def experts(kind: str, count: int) -> list[Weight]:
    if kind == "bf16":
        return [DenseWeight(random_tensor(N, K, seed=e)) for e in range(count)]
    if kind == "fp8":
        return [random_fp8(N, K, (1, K), seed=e) for e in range(count)]
    return [random_nvfp4(N, K, seed=e, bias=True, input_scale=0.002 * (1 + e)) for e in range(count)]


def spec_of(weights: Sequence[Weight], kind: str) -> GroupedLinearSpec:
    numerics: Any = kind if kind in ("w4a16", "w4a4") else None
    block = (1, K) if kind == "fp8" else None
    return GroupedLinearSpec(len(weights), N, K, weights[0].format, numerics, "bfloat16", "float32", block)


def bounds_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("kind", ["w4a16", "w4a4", "bf16", "fp8"])
@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [0, 5, 1], [17, 33, 2], [1, 1, 1], [0, 0, 500]])
def test_each_row_equals_its_experts_plain_kernel(isa: str, kind: str, counts: list[int]) -> None:
    weights = experts(kind, len(counts))
    spec, backend = spec_of(weights, kind), cpu_backend(isa)
    x, offsets = random_tensor(sum(counts), K, seed=9), bounds_of(counts)
    y = backend.grouped_linear(weights, spec)(x, offsets)
    assert y.shape == (sum(counts), N)
    plain = cpu_backend(isa, 1)
    for e, weight in enumerate(weights):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert same_bits(y[rows], plain.linear(weight, spec.each)(x[rows])), f"expert {e}"


def test_random_routings_over_many_experts_agree_with_the_reference(isa: str) -> None:
    draw = random.Random(5)
    for kind in ("w4a16", "w4a4", "fp8", "bf16"):
        weights = experts(kind, 20)
        spec = spec_of(weights, kind)
        ours, theirs = (b.grouped_linear(weights, spec) for b in (cpu_backend(isa, 3), ReferenceBackend()))
        for _ in range(3):
            counts = [draw.choice([0, 0, 1, 2, 9, 18]) for _ in weights]
            x, offsets = random_tensor(sum(counts), K, seed=sum(counts)), bounds_of(counts)
            # both sum 144 products in FP32: 2 * 144 * 2^-24 of the sum of their sizes, which is at most sqrt(144) norms
            size = theirs(x.abs(), offsets).abs().max() if len(x) else torch.ones(())
            torch.testing.assert_close(ours(x, offsets), theirs(x, offsets), rtol=1e-4, atol=float(size) * 2e-4)


def hostile() -> dict[str, tuple[torch.Tensor, str]]:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return {
        "falling": (ints(0, 5, 3, 8), r"offsets\[2\] is 3, below offsets\[1\] = 5"),
        "negative": (ints(0, -1, 3, 8), r"offsets\[1\] is -1"),
        "beyond": (ints(0, 2, 900, 8), r"offsets\[3\] is 8, below offsets\[2\] = 900"),
        "late start": (ints(1, 2, 3, 8), "run from 1 to 8"),
        "early end": (ints(0, 2, 3, 7), "x has 8 rows"),
        "too long": (ints(0, 2, 3, 9), "x has 8 rows"),
        "an expert short": (ints(0, 2, 8), r"int32 tensor \[4\] for 3 experts"),
        "int64": (torch.tensor([0, 2, 3, 8]), "found torch.int64"),
        "two axes": (ints(0, 2, 3, 8).view(1, 4), "found torch.int32"),
    }


@pytest.mark.parametrize("case", hostile().keys())
@pytest.mark.parametrize("kind", ["w4a16", "fp8"])
def test_offsets_that_lie_are_refused_with_what_was_found(case: str, kind: str) -> None:
    offsets, message = hostile()[case]
    weights = experts(kind, 3)
    for backend in (cpu_backend(), ReferenceBackend()):
        kernel = backend.grouped_linear(weights, spec_of(weights, kind))
        with pytest.raises(KernelError, match=message):
            kernel(random_tensor(8, K, seed=1), offsets)


def test_wrong_activations_are_refused() -> None:
    weights = experts("w4a16", 2)
    kernel = cpu_backend().grouped_linear(weights, spec_of(weights, "w4a16"))
    with pytest.raises(KernelError, match="x: expected a contiguous"):
        kernel(random_tensor(8, K + 16, seed=1), bounds_of([4, 4]))


def test_the_registry_reports_experts_as_one_group_and_refuses_odd_ones() -> None:
    kernels = Kernels([ReferenceBackend()], "bfloat16", "w4a16")
    kernels.grouped_linear("experts", experts("fp8", 3))
    (choice,) = kernels.choices
    assert (choice.group, choice.stored, choice.numerics) == ("experts", "fp8", "w8a16")
    assert choice.num_bytes == 3 * N * (K + 4)
    with pytest.raises(KernelError, match="expert 1 is"):
        kernels.grouped_linear("experts", [experts("fp8", 1)[0], experts("bf16", 1)[0]])
    with pytest.raises(KernelError, match="every expert has a bias or none"):
        kernels.grouped_linear("experts", [random_nvfp4(N, K, 1, bias=True), random_nvfp4(N, K, 2)])
    with pytest.raises(KernelError, match="at least one expert"):
        kernels.grouped_linear("experts", [])
    with pytest.raises(ConfigError, match="needs an input_scale"):
        Kernels([ReferenceBackend()], "bfloat16", "w4a4").grouped_linear("experts", [random_nvfp4(N, K, 1)])
