"""The Triton backend: one kernel language from Ampere to Blackwell, compiled by what is installed with PyTorch.

Importing this module needs neither triton nor a GPU. Without a GPU the kernels run under Triton's interpreter where the
process was started with TRITON_INTERPRET=1, on CPU tensors and slowly: that is for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
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
from nvfp4_runtime.kernels.triton.scratch import Scratch
from nvfp4_runtime.kernels.upload import upload
from nvfp4_runtime.nvfp4 import block_scales, fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

# What kernels are compiled for in CI (compilation.TARGETS), and 8.6, which has 8.0's instructions and 8.9's shared
# memory. A set, not a ladder: 12.0 lacks instructions that 10.0 has.
CAPABILITIES = frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)})
NOT_INSTALLED = "triton is not installed: it comes with PyTorch's CUDA builds, or pip install 'triton>=3.6,<3.10'"
NO_DEVICE = "no CUDA device"
FLOATS = ("bfloat16", "float32")
NUMERICS = ("w4a16", "w4a4")
MOST_STATE = 1024  # values in a row of a state: more than a program's registers hold


class TritonBackend:
    """Every op of kernels/ops.py on one NVIDIA GPU.

    device  a CUDA device; None: the current one

    `missing` says why it cannot run here, or is None. Not `row_invariant`: the number of rows decides tiles and, above
    the kernels' largest M, hands the product to cuBLAS. Within one bucket of M (see tuning.py) a row's bits depend on
    that row alone.
    """

    name = "triton"
    fastest_numerics: Numerics = "w4a16"  # W4A4 adds the quantisation of activations to the same products
    row_invariant = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.missing = _missing(device)
        self.interpreted = self.missing is None and _interpreted()
        self.device = torch.device("cpu")
        if self.missing is None and not self.interpreted:
            self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # cuBLAS's sums are FP32 as well
        self.scratch = Scratch(self.device)

    def refuses(self, spec: OpSpec) -> str | None:
        if self.missing is not None:
            return self.missing
        if isinstance(spec, QuantizeSpec):
            return None
        if spec.dtype not in FLOATS:
            return f"activations are bfloat16 or float32, asked for {spec.dtype}"
        if not isinstance(spec, RopeSpec | DeltaSpec) and spec.out_dtype not in FLOATS:
            return f"results are bfloat16 or float32, asked for {spec.out_dtype}"
        if isinstance(spec, LinearSpec | GroupedLinearSpec):
            return _refuses_linear(spec)
        if isinstance(spec, RopeSpec | PagedAttentionSpec):
            return refuses_kv(spec)
        return _refuses_states(spec) if isinstance(spec, Mamba2Spec | DeltaSpec) else None

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        from nvfp4_runtime.kernels.triton.linear import triton_linear

        return triton_linear(weight, spec, self.scratch)

    def grouped_linear(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> GroupedLinearKernel:
        from nvfp4_runtime.kernels.triton.grouped_linear import triton_grouped_linear

        return triton_grouped_linear(weights, spec, self.scratch)

    def quantize(
        self,
        weight: DenseWeight,
        spec: QuantizeSpec,
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight:
        """The format's own functions, run where the weight will live; every operation in them is rounded correctly."""
        weight = upload(weight, self.device)
        if spec.form == "fp8":
            codes, scale = fp8.quantize_rows(weight.weight)
            return FP8Weight(codes, scale, (1, weight.k), bias=weight.bias)
        if scale_2 is None:
            scale_2 = block_scales.tensor_scale(weight.weight.abs().max(), spec.method)
        scale_2 = scale_2.to(self.device)
        importance = None if importance is None else importance.to(self.device)
        packed, block_scale = block_scales.quantize(weight.weight, scale_2, spec.method, importance)
        return NVFP4Weight(packed, block_scale, scale_2.reshape(1), (weight.n,), bias=weight.bias)

    def largest(self, weight: Tensor) -> Tensor:
        amax = weight.to(self.device).abs().max().to(torch.float32)
        return torch.where(torch.isfinite(amax), amax, torch.full_like(amax, torch.nan))

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        from nvfp4_runtime.kernels.triton.rms_norm import TritonRMSNorm

        return TritonRMSNorm(spec)

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        from nvfp4_runtime.kernels.triton.silu_mul import TritonSiluMul

        return TritonSiluMul(spec)

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        from nvfp4_runtime.kernels.triton.rope_and_cache import TritonRope

        return TritonRope(spec)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        from nvfp4_runtime.kernels.triton.paged_attention import TritonPagedAttention

        return TritonPagedAttention(spec)

    def mla_decode(self, spec: MLASpec) -> MLAKernel:
        from nvfp4_runtime.kernels.triton.mla import TritonMLA

        return TritonMLA(spec)

    def relu_squared(self, spec: ReluSquaredSpec) -> Callable[[Tensor], Tensor]:
        from nvfp4_runtime.kernels.triton.relu_squared import TritonReluSquared

        return TritonReluSquared(spec)

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel:
        from nvfp4_runtime.kernels.triton.mamba2 import TritonMamba2

        return TritonMamba2(spec)

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel:
        from nvfp4_runtime.kernels.triton.gated_delta import TritonDelta

        return TritonDelta(spec, self.device)

    def describe(self) -> dict[str, Any]:
        if self.missing is not None:
            return {"status": self.missing}
        found = {"triton": metadata.version("triton"), "torch": torch.__version__}
        if self.interpreted:
            return found | {"device": "none: Triton's interpreter"}
        properties = torch.cuda.get_device_properties(self.device)
        return found | {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
        }


def _missing(device: torch.device | None) -> str | None:
    """Why no kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    if _interpreted():
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():  # ROCm also answers to torch.cuda
        return NO_DEVICE
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in sorted(CAPABILITIES))
        return f"needs compute capability {known}; found {capability[0]}.{capability[1]}"
    return None


def _interpreted() -> bool:
    """Whether kernels decorated in this process run under Triton's interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _refuses_linear(spec: LinearSpec | GroupedLinearSpec) -> str | None:
    if spec.weight == "nvfp4" and spec.numerics not in NUMERICS:
        return f"nvfp4 weights need numerics {' or '.join(NUMERICS)}, asked for {spec.numerics}"
    if spec.weight != "nvfp4" and spec.numerics is not None:
        return f"{spec.weight} weights have no choice of numerics, asked for {spec.numerics}"
    if spec.weight == "fp8":
        if spec.block is None:
            return "fp8 weights need the block of their scales in the spec, found none"
        if spec.block[1] < spec.k and spec.block[1] % 32:
            return f"fp8 scales change every multiple of 32 inputs or never, asked for {spec.block[1]}"
    return None


def _refuses_states(spec: Mamba2Spec | DeltaSpec) -> str | None:
    if isinstance(spec, Mamba2Spec):
        heads, groups, width, what = spec.num_heads, spec.num_groups, spec.state_size, "state_size"
    else:
        heads, groups, width, what = spec.num_value_heads, spec.num_key_heads, spec.key_dim, "key_dim"
    if heads % groups:
        return f"{heads} heads do not divide among {groups} groups of them"
    if width > MOST_STATE:
        return f"{what} is at most {MOST_STATE}, asked for {width}"
    return None
