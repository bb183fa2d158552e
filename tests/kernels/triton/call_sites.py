"""Layers called as in serving, up to the launch: Triton binds and specialises real arguments and compiles for a GPU
that is not here. What ahead.py compiles by declaration is compiled here by use: a 1 that becomes a constant, a None.

    python -m tests.kernels.triton.call_sites 90

without TRITON_INTERPRET. Results are never computed; a kernel that does not compile ends the process with its error.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    DeltaSpec,
    GroupedLinearSpec,
    LinearSpec,
    Mamba2Spec,
    NormSpec,
    PagedAttentionSpec,
    ReluSquaredSpec,
    RopeSpec,
)
from nvfp4_runtime.kernels.triton.gated_delta import TritonDelta
from nvfp4_runtime.kernels.triton.grouped_linear import triton_grouped_linear
from nvfp4_runtime.kernels.triton.linear import triton_linear
from nvfp4_runtime.kernels.triton.mamba2 import TritonMamba2
from nvfp4_runtime.kernels.triton.paged_attention import TritonPagedAttention
from nvfp4_runtime.kernels.triton.relu_squared import TritonReluSquared
from nvfp4_runtime.kernels.triton.rms_norm import TritonRMSNorm
from nvfp4_runtime.kernels.triton.rope_and_cache import TritonRope
from nvfp4_runtime.kernels.triton.sampling import TritonSampler
from nvfp4_runtime.kernels.triton.scratch import Scratch
from nvfp4_runtime.kernels.triton.silu_mul import TritonSiluMul
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight
from tests.kernels.conftest import Sequence, make_batch, random_cache, random_nvfp4, random_tensor
from tests.kernels.triton.test_states import Rule, step_of

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


def one_decode_step() -> None:
    """One token of one sequence through what stands between the linears, FP8 cache, and a greedy choice."""
    norm = TritonRMSNorm(NormSpec(K, "bfloat16", "bfloat16"))
    norm(random_tensor(1, K, seed=1), random_tensor(1, K, seed=2), random_tensor(K, seed=3), 1e-5)
    TritonSiluMul(ActivationSpec(K, "bfloat16", "bfloat16"))(random_tensor(1, 2 * K, seed=1))
    kv = random_cache(8, 2, 16, 64, seed=1, dtype=torch.float8_e4m3fn)
    batch = dataclasses.replace(make_batch([Sequence(40, 1)], 16, 8), max_query_len=1, max_seq_len=40)
    angles = random_tensor(64, 32, seed=4, dtype=torch.float32)
    rope = TritonRope(RopeSpec(4, 2, 64, 64, False, "fp8", "bfloat16"))
    qkv = random_tensor(1, 8 * 64, seed=5)
    q = rope(qkv, batch.positions, angles.cos(), angles.sin(), None, None, 1e-5, kv, batch.slot_mapping)
    attention = TritonPagedAttention(PagedAttentionSpec(4, 2, 64, None, "fp8", "bfloat16", "bfloat16"))
    assert attention(q, kv, batch, 0.125).shape == (1, 256)
    TritonSampler()(random_tensor(1, 1000, seed=6, dtype=torch.float32), None)


def recurrences() -> None:
    """One token of one sequence, whose slot is 1; then a prompt of two, and relu(x)^2 of one row."""
    for rule in (
        Rule(Mamba2Spec(4, 16, 16, 2, 4, "bfloat16", "bfloat16")),
        Rule(DeltaSpec(2, 4, 16, 16, 4, "bfloat16")),
    ):
        spec, state = rule.spec, rule.made.empty_state(rule.spec)
        kernel: Any = TritonMamba2(spec) if isinstance(spec, Mamba2Spec) else TritonDelta(spec, torch.device("cpu"))
        for count in (1, 2):
            batch = step_of([(1, 0, count)])
            assert kernel(*rule.tokens(count, 1), rule.weights, state, batch).shape[0] == count
    TritonReluSquared(ReluSquaredSpec(K, "bfloat16", "bfloat16"))(random_tensor(1, K, seed=1))


def main(argv: list[str] | None = None) -> int:
    names = never_launch(int((argv or sys.argv[1:])[0]))
    scratch = Scratch(torch.device("cpu"))
    linears(scratch)
    experts(scratch)
    one_decode_step()
    recurrences()
    print(" ".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
