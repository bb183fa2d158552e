"""The reference backend: every op in plain PyTorch, written to be read. It defines what the others must compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    AttentionKernel,
    DeltaKernel,
    DeltaSpec,
    GroupedLinearKernel,
    GroupedLinearSpec,
    LinearKernel,
    LinearSpec,
    Mamba2Kernel,
    Mamba2Spec,
    MLAKernel,
    MLASpec,
    NormSpec,
    OpSpec,
    PagedAttentionSpec,
    QuantizeSpec,
    ReluSquaredSpec,
    RMSNormKernel,
    RopeKernel,
    RopeSpec,
    refuses_kv,
)
from nvfp4_runtime.kernels.reference.gated_delta import ReferenceDelta
from nvfp4_runtime.kernels.reference.grouped_linear import ReferenceGroupedLinear
from nvfp4_runtime.kernels.reference.linear import reference_linear
from nvfp4_runtime.kernels.reference.mamba2 import ReferenceMamba2
from nvfp4_runtime.kernels.reference.mla import ReferenceMLA
from nvfp4_runtime.kernels.reference.paged_attention import ReferencePagedAttention
from nvfp4_runtime.kernels.reference.relu_squared import relu_squared
from nvfp4_runtime.kernels.reference.rms_norm import rms_norm
from nvfp4_runtime.kernels.reference.rope_and_cache import ReferenceRope
from nvfp4_runtime.kernels.reference.silu_mul import silu_mul
from nvfp4_runtime.kernels.upload import upload
from nvfp4_runtime.nvfp4 import block_scales, fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight


class ReferenceBackend:
    """Runs every op on any device PyTorch runs on.

    threads  PyTorch's threads for the whole process; None leaves them as they are
    device   where weights are kept; None: where they are

    Not `row_invariant`: the math library may sum in another order when M changes, so a row's last bit can depend on
    the rows beside it.
    """

    name = "reference"
    fastest_numerics: Numerics = "w4a16"  # W4A4 adds the quantisation of activations to the same products
    row_invariant = False

    def __init__(self, threads: int | None = None, device: torch.device | None = None) -> None:
        self.device = device
        if threads is not None:
            torch.set_num_threads(threads)

    def refuses(self, spec: OpSpec) -> str | None:
        if isinstance(spec, QuantizeSpec):
            return None
        if spec.dtype == "float16":
            return "activations are bfloat16 or float32, asked for float16"
        if isinstance(spec, LinearSpec | GroupedLinearSpec) and spec.weight != "nvfp4" and spec.numerics is not None:
            return f"{spec.weight} weights have no choice of numerics, asked for {spec.numerics}"
        if isinstance(spec, RopeSpec | PagedAttentionSpec):
            return refuses_kv(spec)
        return None

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        return reference_linear(self._placed(weight), spec)

    def grouped_linear(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> GroupedLinearKernel:
        return ReferenceGroupedLinear([self._placed(weight) for weight in weights], spec)

    def quantize(
        self,
        weight: DenseWeight,
        spec: QuantizeSpec,
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight:
        if spec.form == "fp8":
            codes, scale = fp8.quantize_rows(weight.weight)
            return FP8Weight(codes, scale, (1, weight.k), bias=weight.bias)
        if scale_2 is None:
            scale_2 = block_scales.tensor_scale(weight.weight.abs().max(), spec.method)
        packed, block_scale = block_scales.quantize(weight.weight, scale_2, spec.method, importance)
        return NVFP4Weight(packed, block_scale, scale_2.reshape(1), (weight.n,), bias=weight.bias)

    def largest(self, weight: Tensor) -> Tensor:
        amax = weight.abs().max().to(torch.float32)
        return torch.where(torch.isfinite(amax), amax, torch.full_like(amax, torch.nan))

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        return functools.partial(rms_norm, out_dtype=getattr(torch, spec.out_dtype))

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        return functools.partial(silu_mul, out_dtype=getattr(torch, spec.out_dtype), by=spec.gate)

    def relu_squared(self, spec: ReluSquaredSpec) -> Callable[[Tensor], Tensor]:
        return functools.partial(relu_squared, out_dtype=getattr(torch, spec.out_dtype))

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        return ReferenceRope(spec)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        return ReferencePagedAttention(spec)

    def _placed(self, weight: Weight) -> Weight:
        return weight if self.device is None else upload(weight, self.device)

    def mla_decode(self, spec: MLASpec) -> MLAKernel:
        return ReferenceMLA(spec)

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel:
        return ReferenceMamba2(spec)

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel:
        return ReferenceDelta(spec)

    def describe(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
