"""The contract of every op: its spec, its signature, its shapes. Backends implement these; layers call them.

Two types of activation meet here. What enters a multiplication by weights has the model's type (bfloat16, or float32).
What flows between ops (residual, q/k/v, gate and up) has the type of the stream, float32 on CPUs: rounding it to
bfloat16 as well would cost ten times the error of rounding inputs alone. Arithmetic inside an op is FP32, with one
rounding at its end. A row of an op's result depends on that row alone wherever a backend says it is `row_invariant`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer, StateLayer
from nvfp4_runtime.config import SILU, Dtype, Gate, KVDtype, Numerics
from nvfp4_runtime.nvfp4.block_scales import BlockMethod
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.layouts import TILE_ROWS
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

WeightFormat = Literal["nvfp4", "fp8", "mxfp4", "bf16", "fp16", "fp32"]
WEIGHT_ONLY_NUMERICS: dict[WeightFormat, str] = {"fp8": "w8a16", "mxfp4": "w4a16"}  # what reports call it


@dataclass(frozen=True)
class LinearSpec:
    """y = x W^T (+ bias), x [M, K] of `dtype`, y [M, N] of `out_dtype`.

    weight    how W is stored: WeightFormat
    numerics  "w4a16", "w4a8" or "w4a4" for nvfp4; None for the others, which multiply `dtype` activations as they are
    block     fp8 only: rows and columns under one scale
    W4A16: sum of x * (code * block_scale) in FP32, times weight_scale_2 once, + bias, then one rounding.
    W4A8: the same with x quantised by codec.quantize_int8.
    W4A4: x quantised by codec.quantize_activation; the FP32 sum is multiplied by (input_scale * weight_scale_2) once.
    FP8 (W8A16): sum of x * code in FP32, times the scale once where a row has one scale; where scales come in blocks of
    K each block's sum is multiplied by its own. + bias, one rounding.
    MXFP4 (W4A16): sum of x * (code * block_scale), exact products, in FP32; + bias, one rounding.
    """

    n: int
    k: int
    weight: WeightFormat
    numerics: Numerics | None
    dtype: Dtype
    out_dtype: Dtype
    block: tuple[int, int] | None = None
    kind: str = "linear"


@dataclass(frozen=True)
class GroupedLinearSpec:
    """`LinearSpec` for `num_experts` weights of one shape and format: rows sorted by expert, each meets its own.

    Each expert keeps its own weight_scale_2, input_scale or scales.
    """

    num_experts: int
    n: int
    k: int
    weight: WeightFormat
    numerics: Numerics | None
    dtype: Dtype
    out_dtype: Dtype
    block: tuple[int, int] | None = None
    kind: str = "grouped_linear"

    @property
    def each(self) -> LinearSpec:
        """The spec of one expert alone."""
        return LinearSpec(self.n, self.k, self.weight, self.numerics, self.dtype, self.out_dtype, self.block)


@dataclass(frozen=True)
class QuantizeSpec:
    """A plain weight [N, K] quantised at load, bit for bit as nvfp4/fp8.py and nvfp4/codec.py define.

    form    "fp8": E4M3 under one scale per row; "nvfp4": one weight_scale_2, no input_scale
    method  how "nvfp4" chooses block scales: see nvfp4/block_scales.py
    """

    n: int
    k: int
    weight: WeightFormat
    form: Literal["fp8", "nvfp4"]
    method: BlockMethod = "max"
    kind: str = "quantize"


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over the last axis of [T, H]: x, residual and sum are `dtype`, normed is `out_dtype`."""

    hidden: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "rms_norm"


@dataclass(frozen=True)
class ActivationSpec:
    """silu(gate) * up, or what `gate` says, over [T, 2I] of `dtype`, gate in the first I columns; gives [T, I] of
    `out_dtype`."""

    width: int
    dtype: Dtype
    out_dtype: Dtype
    gate: Gate = SILU
    kind: str = "silu_mul"


@dataclass(frozen=True)
class ReluSquaredSpec:
    """relu(x)^2 over [T, width] of `dtype`, each step rounded to it; gives `out_dtype`."""

    width: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "relu_squared"


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

    Queries are `dtype`, the result is `out_dtype`. Where either is bfloat16, a backend may round queries and softmax
    weights to bfloat16 before it multiplies them, unless the cache is float32.

    sinks  each head has one more score in its softmax, without a value: what it weighs is given to nobody
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    kv_dtype: KVDtype
    dtype: Dtype
    out_dtype: Dtype
    sinks: bool = False
    kind: str = "paged_attention"


@dataclass(frozen=True)
class MLASpec:
    """One decoding step of multi-head latent attention in its absorbed form, over the paged latent cache.

    Queries and the cache are `dtype`, the result is `out_dtype`. Where either is bfloat16, a backend may round softmax
    weights to bfloat16 before it multiplies them.
    """

    num_heads: int
    kv_lora_rank: int
    rope_dim: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "mla_decode"


@dataclass(frozen=True)
class Mamba2Spec:
    """Convolution, selective scan and gated norm of one Mamba-2 mixer, token by token, over per-sequence states.

    Inputs are `dtype`, results `out_dtype`; all arithmetic is FP32, in the order of the tokens, so that it does not
    matter how a prompt is cut.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_width: int
    dtype: Dtype
    out_dtype: Dtype
    kind: str = "mamba2"

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.num_groups * self.state_size

    @property
    def widths(self) -> list[int]:
        """Of the gate, the convolution's input and the steps, which lie beside each other."""
        return [self.inner, self.conv_dim, self.num_heads]


@dataclass(frozen=True)
class DeltaSpec:
    """Convolution and gated delta rule of one layer, token by token, over per-sequence states.

    Inputs are `dtype`, the result is float32; all arithmetic is FP32, in the order of the tokens, so that it does not
    matter how a prompt is cut.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    dtype: Dtype
    kind: str = "gated_delta"

    @property
    def keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.keys + self.values


def refuses_kv(spec: RopeSpec | PagedAttentionSpec) -> str | None:
    """Why no backend can keep this cache, or None."""
    if spec.kv_dtype == "nvfp4" and spec.head_dim % 16:
        return (
            f"an nvfp4 KV cache needs a head_dim divisible by 16 (one block scale per 16 dimensions), found "
            f"{spec.head_dim}: use --kv-cache-dtype fp8"
        )
    return None


OpSpec = (
    LinearSpec
    | GroupedLinearSpec
    | QuantizeSpec
    | NormSpec
    | ActivationSpec
    | ReluSquaredSpec
    | RopeSpec
    | PagedAttentionSpec
    | MLASpec
    | Mamba2Spec
    | DeltaSpec
)


@dataclass(frozen=True)
class QuantizedRows:
    """Activations [T, K] as codec.quantize_activation defines them.

    packed    uint8 [T, K/2]       even k in the low nibble
    scales    e4m3 [T, K/16]       row-major; or
              e4m3 [T' * K'/16]    swizzled 128x4 (nvfp4/layouts.py), T' and K'/16 padded with zeros
    swizzled  which of the two
    """

    packed: Tensor
    scales: Tensor
    swizzled: bool

    @property
    def num_programs(self) -> int:
        """Rows a kernel visits: all stored ones and, swizzled, those of the padding."""
        rows = self.packed.shape[0]
        return -(-rows // TILE_ROWS) * TILE_ROWS if self.swizzled else rows


class LinearKernel(Protocol):
    """Owns one weight in its backend's private layout."""

    weight_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] contiguous -> [M, N]."""
        ...


@runtime_checkable
class TakesQuantizedRows(Protocol):
    """A linear kernel whose input may come quantised from the op before it, with the same result to the bit.

    quantized_input_scale  fp32 [] on the kernel's device: rows are quantised under it, scales swizzled. None: this one
                           quantises its input itself.
    """

    quantized_input_scale: Tensor | None

    def multiply_quantized(self, rows: QuantizedRows) -> Tensor: ...


@runtime_checkable
class QuantizingNorm(Protocol):
    """A norm that can write its result quantised; see `TritonRMSNorm.quantize`."""

    def quantize(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, input_scale: Tensor, swizzled: bool
    ) -> tuple[QuantizedRows, Tensor]: ...


@runtime_checkable
class QuantizingActivation(Protocol):
    """A silu_mul that can write its result quantised."""

    def quantize(self, gate_up: Tensor, input_scale: Tensor, swizzled: bool) -> QuantizedRows: ...


class GroupedLinearKernel(Protocol):
    """Owns every expert's weight."""

    weight_bytes: int

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] contiguous, sorted by expert -> [T, N]; each row equals the expert's plain linear kernel on it.

        offsets  int32 [E + 1]: rows offsets[e] .. offsets[e + 1] are expert e's; from 0 to T, never falling
        Raises KernelError for offsets that are not so.
        """
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
    def __call__(
        self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """q [T, Hq, D] -> [T, Hq * D]. Query i of sequence b sees positions (p_i - window, p_i].

        sinks  fp32 [Hq], already scaled; there exactly where the spec says so
        """
        ...


class MLAKernel(Protocol):
    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        """One query per sequence over its latent vectors, which are keys and values at once -> [B, H, kv_lora_rank].

        q_nope        [B, H, kv_lora_rank]  W_UK already absorbed: a query against the latent vector itself
        q_rope        [B, H, rope_dim]      rotated
        cache         [num_blocks, block_size, kv_lora_rank + rope_dim]  latent vector, then its rotated key
        block_tables  int32 [B, max_blocks]
        seq_lens      int32 [B]             tokens visible; 0: the row is a filler and its result means nothing
        Softmax over scale * (q_nope . c + q_rope . k_rope); the result, sums of c, awaits W_UV.
        """
        ...


@dataclass(frozen=True)
class Mamba2Weights:
    """What a Mamba-2 kernel reads beside its input, all float32.

    conv_weight  [conv_dim, conv_width]     conv_bias  [conv_dim]
    a            [num_heads], negative      dt_bias, d [num_heads]
    norm         [inner]
    """

    conv_weight: Tensor
    conv_bias: Tensor
    a: Tensor
    dt_bias: Tensor
    d: Tensor
    norm: Tensor
    min_step: float
    eps: float

    @cached_property
    def taps(self) -> Tensor:
        """conv_weight [conv_width, conv_dim], contiguous."""
        return self.conv_weight.t().contiguous()


class Mamba2Kernel(Protocol):
    def __call__(self, projected: Tensor, weights: Mamba2Weights, state: StateLayer, batch: ForwardBatch) -> Tensor:
        """projected [T, inner + conv_dim + num_heads] contiguous: gate, xbc and dt -> [T, inner].

        Per token: xbc through the causal convolution and SiLU becomes x [H, P], B and C [G, N];
        step = max(softplus(dt + dt_bias), min_step); state = exp(step * a) * state + step * x B^T; y = state C + d * x.
        The result is RMSNorm(y * silu(gate)) over each of G groups of channels, times `norm`.
        The states of batch.state_slots are read (zeros for a sequence that begins) and left as they are after its
        last token.
        """
        ...


@dataclass(frozen=True)
class DeltaWeights:
    """What a gated delta kernel reads beside its input, all float32.

    conv_weight  [conv_dim, conv_width]
    a            [num_value_heads], negative
    dt_bias      [num_value_heads]
    """

    conv_weight: Tensor
    a: Tensor
    dt_bias: Tensor


class DeltaKernel(Protocol):
    def __call__(
        self, qkv: Tensor, b: Tensor, dt: Tensor, weights: DeltaWeights, state: StateLayer, batch: ForwardBatch
    ) -> Tensor:
        """qkv [T, conv_dim], b and dt [T, num_value_heads], all contiguous -> y float32 [T, values].

        Per token: qkv through the causal convolution and SiLU becomes q, k [H_k, D_k] and v [H_v, D_v]; q and k are
        divided by sqrt(sum of squares + 1e-6), q by sqrt(D_k) as well. Value head h of key head h // (H_v / H_k), with
        decay = exp(softplus(dt + dt_bias) * a): state *= decay; state += sigmoid(b) * (v - state k) k^T; y = state q.
        state.ssm is [num_slots, H_v, D_v, D_k]; states are read and left as Mamba2Kernel does.
        """
        ...


@dataclass(frozen=True)
class NormOp:
    """A norm with its weight."""

    kernel: RMSNormKernel
    weight: Tensor
    eps: float


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

    def grouped_linear(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> GroupedLinearKernel: ...

    def quantize(
        self,
        weight: DenseWeight,
        spec: QuantizeSpec,
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight: ...

    def largest(self, weight: Tensor) -> Tensor:
        """The largest magnitude of a plain matrix, fp32 []; NaN where it holds NaN or Inf."""
        ...

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel: ...

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]: ...

    def relu_squared(self, spec: ReluSquaredSpec) -> Callable[[Tensor], Tensor]: ...

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel: ...

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel: ...

    def mla_decode(self, spec: MLASpec) -> MLAKernel: ...

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel: ...

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel: ...

    def describe(self) -> dict[str, Any]:
        """Facts for `nvfp4 version` and the start-up screen: ISA variant, threads, version."""
        ...
