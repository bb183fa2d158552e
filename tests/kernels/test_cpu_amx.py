"""The amx variant gives the bits of avx512 for any rows, shapes and values; only its speed differs."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearSpec
from tests.kernels.conftest import ISAS, cpu_backend, random_nvfp4, random_tensor, same_bits
from tests.kernels.test_cpu_mxfp4 import random_mxfp4

SHAPES = [(16, 16), (1, 16), (17, 32), (40, 48), (33, 112), (96, 576), (50, 1536)]
NAMES: dict[torch.dtype, Any] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
CPUINFO = Path("/proc/cpuinfo")


def processor_has_tiles() -> bool:
    return CPUINFO.exists() and {"amx_tile", "amx_bf16"} <= set(CPUINFO.read_text().split())


def linux_grants_tiles() -> bool:
    """Asks as isa.cpp does: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA, through arch_prctl."""
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (158, 0x1023, 18))) == 0


@pytest.fixture(autouse=True)
def amx() -> None:
    """A skip with its reason where the variant cannot run, a failure where it could and was not built."""
    if "amx" in ISAS:
        return
    if not processor_has_tiles():
        pytest.skip("this processor has no AMX tiles of bfloat16")
    if not linux_grants_tiles():
        pytest.skip("Linux refuses tiles to this process")
    # The variant needs avx512's instructions. That avx2vnni was built shows a compiler new enough for tiles: GCC 11.
    if not {"avx512", "avx2vnni"} <= set(ISAS):
        pytest.skip("the extension is not built or lacks AVX-512 or AVX-VNNI, so its compiler may be too old for tiles")
    pytest.fail("processor, Linux and compiler know tiles, the extension lacks amx: see NVFP4_AMX in CMakeLists.txt")


def both(weight: Any, spec: LinearSpec, x: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    tiles, rows = (cpu_backend(isa, threads).linear(weight, spec)(x) for isa in ("amx", "avx512"))
    return tiles, rows


def hostile(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows from the smallest to the largest magnitudes, with zero blocks, NaN and infinities among them."""
    x = random_tensor(m, k, seed=m, dtype=torch.float32) * torch.logspace(-40, 37, m).unsqueeze(1)
    x[0, :16] = 0
    x[m // 2, k // 2] = float("nan")
    x[m // 3, k - 1] = float("inf")
    x[m // 4, 0] = -0.0
    x[m - 1] *= -1
    return x.to(dtype)


def test_the_variant_is_offered_first() -> None:
    assert ISAS[0] == "amx"


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("numerics", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("dtype", list(NAMES))
def test_any_number_of_rows_has_the_bits_of_avx512(n: int, k: int, numerics: Any, dtype: torch.dtype) -> None:
    for out in NAMES:
        weight = random_nvfp4(n, k, seed=n + k, bias=out == torch.float32, input_scale=0.004)
        spec = LinearSpec(n, k, "nvfp4", numerics, NAMES[dtype], NAMES[out])
        for m in [*range(1, 41), 129]:
            tiles, rows = both(weight, spec, random_tensor(m, k, seed=m, dtype=dtype))
            assert same_bits(tiles, rows), f"{m} rows"


@pytest.mark.parametrize("numerics", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("m", [7, 10, 16, 23, 40])
def test_hostile_rows_have_the_bits_of_avx512(numerics: Any, m: int) -> None:
    for k in (48, 272, 576):  # groups one by one, sixteen at once, and both
        weight = random_nvfp4(40, k, seed=k, input_scale=0.004)
        for dtype in NAMES:
            spec = LinearSpec(40, k, "nvfp4", numerics, NAMES[dtype], "float32")
            tiles, rows = both(weight, spec, hostile(m, k, dtype))
            assert same_bits(tiles, rows), f"K={k} {dtype}"


@pytest.mark.parametrize("numerics", ["w4a16", "w4a8"])
def test_a_prompts_rows_on_two_threads_have_the_bits_of_each_row_alone(numerics: Any) -> None:
    weight, x = random_nvfp4(96, 576, seed=3), random_tensor(600, 576, seed=4)
    spec = LinearSpec(96, 576, "nvfp4", numerics, "bfloat16", "bfloat16")
    tiles, rows = both(weight, spec, x, threads=2)
    assert same_bits(tiles, rows)
    linear = cpu_backend("amx").linear(weight, spec)
    for i in (0, 15, 16, 527, 528, 599):
        assert same_bits(tiles[i : i + 1], linear(x[i : i + 1])), f"row {i}"


def test_mxfp4_weights_have_the_bits_of_avx512() -> None:
    weight = random_mxfp4(40, 96, seed=1, bias=True)
    spec = LinearSpec(40, 96, "mxfp4", None, "bfloat16", "float32")
    for m in (3, 7, 11, 37):
        tiles, rows = both(weight, spec, random_tensor(m, 96, seed=m))
        assert same_bits(tiles, rows), f"{m} rows"


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
def test_grouped_experts_have_the_bits_of_avx512(numerics: Any) -> None:
    counts = [0, 5, 1, 17, 33, 2, 11, 7, 16, 0]
    weights = [random_nvfp4(72, 144, seed=e, input_scale=0.002 * (1 + e)) for e in range(len(counts))]
    spec = GroupedLinearSpec(len(counts), 72, 144, "nvfp4", numerics, "bfloat16", "float32", None)
    x, offsets = random_tensor(sum(counts), 144, seed=9), torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    tiles, rows = (cpu_backend(isa, 2).grouped_linear(weights, spec)(x, offsets) for isa in ("amx", "avx512"))
    assert same_bits(tiles, rows)
