"""Runs of ops that a backend may take as one call, as `DecoderOps` are: what layers call one by one elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, LatentLayer
from nvfp4_runtime.config import MLAConfig, MoEConfig
from nvfp4_runtime.kernels.ops import GroupedLinearKernel, LinearKernel, MLAKernel, NormOp


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
