"""Runs of ops that a backend may take as one call: mixtures, latent attention, decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, LatentLayer
from nvfp4_runtime.config import MLAConfig, MoEConfig
from nvfp4_runtime.kernels.ops import (
    AttentionKernel,
    GroupedLinearKernel,
    LinearKernel,
    Mamba2Kernel,
    Mamba2Weights,
    MLAKernel,
    NormOp,
    RopeKernel,
)


@dataclass(frozen=True)
class MixtureOps:
    """The routed part of a mixture of experts, in the order in which it is called.

    router      float32 logits
    correction  fp32 [E] or None
    first       experts' gate and up joined, or up; two where gate and up cannot be joined
    activation  of gated experts on the rows of `first`, or of plain ones
    """

    router: LinearKernel
    correction: Tensor | None
    config: MoEConfig
    first: Sequence[GroupedLinearKernel]
    activation: Callable[[Tensor], Tensor]
    down: GroupedLinearKernel


class MixtureKernel(Protocol):
    def __call__(self, x: Tensor, inner_x: Tensor, shared: Tensor | None, gate: Tensor | None) -> Tensor:
        """The experts' weighed sum for each token, [T, N] of the stream's type.

        x        [T, hidden]  what the router reads
        inner_x  [T, K]       what the experts read, often the same
        shared   [T, N] of the stream's type, added last, or None; times sigmoid(gate) where gate, fp32 [T, 1], is given
        """
        ...


@dataclass(frozen=True)
class LatentOps:
    """Latent attention between its first and its last projection, absorbed, in the order in which it is called.

    q_norm, q_b  None where queries are projected at once
    keys         each head's matrix from nope to rank; `values`: from rank to v
    cos, sin     the rope tables
    """

    config: MLAConfig
    num_heads: int
    q_norm: NormOp | None
    q_b: LinearKernel | None
    kv_norm: NormOp
    keys: GroupedLinearKernel
    values: GroupedLinearKernel
    attend: MLAKernel
    cos: Tensor
    sin: Tensor


class LatentKernel(Protocol):
    def __call__(self, projected: Tensor, cache: LatentLayer, batch: ForwardBatch) -> Tensor:
        """projected [T, queries + rank + rope_dim] of the stream's type -> [T, H * v_dim]; the cache is written.

        The same bits as the ops one by one. Raises IndexError for slots, positions and block ids that point outside.
        """
        ...


@dataclass(frozen=True)
class AttentionOps:
    """Attention as layers/attention.py calls it. A linear is None where its parts cannot share a kernel.

    cache_index  the place of its keys and values in batch.kv
    """

    qkv: LinearKernel | None
    rope: RopeKernel
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_norm_eps: float
    attention: AttentionKernel
    scale: float
    sinks: Tensor | None
    o: LinearKernel | None
    cache_index: int


@dataclass(frozen=True)
class FeedForwardOps:
    """up: gate and up joined where the feed-forward is gated."""

    up: LinearKernel | None
    activation: Callable[[Tensor], Tensor]
    down: LinearKernel | None


@dataclass(frozen=True)
class MixtureBodyOps:
    """The routed part (None: its ops cannot be one call), the shared expert and that one's gate."""

    mixture: MixtureKernel | None
    shared: FeedForwardOps | None
    gate: LinearKernel | None


@dataclass(frozen=True)
class LatentBodyOps:
    """Latent attention with its projections, for batches in which every sequence decodes one token."""

    first: LinearKernel | None
    latent: LatentKernel | None
    o: LinearKernel | None
    cache_index: int


@dataclass(frozen=True)
class MambaOps:
    in_proj: LinearKernel | None
    mix: Mamba2Kernel
    weights: Mamba2Weights
    out_proj: LinearKernel | None
    cache_index: int


BodyOps = AttentionOps | FeedForwardOps | MixtureBodyOps | LatentBodyOps | MambaOps


@dataclass(frozen=True)
class BlockOps:
    """A norm, which first adds what came before to the residual stream, and what is made of the normed rows.

    body  in words: why this one cannot be part of a run
    """

    norm: NormOp
    body: BodyOps | str


@dataclass(frozen=True)
class DecoderOps:
    """Everything of a decoder but its head.

    embedding  [V, hidden] bfloat16, float16 or float32; widened to the stream's type
    """

    embedding: Tensor
    blocks: Sequence[BlockOps]
    norm: NormOp


class DecoderKernel(Protocol):
    """decodes_only  takes no batch in which a sequence has more than one new token"""

    decodes_only: bool

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """The normed hidden states of batch.logits_rows, [R, hidden]: what the head multiplies.

        The same bits as the embedding, the blocks' ops and the last norm called one by one. Raises IndexError for
        token ids, slots, positions, block ids and rows that point outside.
        """
        ...


@runtime_checkable
class RunsLayersWhole(Protocol):
    """A backend that has such runs as one call. Each answers with the call, or why not, for a person to read."""

    name: str

    def mixture(self, ops: MixtureOps) -> MixtureKernel | str: ...

    def latent(self, ops: LatentOps) -> LatentKernel | str: ...

    def decoder(self, ops: DecoderOps) -> DecoderKernel | str: ...
