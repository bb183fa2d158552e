"""Gemma 4's text model: Gemma 3's layers, of which those without a window have heads of another width and may take
their keys for values; values are normed, a layer's result is scaled, and experts may stand beside the feed-forward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Gemma4Layer, HeadDtype, KVDtype, ModelConfig, MoEConfig
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear, linear_kernel, load_weight
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.moe import Experts, route
from nvfp4_runtime.layers.norm import RMSNorm, load_norm_weight
from nvfp4_runtime.layers.rope import rope_tables
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
        # rounded as the model was trained: the embedding's type, not the stream's
        self.embedding_scale = float(torch.tensor(config.hidden_size**0.5).to(self.embedding.dtype))
        ropes: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        for layer in config.gemma4:
            rope = config.local_rope if layer.windowed else config.rope
            assert rope is not None
            if (kind := (layer.windowed, layer.head_dim)) not in ropes:
                cos, sin = rope_tables(rope, layer.head_dim, self.max_positions)
                ropes[kind] = kernels.place(cos), kernels.place(sin)
        self.layers = [
            DecoderLayer(ckpt, kernels, config, i, *ropes[layer.windowed, layer.head_dim], kv_dtype)
            for i, layer in enumerate(config.gemma4)
        ]
        self.kv_specs = tuple(
            attention_spec(ckpt, of_layer(config, layer), i, f"{config.root}.layers.{i}.self_attn")
            for i, layer in enumerate(config.gemma4)
        )
        self.end(ckpt, kernels, lm_head_dtype)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As Stack's; logits are pulled into ±final_softcap."""
        logits, cap = super().forward(batch), self.config.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class DecoderLayer:
    """norm, attention, norm; norm, feed-forward (and experts), norm; the sum is scaled."""

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
        prefix, hidden = f"{config.root}.layers.{layer_id}", config.hidden_size

        def norm(name: str, after: bool) -> RMSNorm:
            out_dtype = kernels.stream if after else None
            return RMSNorm(ckpt, kernels, f"{prefix}.{name}", hidden, config.rms_norm_eps, out_dtype=out_dtype)

        self.input_norm = norm("input_layernorm", after=False)
        self.attention = Attention(ckpt, kernels, config, f"{prefix}.self_attn", layer_id, cos, sin, kv_dtype)
        self.post_attention_norm = norm("post_attention_layernorm", after=True)
        self.pre_feedforward_norm = norm("pre_feedforward_layernorm", after=False)
        self.mlp = MLP(ckpt, kernels, hidden, config.intermediate_size, f"{prefix}.mlp", gate=config.gate)
        self.post_feedforward_norm = norm("post_feedforward_layernorm", after=True)
        self.experts: MixtureBeside | None = None
        if config.moe is not None:
            self.post_mlp_norm = norm("post_feedforward_layernorm_1", after=True)
            self.pre_experts_norm = norm("pre_feedforward_layernorm_2", after=False)
            self.post_experts_norm = norm("post_feedforward_layernorm_2", after=True)
            self.experts = MixtureBeside(ckpt, kernels, hidden, config.moe, config.rms_norm_eps, prefix)
        self.scale = float(ckpt.tensor(f"{prefix}.layer_scalar", (1,)))

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        normed, residual = self.input_norm(x, residual)
        x, _ = self.post_attention_norm(self.attention(normed, batch), None)
        normed, residual = self.pre_feedforward_norm(x, residual)
        y = self.mlp(normed, batch.adapters)
        if self.experts is not None:
            normed, _ = self.pre_experts_norm(residual, None)
            beside, _ = self.post_experts_norm(self.experts(normed, residual), None)
            y = self.post_mlp_norm(y, None)[0] + beside
        y, _ = self.post_feedforward_norm(y, None)
        return y * self.scale, residual * self.scale


class Attention:
    """As layers/attention.py has it, with values normed, and keys in their place where the layer says so."""

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        prefix: str,
        layer_id: int,
        cos: Tensor,
        sin: Tensor,
        kv_dtype: KVDtype,
    ) -> None:
        layer, hidden, heads = config.gemma4[layer_id], config.hidden_size, config.num_heads
        kv_heads, dim = layer.num_kv_heads, layer.head_dim
        self.layer_id, self.dim, self.cos, self.sin, self.eps = layer_id, dim, cos, sin, config.rms_norm_eps
        self.widths = [heads * dim, kv_heads * dim] + [kv_heads * dim] * (not layer.key_is_value)
        names = [f"{prefix}.{name}_proj" for name in ("qk" if layer.key_is_value else "qkv")]
        self.qkv_proj = Linear.fused(ckpt, kernels, "qkv_proj", names, self.widths, hidden, bias=config.qkv_bias)
        self.o_proj = Linear.single(ckpt, kernels, f"{prefix}.o_proj", hidden, heads * dim, bias=config.o_bias)
        self.q_norm = load_norm_weight(ckpt, kernels, f"{prefix}.q_norm", dim)
        self.k_norm = load_norm_weight(ckpt, kernels, f"{prefix}.k_norm", dim)
        self.ones = kernels.place(torch.ones(dim))
        self.norm_values = kernels.rms_norm(dim, kernels.stream)
        self.rope = kernels.rope_and_cache(RopeSpec(heads, kv_heads, dim, dim, True, kv_dtype, kernels.stream))
        window, stream, dtype = config.layer_windows[layer_id], kernels.stream, kernels.dtype
        self.attend = kernels.paged_attention(PagedAttentionSpec(heads, kv_heads, dim, window, kv_dtype, stream, dtype))

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the new tokens' K and V are in the cache afterwards."""
        kv = batch.kv_layer(self.layer_id)
        parts = torch.split(self.qkv_proj(x, batch.adapters), self.widths, dim=-1)
        values = parts[-1].reshape(-1, self.dim).contiguous()  # or keys, before their norm
        v = self.norm_values(values, None, self.ones, self.eps)[0].view(len(x), -1)
        qkv = torch.cat([parts[0], parts[1], v], dim=-1)
        q = self.rope(
            qkv, batch.positions, self.cos, self.sin, self.q_norm, self.k_norm, self.eps, kv, batch.slot_mapping
        )
        return self.o_proj(self.attend(q, kv, batch, 1.0), batch.adapters)


class MixtureBeside:
    """Experts whose router norms and scales the residual stream by itself, and who have a weight each besides."""

    def __init__(
        self, ckpt: Checkpoint, kernels: Kernels, hidden: int, config: MoEConfig, eps: float, prefix: str
    ) -> None:
        self.config, self.eps = config, eps
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        name = f"{prefix}.router.proj"
        weight = load_weight(ckpt, name, config.num_experts, hidden, bias=False)
        self.project = linear_kernel(kernels, "router", weight, [name], out_dtype="float32")
        scale = ckpt.tensor(f"{prefix}.router.scale", (hidden,)).to(torch.float32) * hidden**-0.5
        self.scale = kernels.place(scale)
        own = ckpt.tensor(f"{prefix}.router.per_expert_scale", (config.num_experts,)).to(torch.float32)
        self.own = kernels.place(own)
        self.experts = Experts(ckpt, kernels, hidden, config, f"{prefix}.experts")

    def __call__(self, x: Tensor, stream: Tensor) -> Tensor:
        """x [T, hidden], which experts read, and the residual stream, which the router reads -> [T, hidden]."""
        wide = stream.to(torch.float32)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.scale
        weights, chosen = route(self.project(normed.to(self.dtype)), self.config)
        return self.experts(x, weights * self.own[chosen], chosen)


def of_layer(config: ModelConfig, layer: Gemma4Layer) -> ModelConfig:
    """`config` with one layer's heads."""
    return replace(config, num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim)
