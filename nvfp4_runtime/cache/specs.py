"""What a layer wants kept between steps. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values of one attention layer, per token.

    k_scale, v_scale  the checkpoint's multipliers (stored * scale = value); 1.0 where it has none
    has_scales        the checkpoint asks for an FP8 KV cache
    window            sliding window in tokens, or None
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    has_scales: bool = False

    def bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes one token's K and V take in this layer, the block scales of NVFP4 included."""
        if kv_dtype == "nvfp4":
            return 2 * self.num_kv_heads * (self.head_dim // 2 + self.head_dim // 16)
        return 2 * self.num_kv_heads * self.head_dim * {"bfloat16": 2, "float32": 4, "fp8": 1}[kv_dtype]


@dataclass(frozen=True)
class LatentSpec:
    """The latent vector and the rotated key of one layer of multi-head latent attention, per token."""

    kv_lora_rank: int
    rope_dim: int
    has_scales: bool = False

    def bytes_per_token(self, kv_dtype: str) -> int:
        return (self.kv_lora_rank + self.rope_dim) * {"bfloat16": 2, "float32": 4}[kv_dtype]


@dataclass(frozen=True)
class StateSpec:
    """The states of one Mamba-2 layer or gated delta net, per running sequence: float32, whatever the KV cache's type.

    A delta net's heads are its value heads, head_dim their width, state_size the width of a key.
    """

    num_heads: int
    head_dim: int
    state_size: int
    conv_dim: int
    conv_width: int
    has_scales: bool = True  # nothing of it is ever quantised: no scale is missing

    def bytes_per_token(self, kv_dtype: str) -> int:
        return 0

    @property
    def bytes_per_slot(self) -> int:
        return 4 * (self.num_heads * self.head_dim * self.state_size + (self.conv_width - 1) * self.conv_dim)


CacheSpec = AttentionSpec | LatentSpec | StateSpec
