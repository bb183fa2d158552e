"""What decoders have in common: an embedding, layers over one residual stream, a norm and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import BlockOps, DecoderKernel, DecoderOps
from nvfp4_runtime.layers.head import lm_head
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.layers.rope import rope_tables


class Layer(Protocol):
    """x and the stream so far, both [T, hidden], to the same for the next layer; the stream itself is their sum."""

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]: ...


class Stack:
    """Token ids in, float32 logits out.

    A model's `Decoder` calls `__init__`, which reads the embedding; sets `layers` and `kv_specs`; calls `end`, which
    reads the last norm and the head.

    kv_specs         what layers keep between steps, in layer order: batch.kv[i] is made for kv_specs[i]
    kv_dtype         the type of that cache
    stream           the residual stream's type
    max_positions    bounds positions (and the rope tables' memory)
    embedding_scale  embeddings are multiplied by it
    run_as_one       all but the head as one call, or None: op by op
    """

    kv_specs: tuple[CacheSpec, ...]
    layers: Sequence[Layer]
    embedding_scale: float = 1.0
    run_as_one: DecoderKernel | None = None
    norm: RMSNorm
    lm_head: Linear

    def __init__(
        self,
        config: ModelConfig,
        ckpt: Checkpoint,
        kernels: Kernels,
        kv_dtype: KVDtype,
        max_positions: int | None,
        embedding: str = "embed_tokens",
    ) -> None:
        self.config, self.kv_dtype = config, kv_dtype
        self.stream: torch.dtype = getattr(torch, kernels.stream)
        self.max_positions = max_positions or config.max_position_embeddings
        shape = (config.vocab_size, config.hidden_size)
        self._stored = ckpt.tensor(f"{config.root}.{embedding}.weight", shape)
        self.embedding = kernels.place(self._stored)

    def rope_tables(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the config's rope, for all positions."""
        cos, sin = rope_tables(self.config.rope, self.config.rotary_dim, self.max_positions)
        return kernels.place(cos), kernels.place(sin)

    def end(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        lm_head_dtype: HeadDtype,
        blocks: Sequence[BlockOps] = (),
        norm: str = "norm",
    ) -> None:
        """The last norm and the head; `blocks`: all layers, for a backend that runs them as one call."""
        config = self.config
        name, hidden, eps = f"{config.root}.{norm}", config.hidden_size, config.rms_norm_eps
        self.norm = RMSNorm(ckpt, kernels, name, hidden, eps, zero_centred=config.zero_centred)
        if blocks:
            self.run_as_one = kernels.decoder(DecoderOps(self.embedding, blocks, self.norm.op))
        self.lm_head = lm_head(ckpt, kernels, config, self._stored, lm_head_dtype, self.embedding)
        del self._stored  # where the embedding was placed elsewhere, nobody needs it any more

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write what the new tokens leave into batch.kv; return logits fp32 [R, vocab] of batch.logits_rows."""
        return self.lm_head(self.hidden(batch))

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """The same up to the head: hidden states [R, hidden] of batch.logits_rows, after the final norm."""
        as_one = self.run_as_one
        if as_one is None or batch.adapters is not None or (as_one.decodes_only and batch.max_query_len != 1):
            return self._op_by_op(batch)
        return as_one(batch)

    def _op_by_op(self, batch: ForwardBatch) -> Tensor:
        x = torch.nn.functional.embedding(batch.input_ids, self.embedding).to(self.stream)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        rows = batch.logits_rows
        return self.norm(x[rows], None if residual is None else residual[rows])[0]


def attention_spec(ckpt: Checkpoint, config: ModelConfig, layer_id: int, name: str) -> AttentionSpec:
    """What the layer of attention `name` keeps."""
    scales = ckpt.kv_scales(name)
    k_scale, v_scale = scales or (1.0, 1.0)
    window = config.layer_windows[layer_id]
    return AttentionSpec(config.num_kv_heads, config.head_dim, window, k_scale, v_scale, scales is not None)
