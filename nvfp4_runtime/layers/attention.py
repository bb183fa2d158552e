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
from nvfp4_runtime.layers.norm import load_norm_weight


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
            [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"],
            [heads * dim, kv_heads * dim, kv_heads * dim],
            hidden,
            bias=config.qkv_bias,
        )
        self.o_proj = Linear.single(ckpt, kernels, f"{prefix}.o_proj", hidden, heads * dim, bias=config.o_bias)
        self.q_norm = load_norm_weight(ckpt, kernels, f"{prefix}.q_norm", dim) if config.qk_norm else None
        self.k_norm = load_norm_weight(ckpt, kernels, f"{prefix}.k_norm", dim) if config.qk_norm else None
        self.cos, self.sin = cos, sin
        self.eps = config.rms_norm_eps
        self.scale = dim**-0.5
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
        kv = batch.kv_layer(self.layer_id)
        qkv = self.qkv_proj(x, batch.adapters)
        q = self.rope(
            qkv, batch.positions, self.cos, self.sin, self.q_norm, self.k_norm, self.eps, kv, batch.slot_mapping
        )
        return self.o_proj(self.attend(q, kv, batch, self.scale, self.sinks), batch.adapters)

    def ops(self) -> AttentionOps:
        """The same for a backend that runs a decoder as one call."""
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
