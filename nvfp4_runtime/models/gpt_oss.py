"""gpt-oss: attention with sinks, in windows every other layer, then experts with biases and a clamped gate."""

from __future__ import annotations

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import BlockOps
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.moe import MoE
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.models.stack import Stack, attention_spec


class Decoder(Stack):
    """As models/llama.py's Decoder."""

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
        layers = [DecoderLayer(ckpt, kernels, config, i, cos, sin, kv_dtype) for i in range(config.num_layers)]
        self.layers = layers
        self.kv_specs = tuple(
            attention_spec(ckpt, config, i, f"{config.root}.layers.{i}.self_attn") for i in range(config.num_layers)
        )
        self.end(ckpt, kernels, lm_head_dtype, [block for layer in layers for block in layer.ops()])


class DecoderLayer:
    """norm, attention, norm, experts; each norm first adds what came before to the residual stream."""

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
        assert config.moe is not None
        prefix, hidden, eps = f"{config.root}.layers.{layer_id}", config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(ckpt, kernels, f"{prefix}.input_layernorm", hidden, eps)
        self.attention = Attention(ckpt, kernels, config, f"{prefix}.self_attn", layer_id, cos, sin, kv_dtype)
        self.input_norm.feed(self.attention.qkv_proj, kernels, "qkv_proj")
        self.post_attention_norm = RMSNorm(ckpt, kernels, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = MoE(ckpt, kernels, hidden, config.moe, f"{prefix}.mlp", router="router")

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        fed, residual = self.input_norm.fed(x, residual)
        normed, residual = self.post_attention_norm(self.attention(fed, batch), residual)
        return self.mlp(normed, batch.adapters), residual

    def ops(self) -> list[BlockOps]:
        """The same layer for a backend that runs all of them as one call."""
        return [
            BlockOps(self.input_norm.op, self.attention.ops()),
            BlockOps(self.post_attention_norm.op, self.mlp.ops()),
        ]
