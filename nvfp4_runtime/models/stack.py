"""What decoders have in common: an embedding, layers over one residual stream, a norm and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import KVDtype, ModelConfig
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.layers.norm import RMSNorm


class Layer(Protocol):
    """x and the stream so far, both [T, hidden], to the same for the next layer; the stream itself is their sum."""

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]: ...


class Stack:
    """Token ids in, float32 logits out. A model's `Decoder` fills in the fields.

    kv_specs         what each layer keeps between steps, in layer order: batch.kv[i] is made for kv_specs[i]
    kv_dtype         the type of that cache
    stream           the residual stream's type
    embedding_scale  embeddings are multiplied by it
    """

    config: ModelConfig
    kv_dtype: KVDtype
    kv_specs: tuple[CacheSpec, ...]
    stream: torch.dtype
    embedding: Tensor
    embedding_scale: float = 1.0
    layers: Sequence[Layer]
    norm: RMSNorm
    lm_head: Linear

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write what the new tokens leave into batch.kv; return logits fp32 [R, vocab] of batch.logits_rows."""
        return self.lm_head(self.hidden(batch))

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """The same up to the head: hidden states [R, hidden] of batch.logits_rows, after the final norm."""
        x = torch.nn.functional.embedding(batch.input_ids, self.embedding).to(self.stream)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        assert residual is not None  # a config has at least one layer
        rows = batch.logits_rows
        return self.norm(x[rows], residual[rows])[0]


def attention_spec(ckpt: Checkpoint, config: ModelConfig, layer_id: int, name: str) -> AttentionSpec:
    """What the layer of attention `name` keeps."""
    scales = ckpt.kv_scales(name)
    k_scale, v_scale = scales or (1.0, 1.0)
    window = config.layer_windows[layer_id]
    return AttentionSpec(config.num_kv_heads, config.head_dim, window, k_scale, v_scale, scales is not None)
