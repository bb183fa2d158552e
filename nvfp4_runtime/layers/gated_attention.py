"""Attention whose result passes a gate: the query projection gives, head by head, a query and as many gates."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import KVDtype, ModelConfig
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.layers.norm import load_norm_weight


class GatedAttention:
    """One layer's attention, `prefix` being e.g. "model.layers.3.self_attn"; as layers/attention.py has it but for the
    gate: o_proj(attention * sigmoid(gate)).

    cache_index  the place of its keys and values in batch.kv
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        prefix: str,
        cos: Tensor,
        sin: Tensor,
        kv_dtype: KVDtype,
        cache_index: int,
    ) -> None:
        heads, kv_heads, dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.num_heads, self.dim, self.kv_width = heads, dim, 2 * kv_heads * dim
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        names, sizes = [f"{prefix}.{name}_proj" for name in "qkv"], [2 * heads * dim, kv_heads * dim, kv_heads * dim]
        self.qkv_proj = Linear.fused(ckpt, kernels, "qkv_proj", names, sizes, hidden, bias=config.qkv_bias)
        self.o_proj = Linear.single(ckpt, kernels, f"{prefix}.o_proj", hidden, heads * dim, bias=config.o_bias)
        self.q_norm = load_norm_weight(ckpt, kernels, f"{prefix}.q_norm", dim, config.zero_centred)
        self.k_norm = load_norm_weight(ckpt, kernels, f"{prefix}.k_norm", dim, config.zero_centred)
        self.cos, self.sin, self.eps = cos, sin, config.rms_norm_eps
        self.scale, self.cache_index = dim**-0.5, cache_index
        self.rope = kernels.rope_and_cache(
            RopeSpec(heads, kv_heads, dim, 2 * cos.shape[1], True, kv_dtype, kernels.stream)
        )
        self.attend = kernels.paged_attention(
            PagedAttentionSpec(heads, kv_heads, dim, None, kv_dtype, kernels.stream, kernels.dtype)
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the new tokens' K and V are in the cache afterwards."""
        kv = batch.kv_layer(self.cache_index)
        projected, count = self.qkv_proj(x, batch.adapters), len(x)
        both = projected[:, : 2 * self.num_heads * self.dim].view(count, self.num_heads, 2, self.dim)
        qkv = torch.cat([both[:, :, 0].reshape(count, -1), projected[:, -self.kv_width :]], dim=-1)
        q = self.rope(
            qkv, batch.positions, self.cos, self.sin, self.q_norm, self.k_norm, self.eps, kv, batch.slot_mapping
        )
        gate = both[:, :, 1].reshape(count, -1).to(torch.float32).sigmoid()
        attended = self.attend(q, kv, batch, self.scale).to(torch.float32) * gate
        return self.o_proj(attended.to(self.dtype), batch.adapters)
