"""The contract of every op: its spec, its signature, its shapes. Backends implement these; layers call them.

Two types of activation meet here. What enters a multiplication by weights has the model's type (bfloat16, or float32).
What flows between ops (residual, q/k/v, gate and up) has the type of the stream, float32 on CPUs: rounding it to
bfloat16 as well would cost ten times the error of rounding inputs alone. Arithmetic inside an op is FP32, with one
rounding at its end. A row of an op's result depends on that row alone wherever a backend says it is `row_invariant`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import Dtype, KVDtype, Numerics
from nvfp4_runtime.nvfp4.weight import Weight


@dataclass(frozen=True)
class LinearSpec:
    """y = x W^T (+ bias), x [M, K] of `dtype`, y [M, N] of `out_dtype`.

    weight    "nvfp4", "bf16", "fp16", "fp32": how W is stored
    numerics  "w4a16" or "w4a4" for nvfp4; None for the others
    W4A16: sum of x * (code * block_scale) in FP32, times weight_scale_2 once, + bias, then one rounding.
    W4A4: x quantised by codec.quantize_activation; the FP32 sum is multiplied by (input_scale * weight_scale_2) once.
    """

    n: int
    k: int
    weight: Literal["nvfp4", "bf16", "fp16", "fp32"]
    numerics: Numerics | None
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "linear"


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over the last axis of [T, H]: x, residual and sum are `dtype`, normed is `out_dtype`."""

    hidden: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "rms_norm"


@dataclass(frozen=True)
class ActivationSpec:
    """silu(gate) * up over [T, 2I] of `dtype`, gate in the first I columns; gives [T, I] of `out_dtype`."""

    width: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "silu_mul"


@dataclass(frozen=True)
class RopeSpec:
    """Per-head QK-norm (if any), rotary embedding, and the write of K and V into the paged cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool
    kv_dtype: KVDtype
    dtype: Dtype
    kind: str = "rope_and_cache"


@dataclass(frozen=True)
class PagedAttentionSpec:
    """Causal attention of every new token over its sequence's paged KV, grouped-query, one call for the batch.

    Queries are `dtype`, the result is `out_dtype`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    kv_dtype: KVDtype
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "paged_attention"


def refuses_kv(spec: RopeSpec | PagedAttentionSpec) -> str | None:
    """Why no backend can keep this cache, or None."""
    if spec.kv_dtype == "nvfp4" and spec.head_dim % 16:
        return (
            f"an nvfp4 KV cache needs a head_dim divisible by 16 (one block scale per 16 dimensions), found "
            f"{spec.head_dim}: use --kv-cache-dtype fp8"
        )
    return None


OpSpec = LinearSpec | NormSpec | ActivationSpec | RopeSpec | PagedAttentionSpec


class LinearKernel(Protocol):
    """Owns one weight in its backend's private layout."""

    weight_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] contiguous -> [M, N]."""
        ...


class RMSNormKernel(Protocol):
    def __call__(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x [T, H] (+ residual [T, H], summed in `dtype` precision) -> (normed, the sum to carry on).

        sum = round(x + residual); normed = round(weight * sum / sqrt(mean(sum^2) + eps)), FP32 inside.
        Without a residual the sum is x itself. The residual's memory may be reused for the sum.
        """
        ...


class RopeKernel(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        kv: KVLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) * D] -> rotated queries [T, Hq, D]; K and V go to `kv` at `slot_mapping`.

        cos, sin  fp32 [max_positions, rotary_dim / 2], scaled by the rope variant's attention factor
        Halves rotate together: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 = first half of rotary_dim.
        q_norm, k_norm [D]: RMSNorm weights applied per head before the rotation, or None.
        An FP8 cache stores e4m3(saturate(k / k_scale)); an NVFP4 one codec.quantize_activation(k, k_scale), each block
        of 16 dimensions with its own E4M3 scale.
        """
        ...


class AttentionKernel(Protocol):
    def __call__(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float) -> Tensor:
        """q [T, Hq, D] -> [T, Hq * D]. Query i of sequence b sees positions (p_i - window, p_i]."""
        ...


class Backend(Protocol):
    """One way to run ops. `refuses` answers None, or why not, for a person to read.

    fastest_numerics  the arithmetic of NVFP4 layers it runs fastest; what --numerics auto means where it runs
    row_invariant     a row's result does not depend on the rows beside it
    """

    name: str
    fastest_numerics: Numerics
    row_invariant: bool

    def refuses(self, spec: OpSpec) -> str | None: ...

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel: ...

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel: ...

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]: ...

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel: ...

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel: ...

    def describe(self) -> dict[str, Any]:
        """Facts for `nvfp4 version` and the start-up screen: ISA variant, threads, version."""
        ...
