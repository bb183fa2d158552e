"""The reference backend: every op in plain PyTorch, written to be read. It defines what the others must compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.config import Numerics
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
    refuses_kv,
)
from nvfp4_runtime.kernels.reference.linear import ReferenceLinear
from nvfp4_runtime.kernels.reference.paged_attention import ReferencePagedAttention
from nvfp4_runtime.kernels.reference.rms_norm import rms_norm
from nvfp4_runtime.kernels.reference.rope_and_cache import ReferenceRope
from nvfp4_runtime.kernels.reference.silu_mul import silu_mul
from nvfp4_runtime.nvfp4.weight import Weight


class ReferenceBackend:
    """Runs every op on any device PyTorch runs on.

    threads  PyTorch's threads for the whole process; None leaves them as they are

    Not `row_invariant`: the math library may sum in another order when M changes, so a row's last bit can depend on
    the rows beside it.
    """

    name = "reference"
    fastest_numerics: Numerics = "w4a16"  # W4A4 adds the quantisation of activations to the same products
    row_invariant = False

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)

    def refuses(self, spec: OpSpec) -> str | None:
        if spec.dtype == "float16":
            return "activations are bfloat16 or float32, asked for float16"
        if isinstance(spec, RopeSpec | PagedAttentionSpec):
            return refuses_kv(spec)
        return None

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        return ReferenceLinear(weight, spec)

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        return functools.partial(rms_norm, out_dtype=getattr(torch, spec.out_dtype))

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        return functools.partial(silu_mul, out_dtype=getattr(torch, spec.out_dtype))

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        return ReferenceRope(spec)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        return ReferencePagedAttention(spec)

    def describe(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
