"""The tensors behind block ids: one pair of paged K and V, or one of latent vectors, per decoder layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from nvfp4_runtime.batch import CacheLayer, KVLayer, LatentLayer, StateLayer
from nvfp4_runtime.cache.specs import CacheSpec, LatentSpec, StateSpec

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,  # two codes a byte
}


def bytes_per_block(specs: Sequence[CacheSpec], kv_dtype: str, block_size: int) -> int:
    """Bytes one block id takes over all layers."""
    return block_size * sum(spec.bytes_per_token(kv_dtype) for spec in specs)


def state_bytes(specs: Sequence[CacheSpec], num_slots: int) -> int:
    """Bytes of all layers' states, slot 0 included."""
    return num_slots * sum(spec.bytes_per_slot for spec in specs if isinstance(spec, StateSpec))


def allocate(
    specs: Sequence[CacheSpec],
    kv_dtype: str,
    num_blocks: int,
    block_size: int,
    device: torch.device,
    num_slots: int = 1,
) -> tuple[CacheLayer, ...]:
    """Zeroed caches, one per layer: as KVLayer, LatentLayer and StateLayer describe them.

    Zeroed because a padded read of an unwritten slot must be finite; the pages stay untouched until first use.
    """
    layers: list[CacheLayer] = []
    for spec in specs:
        if isinstance(spec, StateSpec):
            conv = _zeros((num_slots, spec.conv_width - 1, spec.conv_dim), torch.float32, device)
            ssm = (num_slots, spec.num_heads, spec.head_dim, spec.state_size)
            layers.append(StateLayer(conv, _zeros(ssm, torch.float32, device)))
            continue
        if isinstance(spec, LatentSpec):
            width = spec.kv_lora_rank + spec.rope_dim
            layers.append(LatentLayer(_zeros((num_blocks, block_size, width), _DTYPES[kv_dtype], device)))
            continue
        shape = (num_blocks, spec.num_kv_heads, block_size)
        width = spec.head_dim // 2 if kv_dtype == "nvfp4" else spec.head_dim
        k, v = (_zeros((*shape, width), _DTYPES[kv_dtype], device) for _ in "kv")
        scales = (spec.k_scale, spec.v_scale) if kv_dtype in ("fp8", "nvfp4") else (1.0, 1.0)
        if kv_dtype == "nvfp4":
            k_blocks, v_blocks = (_zeros((*shape, spec.head_dim // 16), torch.float8_e4m3fn, device) for _ in "kv")
            layers.append(KVLayer(k, v, *scales, k_blocks, v_blocks))
        else:
            layers.append(KVLayer(k, v, *scales))
    return tuple(layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype).view(shape)
    # numpy asks the system for zero pages, which cost nothing until written; torch.zeros would write all of them now
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
