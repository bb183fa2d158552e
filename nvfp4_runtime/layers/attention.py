"""Self-attention over the paged cache: fused q/k/v, rotary embedding and cache write, attention, output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import KVDtype, ModelConfig
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, QuantizedRows, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import AttentionOps
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.layers.norm import RMSNorm, load_norm_weight
from nvfp4_runtime.layers.rope import query_scales


class Attention:
    """One layer's attention, `prefix` being e.g. "model.layers.3.self_attn".

    layer_id  also the place of its keys and values in batch.kv, unless `cache_index` names another
    cos, sin  the rope tables, shared by all layers; none of the dimensions turns where they are empty
    """

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
        cache_index: int | None = None,
    ) -> None:
        heads, kv_heads, dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.qkv_proj = Linear.fused(
            ckpt,
            kernels,
            "qkv_proj",
            [f"{prefix}.qkv_proj"] if config.fused else [f"{prefix}.{name}_proj" for name in "qkv"],
            [(heads + 2 * kv_heads) * dim] if config.fused else [heads * dim, kv_heads * dim, kv_heads * dim],
            hidden,
            bias=config.qkv_bias,
        )
        self.o_proj = Linear.single(ckpt, kernels, f"{prefix}.o_proj", hidden, heads * dim, bias=config.o_bias)
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        if config.qk_norm:
            self.q_norm = load_norm_weight(ckpt, kernels, f"{prefix}.q_norm", dim, config.zero_centred)
            self.k_norm = load_norm_weight(ckpt, kernels, f"{prefix}.k_norm", dim, config.zero_centred)
        self.whole_norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.whole_qk_norm:
            stream, eps = kernels.stream, config.rms_norm_eps
            self.widths = [heads * dim, kv_heads * dim, kv_heads * dim]
            self.whole_norms = (
                RMSNorm(ckpt, kernels, f"{prefix}.q_norm", heads * dim, eps, out_dtype=stream),
                RMSNorm(ckpt, kernels, f"{prefix}.k_norm", kv_heads * dim, eps, out_dtype=stream),
            )
        scales = query_scales(config.rope, cos.shape[0])
        self.query_scales = None if scales is None else kernels.place(scales.view(-1, 1, 1))
        self.cos, self.sin = cos, sin
        self.eps = config.rms_norm_eps
        self.scale = config.attention_scale or dim**-0.5
        self.layer_id = layer_id if cache_index is None else cache_index
        window = config.layer_windows[layer_id]
        self.rope = kernels.rope_and_cache(
            RopeSpec(heads, kv_heads, dim, 2 * cos.shape[1], config.qk_norm, kv_dtype, kernels.stream)
        )
        self.attend = kernels.paged_attention(
            PagedAttentionSpec(heads, kv_heads, dim, window, kv_dtype, kernels.stream, kernels.dtype, config.sinks)
        )
        self.sinks: Tensor | None = None
        if config.sinks:
            self.sinks = kernels.place(ckpt.tensor(f"{prefix}.sinks", (heads,)).to(torch.float32).contiguous())

    def __call__(self, x: Tensor | QuantizedRows, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the new tokens' K and V are in the cache afterwards."""
        return self.o_proj(self.heads(x, batch), batch.adapters)

    def heads(self, x: Tensor | QuantizedRows, batch: ForwardBatch) -> Tensor:
        """The same up to the output projection: [T, H * D]."""
        kv = batch.kv_layer(self.layer_id)
        qkv = self.qkv_proj(x, batch.adapters)
        if self.whole_norms is not None:
            q, k, v = torch.split(qkv, self.widths, dim=-1)
            normed = (norm(part.contiguous(), None)[0] for norm, part in zip(self.whole_norms, (q, k), strict=True))
            qkv = torch.cat([*normed, v], dim=-1)
        q = self.rope(
            qkv, batch.positions, self.cos, self.sin, self.q_norm, self.k_norm, self.eps, kv, batch.slot_mapping
        )
        if self.query_scales is not None:
            q = (q * self.query_scales[batch.positions]).to(q.dtype)
        return self.attend(q, kv, batch, self.scale, self.sinks)

    def ops(self) -> AttentionOps | str:
        """The same for a backend that runs a decoder as one call, or why that cannot be."""
        if self.query_scales is not None:
            return "queries are scaled by their positions"
        if self.whole_norms is not None:
            return "queries and keys are normed across heads"
        return AttentionOps(
            qkv=self.qkv_proj.only_kernel,
            rope=self.rope,
            cos=self.cos,
            sin=self.sin,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            qk_norm_eps=self.eps,
            attention=self.attend,
            scale=self.scale,
            sinks=self.sinks,
            o=self.o_proj.only_kernel,
            cache_index=self.layer_id,
        )
