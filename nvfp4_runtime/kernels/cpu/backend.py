"""The native CPU backend: our own vector kernels, built from csrc/ at install time where a C++ compiler exists.

One binary holds every ISA variant (portable, AVX2, AVX-512, AVX-512 with BF16); the best one this machine has is chosen
at run time. Each output row depends on its own inputs only, in one fixed order: batch, chunking and threads never
change a bit. Between ISA variants the last bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.cpu.checks import MOST, StepMemo
from nvfp4_runtime.kernels.cpu.cores import physical_cores as physical_cores
from nvfp4_runtime.kernels.cpu.decoder import NativeDecoder, refuses_decoder
from nvfp4_runtime.kernels.cpu.grouped import NativeGroupedLinear
from nvfp4_runtime.kernels.cpu.linear import NUMERICS_CODES, NativeLinearDense, NativeLinearNVFP4
from nvfp4_runtime.kernels.cpu.linear_formats import NativeLinearFP8, NativeLinearMXFP4
from nvfp4_runtime.kernels.cpu.ops import (
    NativePagedAttention,
    NativeReluSquared,
    NativeRMSNorm,
    NativeRope,
    NativeSiluMul,
)
from nvfp4_runtime.kernels.cpu.quantize import quantize_fp8, quantize_nvfp4, row_amax
from nvfp4_runtime.kernels.cpu.states import NativeDelta, NativeMamba2, NativeMLA
from nvfp4_runtime.kernels.cpu.whole import NativeLatent, NativeMixture, refuses_latent, refuses_mixture
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
from nvfp4_runtime.kernels.whole_ops import (
    DecoderKernel,
    DecoderOps,
    LatentKernel,
    LatentOps,
    MixtureKernel,
    MixtureOps,
)
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

_native: Any
try:
    from nvfp4_runtime.kernels.cpu import _native  # type: ignore[attr-defined, no-redef]  # compiled, has no stub

    if not hasattr(_native, "MixtureBody"):
        raise ImportError("the extension that is here is older than this package")
except ImportError as e:
    _native = None
    _missing = str(e)

NOT_BUILT = "extension not built: install a C++17 compiler (and Python's headers) and run `pip install .` again"
MAX_HEAD_DIM = 512  # csrc/rows.h: kMaxHeadDim
FP8_SCALE_STEP = 64  # csrc/types.h: kPlainChunk


class CPUBackend:
    """Every op of kernels/ops.py, natively.

    threads  worker threads; None: one per physical core this process may use
    isa      one of supported_isas(); None: the best this machine has

    Raises ConfigError when the machine lacks `isa`. Without the extension it refuses every op in three words; `missing`
    and describe() say what to do.
    """

    name = "cpu"
    fastest_numerics: Numerics = "w4a16"  # W4A4 adds the quantisation of activations to the same products
    row_invariant = True

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, found {threads}", "--threads")
        self.threads = threads or physical_cores()
        self._context: Any = None
        self._memo = StepMemo()
        if _native is None:
            return
        if isa is not None and isa not in _native.supported_isas():
            raise ConfigError(
                f"this machine cannot run ISA variant {isa!r}; it has {', '.join(_native.supported_isas())}"
            )
        self._context = _native.Context(self.threads, isa or "")

    @property
    def missing(self) -> str | None:
        """Why the extension is not here and what to do, or None."""
        return f"{NOT_BUILT} ({_missing})" if self._context is None else None

    def refuses(self, spec: OpSpec) -> str | None:
        if self._context is None:
            return "extension not built"
        if isinstance(spec, QuantizeSpec):
            return None
        if spec.dtype not in ("bfloat16", "float32"):
            return f"activations are bfloat16 or float32, asked for {spec.dtype}"
        if not isinstance(spec, RopeSpec | DeltaSpec) and spec.out_dtype not in ("bfloat16", "float32"):
            return f"results are bfloat16 or float32, asked for {spec.out_dtype}"
        if isinstance(spec, LinearSpec | GroupedLinearSpec) and (reason := _refuses_format(spec)) is not None:
            return reason
        for name, size in _sizes(spec).items():
            if not 1 <= size <= MOST:
                return f"{name} is between 1 and {MOST}, asked for {size}"
        if isinstance(spec, RopeSpec | PagedAttentionSpec):
            if spec.head_dim > MAX_HEAD_DIM:
                return f"head_dim is at most {MAX_HEAD_DIM}, asked for {spec.head_dim}"
            if spec.num_heads % spec.num_kv_heads:
                return f"{spec.num_heads} query heads do not divide over {spec.num_kv_heads} KV heads"
            if (reason := refuses_kv(spec)) is not None:
                return reason
        if isinstance(spec, RopeSpec) and (spec.rotary_dim % 2 or not 0 <= spec.rotary_dim <= spec.head_dim):
            return f"rotary_dim must be even and at most head_dim {spec.head_dim}, asked for {spec.rotary_dim}"
        if isinstance(spec, Mamba2Spec) and spec.num_heads % spec.num_groups:
            return f"{spec.num_heads} heads do not divide over {spec.num_groups} groups"
        if isinstance(spec, DeltaSpec):
            if spec.num_value_heads % spec.num_key_heads:
                return f"{spec.num_value_heads} value heads do not divide over {spec.num_key_heads} key heads"
            if spec.key_dim > MAX_HEAD_DIM:
                return f"key_dim is at most {MAX_HEAD_DIM}, asked for {spec.key_dim}"
        if isinstance(spec, PagedAttentionSpec) and spec.window is not None and spec.window < 1:
            return f"a window is at least 1 token, asked for {spec.window}"
        return None

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        if isinstance(weight, NVFP4Weight):
            return NativeLinearNVFP4(self._context, weight, spec)
        if isinstance(weight, FP8Weight):
            return NativeLinearFP8(_native, self._context, weight, spec)
        if isinstance(weight, MXFP4Weight):
            return NativeLinearMXFP4(self._context, weight, spec)
        return NativeLinearDense(_native, self._context, weight, spec)

    def grouped_linear(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> GroupedLinearKernel:
        return NativeGroupedLinear(_native, self._context, [self.linear(weight, spec.each) for weight in weights], spec)

    def quantize(
        self,
        weight: DenseWeight,
        spec: QuantizeSpec,
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight:
        if spec.form == "fp8":
            return quantize_fp8(self._context, weight)
        return quantize_nvfp4(self._context, weight, spec.method, scale_2, importance)

    def largest(self, weight: Tensor) -> Tensor:
        return row_amax(self._context, DenseWeight(weight)).max()

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        return NativeRMSNorm(self._context, spec)

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        return NativeSiluMul(self._context, spec)

    def relu_squared(self, spec: ReluSquaredSpec) -> Callable[[Tensor], Tensor]:
        return NativeReluSquared(self._context, spec)

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        return NativeRope(self._context, self._memo, spec)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        return NativePagedAttention(self._context, self._memo, spec)

    def mla_decode(self, spec: MLASpec) -> MLAKernel:
        return NativeMLA(self._context, spec)

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel:
        return NativeMamba2(self._context, spec)

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel:
        return NativeDelta(self._context, spec)

    def decoder(self, ops: DecoderOps) -> DecoderKernel | str:
        if self._context is None:
            return "extension not built"
        if (reason := refuses_decoder(ops)) is not None:
            return reason
        return NativeDecoder(_native, self._context, self._memo, ops)

    def mixture(self, ops: MixtureOps) -> MixtureKernel | str:
        if self._context is None:
            return "extension not built"
        return refuses_mixture(ops) or NativeMixture(_native, self._context, ops)

    def latent(self, ops: LatentOps) -> LatentKernel | str:
        if self._context is None:
            return "extension not built"
        return refuses_latent(ops) or NativeLatent(_native, self._context, self._memo, ops)

    def describe(self) -> dict[str, Any]:
        if self._context is None:
            return {"status": NOT_BUILT}
        return {
            "isa": self._context.isa,
            "w4a16 operand": self._context.sixteen_bit,
            "threads": str(self._context.threads),
            "version": metadata.version("nvfp4-runtime"),
        }


def _refuses_format(spec: LinearSpec | GroupedLinearSpec) -> str | None:
    if spec.weight == "nvfp4" and spec.numerics not in NUMERICS_CODES:
        return f"nvfp4 weights need numerics {', '.join(NUMERICS_CODES)}, asked for {spec.numerics}"
    if spec.weight != "nvfp4" and spec.numerics is not None:
        return f"{spec.weight} weights have no choice of numerics, asked for {spec.numerics}"
    if spec.weight == "fp8":
        if spec.block is None:
            return "fp8 weights need the block of their scales in the spec, found none"
        if spec.block[1] < spec.k and spec.block[1] % FP8_SCALE_STEP:
            return f"fp8 scales change every multiple of {FP8_SCALE_STEP} inputs or never, asked for {spec.block[1]}"
    return None


def supported_isas() -> list[str]:
    """ISA variants this machine can run, best first; empty when the extension is not built."""
    return [] if _native is None else list(_native.supported_isas())


def _sizes(spec: OpSpec) -> dict[str, int]:
    """Every size of `spec` that native code counts in 32 bits."""
    if isinstance(spec, LinearSpec | GroupedLinearSpec | QuantizeSpec):
        return {"N": spec.n, "K": spec.k}
    if isinstance(spec, NormSpec):
        return {"hidden": spec.hidden}
    if isinstance(spec, ActivationSpec):
        return {"twice the width": 2 * spec.width}
    if isinstance(spec, ReluSquaredSpec):
        return {"the width": spec.width}
    if isinstance(spec, MLASpec):
        width = spec.kv_lora_rank + spec.rope_dim
        return {"the number of heads": spec.num_heads, "kv_lora_rank": spec.kv_lora_rank, "a key's width": width}
    if isinstance(spec, DeltaSpec):
        sizes = {"the number of key heads": spec.num_key_heads, "of value heads": spec.num_value_heads}
        sizes |= {"key_dim": spec.key_dim, "value_dim": spec.value_dim}
        return sizes | {"conv_width": spec.conv_width, "channels": spec.conv_dim}
    if isinstance(spec, Mamba2Spec):
        sizes = {"the number of heads": spec.num_heads, "of groups": spec.num_groups, "head_dim": spec.head_dim}
        return sizes | {"state_size": spec.state_size, "conv_width": spec.conv_width, "channels": spec.conv_dim}
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    heads = {"the number of heads": spec.num_heads, "of KV heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    return heads | {"the width of q, k and v": width}
