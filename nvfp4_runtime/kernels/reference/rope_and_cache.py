"""Per-head QK-norm, rotary embedding, and the write of K and V into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.kernels.ops import RopeSpec
from nvfp4_runtime.kernels.reference.rms_norm import normalise
from nvfp4_runtime.nvfp4 import codec


class ReferenceRope:
    """See `RopeKernel`. Everything between the projection and the stored or returned value is float32."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        kv: KVLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        heads = qkv.to(torch.float32).view(qkv.shape[0], -1, self.spec.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = torch.split(heads, self.heads, dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = normalise(q, q_norm, eps), normalise(k, k_norm, eps)
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, rotary_dim / 2]
        store(kv.k, kv.k_blocks, slot_mapping, rotate(k, cos, sin), kv.k_scale)
        store(kv.v, kv.v_blocks, slot_mapping, v, kv.v_scale)
        return rotate(q, cos, sin).to(qkv.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x1, x2), x1 in the first half of rotary_dim and x2 in the second; the rest passes."""
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def store(cache: Tensor, blocks: Tensor | None, slot_mapping: Tensor, values: Tensor, scale: float) -> None:
    """Write float32 values [T, H_kv, D] to their slots of a cache [num_blocks, H_kv, block_size, D].

    FP8 stores e4m3(value / scale), saturating at 448 as the hardware's conversion does; NaN stays NaN.
    NVFP4 (`blocks` given) stores packed codes and, in `blocks`, their E4M3 scales, by the recipe for activations.
    """
    if blocks is not None:
        codes, block_scale = codec.quantize_activation(values.flatten(0, 1), torch.tensor(scale))
        _write(cache, slot_mapping, codec.pack_codes(codes).view(*values.shape[:2], -1))
        _write(blocks.view(torch.uint8), slot_mapping, block_scale.view(torch.uint8).view(*values.shape[:2], -1))
        return
    if scale != 1.0:
        values = values / scale
    if cache.dtype == torch.float8_e4m3fn:
        values = values.clamp(-codec.E4M3_MAX, codec.E4M3_MAX).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)  # indexed writes are not implemented for float8; bytes are bytes
    _write(cache, slot_mapping, values.to(cache.dtype))


def _write(cache: Tensor, slot_mapping: Tensor, values: Tensor) -> None:
    block_size = cache.shape[2]
    cache[slot_mapping // block_size, :, slot_mapping % block_size] = values
