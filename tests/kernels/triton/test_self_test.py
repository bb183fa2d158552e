"""The self-test over Triton's kernels: what a server on a GPU compares before it is ready."""

from __future__ import annotations

import pytest

from nvfp4_runtime.kernels.ops import DeltaSpec, Mamba2Spec, MLASpec, PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.self_test import self_test
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from tests.kernels.test_self_test import WEIGHTS, nvfp4


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
def test_every_kernel_passes_its_own_self_test(triton_backend: TritonBackend, numerics: str) -> None:
    kernels = Kernels([triton_backend], "bfloat16", numerics, "bfloat16", samples={})  # type: ignore[arg-type]
    for name in ("nvfp4", "nvfp4 fused", "fp8 rows", "mxfp4", "bf16"):
        kernels.linear(name, WEIGHTS[name]())
    kernels.grouped_linear("experts", [nvfp4(80, 64, seed) for seed in range(3)])
    kernels.rms_norm(64)
    kernels.silu_mul(96)
    kernels.rope_and_cache(RopeSpec(4, 2, 32, 32, True, "fp8", kernels.stream))
    kernels.paged_attention(PagedAttentionSpec(4, 2, 32, None, "fp8", kernels.stream, "bfloat16"))
    kernels.mla_decode(MLASpec(4, 32, 16, "bfloat16", "bfloat16"))
    kernels.relu_squared(96)
    kernels.mamba2(Mamba2Spec(4, 16, 16, 2, 4, kernels.stream, "bfloat16"))
    kernels.gated_delta(DeltaSpec(2, 4, 16, 16, 4, kernels.stream))
    assert self_test(kernels) == 14
