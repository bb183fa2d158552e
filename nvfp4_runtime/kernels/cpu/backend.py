"""The native CPU backend: our own vector kernels, built from csrc/ at install time where a C++ compiler exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    AttentionKernel,
    LinearKernel,
    LinearSpec,
    NormSpec,
    OpSpec,
    PagedAttentionSpec,
    RMSNormKernel,
    RopeKernel,
    RopeSpec,
)
from nvfp4_runtime.nvfp4.weight import Weight

NOT_BUILT = "extension not built: install a C++17 compiler and run `pip install .` again"


class CPUBackend:
    """Placeholder until the extension lands: refuses everything with the reason."""

    name = "cpu"
    row_invariant = True

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def refuses(self, spec: OpSpec) -> str | None:
        return NOT_BUILT

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        raise AssertionError(NOT_BUILT)

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        raise AssertionError(NOT_BUILT)

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        raise AssertionError(NOT_BUILT)

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        raise AssertionError(NOT_BUILT)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        raise AssertionError(NOT_BUILT)

    def describe(self) -> dict[str, Any]:
        return {"status": NOT_BUILT}
