"""DeciLM (Llama-3.3-Nemotron Super and Ultra): Llama whose layers differ, some without attention or feed-forward."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.models.stack import Stack


class Decoder(Stack):
    """kv_specs  of the layers that have attention, in layer order"""

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
        specs: list[AttentionSpec] = []
        layers: list[Layer] = []
        for i in range(config.num_layers):
            layers.append(Layer(ckpt, kernels, config, i, cos, sin, kv_dtype, len(specs)))
            if (spec := layers[-1].spec(ckpt)) is not None:
                specs.append(spec)
        self.layers, self.kv_specs = layers, tuple(specs)
        self.end(ckpt, kernels, lm_head_dtype)


class Layer:
    """Attention, a projection in its place, or nothing; then the same of the feed-forward. A norm before each.

    cache_index  the place of its keys and values in batch.kv, if it has any
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        layer_id: int,
        cos: Tensor,
        sin: Tensor,
        kv_dtype: KVDtype,
        cache_index: int,
    ) -> None:
        self.plan, hidden, eps = config.nas[layer_id], config.hidden_size, config.rms_norm_eps
        prefix = f"model.layers.{layer_id}"
        self.attention_name = f"{prefix}.self_attn"
        self.head_dim = config.head_dim
        self.attention: Attention | Linear | None = None
        if self.plan.num_kv_heads:
            own = replace(config, num_kv_heads=self.plan.num_kv_heads)
            name = self.attention_name
            self.attention = Attention(ckpt, kernels, own, name, layer_id, cos, sin, kv_dtype, cache_index=cache_index)
        elif self.plan.linear_attention:
            self.attention = Linear.single(ckpt, kernels, f"{self.attention_name}.linear_attn", hidden, hidden)
        if self.attention is not None:
            self.input_norm = RMSNorm(ckpt, kernels, f"{prefix}.input_layernorm", hidden, eps)
        self.mlp: MLP | Linear | None = None
        if self.plan.intermediate_size:
            inner = self.plan.intermediate_size
            self.mlp = MLP(ckpt, kernels, hidden, inner, f"{prefix}.mlp", bias=config.mlp_bias)
        elif self.plan.linear_ffn:
            self.mlp = Linear.single(ckpt, kernels, f"{prefix}.mlp.linear_mlp", hidden, hidden)
        if self.mlp is not None:
            self.post_attention_norm = RMSNorm(ckpt, kernels, f"{prefix}.post_attention_layernorm", hidden, eps)

    def spec(self, ckpt: Checkpoint) -> AttentionSpec | None:
        """What it keeps between steps."""
        if not isinstance(self.attention, Attention):
            return None
        scales = ckpt.kv_scales(self.attention_name)
        k_scale, v_scale = scales or (1.0, 1.0)
        has_scales = scales is not None
        return AttentionSpec(self.attention.num_kv_heads, self.head_dim, self.plan.window, k_scale, v_scale, has_scales)

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """(x, residual), both [T, hidden] -> the same for the next layer; residual None: x is the whole stream."""
        if self.attention is not None:
            normed, residual = self.input_norm(x, residual)
            if isinstance(self.attention, Attention):
                x = self.attention(normed, batch)
            else:
                x = self.attention(normed, batch.adapters)
        if self.mlp is not None:
            normed, residual = self.post_attention_norm(x, residual)
            x = self.mlp(normed, batch.adapters)
        return x, residual
