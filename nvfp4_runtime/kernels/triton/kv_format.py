"""How kernels see a paged cache: which format it has, and its tensors as Triton can take them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.triton.numbers import e2m1_operand, e4m3_operand

NVFP4_UNIT = 2.0**14  # what load_nvfp4_rows gives times this is code * block scale
KV_CODES = {"bfloat16": 0, "float32": 0, "fp8": 1, "nvfp4": 2}  # 0: the pointer's own type
_STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}


def cache_arguments(kv: KVLayer, spec: RopeSpec | PagedAttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, k_blocks, v_blocks of a layer, E4M3 as bytes; without block scales k and v stand in for them.

    Raises KernelError for a cache of another format or shape than the kernel was built for.
    """
    width = spec.head_dim // 2 if spec.kv_dtype == "nvfp4" else spec.head_dim
    for name, cache in (("k", kv.k), ("v", kv.v)):
        shape, dtype = (cache.shape[1], cache.shape[3]), cache.dtype
        if dtype != _STORED[spec.kv_dtype] or shape != (spec.num_kv_heads, width) or not cache.is_contiguous():
            raise KernelError(
                f"kv.{name} is {dtype} {list(cache.shape)}, expected a contiguous {_STORED[spec.kv_dtype]} "
                f"[num_blocks, {spec.num_kv_heads}, block_size, {width}] for a KV cache of {spec.kv_dtype}"
            )
    if spec.kv_dtype != "nvfp4":
        k, v = (c.view(torch.uint8) if spec.kv_dtype == "fp8" else c for c in (kv.k, kv.v))
        return k, v, k, v
    if kv.k_blocks is None or kv.v_blocks is None:
        raise KernelError("kv: an nvfp4 cache needs block scales; expected k_blocks and v_blocks, found None")
    return kv.k, kv.v, kv.k_blocks.view(torch.uint8), kv.v_blocks.view(torch.uint8)


@triton.jit
def load_rows(
    cache,
    rows,
    seen,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KV: tl.constexpr,
    OPERAND: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Rows of a plain or FP8 cache seen as [.., D], as OPERAND [N, WIDTH]; 0 where not `seen` and beyond D.

    rows  int64 [N]      seen  bool [N]: what nobody may see is never read, so it can be anything
    """
    cols = tl.arange(0, WIDTH)[None, :]
    stored = tl.load(cache + rows[:, None] * D + cols, mask=seen[:, None] & (cols < D), other=0)
    if KV == 1:
        return e4m3_operand(stored, OPERAND, HARDWARE_E4M3, EMULATED)
    else:
        return stored.to(OPERAND)


@triton.jit
def load_nvfp4_rows(
    cache,
    blocks,
    rows,
    seen,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Even and odd dimensions of an NVFP4 cache's rows, exact code * block scale * 2^-14, each [N, WIDTH / 2]."""
    N: tl.constexpr = rows.shape[0]
    cols = tl.arange(0, WIDTH // 2)[None, :]
    packed = tl.load(cache + rows[:, None] * (D // 2) + cols, mask=seen[:, None] & (cols < D // 2), other=0)
    block = tl.arange(0, WIDTH // 16)[None, :]
    mask = seen[:, None] & (block < D // 16)
    scale = tl.load(blocks + rows[:, None] * (D // 16) + block, mask=mask, other=0)
    scale = e4m3_operand(scale, OPERAND, HARDWARE_E4M3, EMULATED)
    scale = tl.broadcast_to(tl.expand_dims(scale, 2), (N, WIDTH // 16, 8))
    scale = tl.reshape(scale, (N, WIDTH // 2))
    even = e2m1_operand(packed & 0xF, OPERAND, EMULATED)
    odd = e2m1_operand(packed >> 4, OPERAND, EMULATED)
    return _product(even, scale, OPERAND, EMULATED), _product(odd, scale, OPERAND, EMULATED)


@triton.jit
def _product(code, scale, OPERAND: tl.constexpr, EMULATED: tl.constexpr):
    if EMULATED:
        return (code.to(tl.float32) * scale.to(tl.float32)).to(OPERAND)
    else:
        return code * scale
