"""The pre-norm decoder with rotary grouped-query attention and a gated feed-forward or a mixture of them: Llama,
Mistral, Ministral, Phi-3, Qwen2, Qwen3; Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE, MiniMax-M2; with latent attention
DeepSeek-V3 and GLM-4-MoE-Lite.

One parametrised class: biases, QK-norm, rope variant, windows, experts, latent attention and the tied head come from
ModelConfig.
"""

from __future__ import annotations

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec, LatentSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import BlockOps
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.mla import LatentAttention
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.moe import MoE
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.models.stack import Stack


class Decoder(Stack):
    """Token ids in, float32 logits out.

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
        super().__init__(config, ckpt, kernels, kv_dtype, max_positions)
        cos, sin = self.rope_tables(kernels)
        self.layers: list[DecoderLayer] = [
            DecoderLayer(ckpt, kernels, config, layer_id, cos, sin, kv_dtype) for layer_id in range(config.num_layers)
        ]
        self.kv_specs = tuple(_kv_spec(ckpt, config, layer) for layer in self.layers)
        self.end(ckpt, kernels, lm_head_dtype, [block for layer in self.layers for block in layer.ops()])


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


def _kv_spec(ckpt: Checkpoint, config: ModelConfig, layer: DecoderLayer) -> CacheSpec:
    attention = layer.attention
    layer_id = attention.layer_id
    if isinstance(attention, LatentAttention):
        return LatentSpec(attention.config.kv_lora_rank, attention.config.rope_dim)
    scales = ckpt.kv_scales(f"{_layer(config, layer_id)}.self_attn")
    k_scale, v_scale = scales or (1.0, 1.0)
    return AttentionSpec(
        num_kv_heads=attention.num_kv_heads,
        head_dim=config.head_dim,
        window=config.layer_windows[layer_id],
        k_scale=k_scale,
        v_scale=v_scale,
        has_scales=scales is not None,
    )
