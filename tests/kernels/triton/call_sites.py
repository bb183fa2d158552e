"""Layers called as in serving, up to the launch: Triton binds and specialises real arguments and compiles for a GPU
that is not here. What ahead.py compiles by declaration is compiled here by use: a 1 that becomes a constant, a None.

    python -m tests.kernels.triton.call_sites 90

without TRITON_INTERPRET. Results are never computed; a kernel that does not compile ends the process with its error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearSpec
from nvfp4_runtime.kernels.triton.grouped_linear import triton_grouped_linear
from nvfp4_runtime.kernels.triton.linear import triton_linear
from nvfp4_runtime.kernels.triton.scratch import Scratch
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight
from tests.kernels.conftest import random_nvfp4, random_tensor

K = 512


class NoDriver:
    """What JITFunction.run asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def never_launch(capability: int) -> list[str]:
    """From here on kernels of this process are bound and compiled but not launched; their names, as they come."""
    triton.runtime.driver.set_active(NoDriver(capability))
    names: list[str] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(1 <= size < 2**31 for size in grid), f"{self.__name__}: grid {grid}"
        names.append(self.__name__)
        return original(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run
    return names


def linears(scratch: Scratch) -> None:
    """M = 1 (splits, no bias), many rows (written out), W4A4, FP8 with and without scales along K."""
    for numerics, rows in (("w4a16", (1, 100, 200)), ("w4a4", (1,))):
        spec = LinearSpec(64, K, "nvfp4", numerics, "bfloat16", "bfloat16")
        kernel = triton_linear(random_nvfp4(64, K, seed=1, input_scale=0.01), spec, scratch)
        for m in rows:
            assert kernel(random_tensor(m, K, seed=m)).shape == (m, 64)
    codes = torch.zeros(64, K, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for block in ((1, K), (64, 128)):
        weight = FP8Weight(codes, torch.ones(64 // block[0], K // block[1]), block, bias=torch.zeros(64))
        triton_linear(weight, LinearSpec(64, K, "fp8", None, "bfloat16", "bfloat16", block), scratch)(
            random_tensor(1, K, seed=1)
        )


def experts(scratch: Scratch) -> None:
    """One row for two experts."""
    dense: list[Weight] = [DenseWeight(random_tensor(64, K, seed=e)) for e in range(2)]
    packed: list[Weight] = [random_nvfp4(64, K, seed=e, bias=True, input_scale=0.01) for e in range(2)]
    offsets = torch.tensor([0, 0, 1], dtype=torch.int32)
    for weights, numerics in ((dense, None), (packed, "w4a4")):
        spec = GroupedLinearSpec(2, 64, K, weights[0].format, numerics, "bfloat16", "bfloat16")  # type: ignore[arg-type]
        assert triton_grouped_linear(weights, spec, scratch)(random_tensor(1, K, seed=1), offsets).shape == (1, 64)


def main(argv: Sequence[str] | None = None) -> int:
    names = never_launch(int((argv or sys.argv[1:])[0]))
    scratch = Scratch(torch.device("cpu"))
    linears(scratch)
    experts(scratch)
    print(" ".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
