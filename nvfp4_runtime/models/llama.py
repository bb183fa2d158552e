"""The pre-norm decoder with rotary grouped-query attention and a gated feed-forward or a mixture of them: Llama,
Mistral, Ministral, Phi-3, Qwen2, Qwen3; Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE, MiniMax-M2; with latent attention
DeepSeek-V3 and GLM-4-MoE-Lite.

One parametrised class: biases, QK-norm, rope variant, windows, experts, latent attention and the tied head come from
ModelConfig.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec, LatentSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import BlockOps, DecoderOps
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.head import lm_head
from nvfp4_runtime.layers.mla import LatentAttention
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.moe import MoE
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.layers.rope import rope_tables


class Decoder:
    """Token ids in, float32 logits out.

    kv_specs  what each layer wants cached, in layer order: batch.kv[i] is made for kv_specs[i]
    kv_dtype  the type of that cache

    `max_positions` bounds positions (and the rope tables' memory); None: the config's max_position_embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        ckpt: Checkpoint,
        kernels: Kernels,
        kv_dtype: KVDtype,
        max_positions: int | None = None,
        lm_head_dtype: HeadDtype = "auto",
    ) -> None:
        self.config = config
        self.kv_dtype = kv_dtype
        self.stream: torch.dtype = getattr(torch, kernels.stream)
        self.max_positions = max_positions or config.max_position_embeddings
        embedding = ckpt.tensor(f"{config.root}.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.embedding = kernels.place(embedding)
        tables = rope_tables(config.rope, config.rotary_dim, self.max_positions)
        cos, sin = (kernels.place(table) for table in tables)
        self.layers = [
            DecoderLayer(ckpt, kernels, config, layer_id, cos, sin, kv_dtype) for layer_id in range(config.num_layers)
        ]
        self.norm = RMSNorm(ckpt, kernels, f"{config.root}.norm", config.hidden_size, config.rms_norm_eps)
        blocks = [block for layer in self.layers for block in layer.ops()]
        self.run_as_one = kernels.decoder(DecoderOps(self.embedding, blocks, self.norm.op))
        self.lm_head = lm_head(ckpt, kernels, config, embedding, lm_head_dtype, self.embedding)
        self.kv_specs = tuple(_kv_spec(ckpt, config, layer_id) for layer_id in range(config.num_layers))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write the new tokens' K and V into batch.kv; return logits fp32 [R, vocab] of batch.logits_rows."""
        return self.lm_head(self.hidden(batch))

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """The same up to the head: hidden states [R, hidden] of batch.logits_rows, after the final norm."""
        as_one = self.run_as_one
        if as_one is None or batch.adapters is not None or (as_one.decodes_only and batch.max_query_len != 1):
            return self._op_by_op(batch)
        return as_one(batch)

    def _op_by_op(self, batch: ForwardBatch) -> Tensor:
        x = torch.nn.functional.embedding(batch.input_ids, self.embedding).to(self.stream)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        assert residual is not None  # a config has at least one layer
        rows = batch.logits_rows
        return self.norm(x[rows], residual[rows])[0]


class DecoderLayer:
    """norm, attention, norm, feed-forward; each norm first adds what came before to the residual stream."""

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        layer_id: int,
        cos: Tensor,
        sin: Tensor,
        kv_dtype: KVDtype,
    ) -> None:
        prefix, hidden, eps = _layer(config, layer_id), config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(ckpt, kernels, f"{prefix}.input_layernorm", hidden, eps)
        self.attention: Attention | LatentAttention
        if config.mla is not None:
            heads, name = config.num_heads, f"{prefix}.self_attn"
            self.attention = LatentAttention(ckpt, kernels, config.mla, hidden, heads, name, layer_id, cos, sin)
        else:
            self.attention = Attention(ckpt, kernels, config, f"{prefix}.self_attn", layer_id, cos, sin, kv_dtype)
            self.input_norm.feed(self.attention.qkv_proj, kernels, "qkv_proj")
        self.post_attention_norm = RMSNorm(ckpt, kernels, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp: MLP | MoE
        if config.moe is not None and config.moe.layers[layer_id]:
            self.mlp = MoE(ckpt, kernels, hidden, config.moe, mixture_prefix(ckpt, prefix))
        else:
            inner = config.intermediate_size
            self.mlp = MLP(ckpt, kernels, hidden, inner, f"{prefix}.mlp", bias=config.mlp_bias, fused=config.fused)
            self.post_attention_norm.feed(self.mlp.gate_up_proj, kernels, "gate_up_proj")

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        if isinstance(self.attention, LatentAttention):
            normed, residual = self.input_norm(x, residual)
            x = self.attention(normed, batch)
        else:
            fed, residual = self.input_norm.fed(x, residual)
            x = self.attention(fed, batch)
        if isinstance(self.mlp, MoE):
            normed, residual = self.post_attention_norm(x, residual)
            return self.mlp(normed, batch.adapters), residual
        fed, residual = self.post_attention_norm.fed(x, residual)
        return self.mlp(fed, batch.adapters), residual

    def ops(self) -> list[BlockOps]:
        """The same layer for a backend that runs all of them as one call."""
        return [
            BlockOps(self.input_norm.op, self.attention.ops()),
            BlockOps(self.post_attention_norm.op, self.mlp.ops()),
        ]


def _layer(config: ModelConfig, layer_id: int) -> str:
    return f"{config.root}.layers.{layer_id}"


def mixture_prefix(ckpt: Checkpoint, layer: str) -> str:
    """Mixtral's and MiniMax's files call the mixture otherwise than everybody else's."""
    mixtral = f"{layer}.block_sparse_moe"
    return mixtral if ckpt.has(f"{mixtral}.gate.weight") else f"{layer}.mlp"


def _kv_spec(ckpt: Checkpoint, config: ModelConfig, layer_id: int) -> CacheSpec:
    if config.mla is not None:
        return LatentSpec(config.mla.kv_lora_rank, config.mla.rope_dim)
    scales = ckpt.kv_scales(f"{_layer(config, layer_id)}.self_attn")
    k_scale, v_scale = scales or (1.0, 1.0)
    return AttentionSpec(
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=config.layer_windows[layer_id],
        k_scale=k_scale,
        v_scale=v_scale,
        has_scales=scales is not None,
    )
