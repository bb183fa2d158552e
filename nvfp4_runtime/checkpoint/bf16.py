"""The plain dialect: weights stored as BF16, FP16 or FP32."""

from __future__ import annotations

from nvfp4_runtime.checkpoint.shards import PLAIN, Shards
from nvfp4_runtime.nvfp4.weight import DenseWeight


def holds(shards: Shards, prefix: str) -> bool:
    """Whether `prefix`'s weight is stored plainly."""
    info = shards.info(f"{prefix}.weight")
    return info is not None and info.dtype in PLAIN


def linear(shards: Shards, prefix: str, n: int, k: int) -> DenseWeight:
    """`prefix.weight` [n, k] with `prefix.bias` [n] where there is one."""
    weight = shards.read(f"{prefix}.weight", (n, k))
    bias = shards.read(f"{prefix}.bias", (n,)) if f"{prefix}.bias" in shards else None
    return DenseWeight(weight, bias)


def kv_scales(shards: Shards, attn_prefix: str) -> tuple[float, float] | None:
    """A plain checkpoint has no KV scales."""
    return None
