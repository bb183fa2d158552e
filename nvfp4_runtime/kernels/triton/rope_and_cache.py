"""Per-head QK-norm, rotary embedding, and the write of K and V into the paged cache, in one launch.

What the cache then holds has the reference's bits where no sum is involved: V always, K without QK-norm. (The kernel is
compiled without fused multiply-add for that; memory bounds it, not arithmetic.) QK-norm sums a head's squares in
another order, so a key's value may round to its neighbour there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import RopeSpec
from nvfp4_runtime.kernels.triton.common import emulated, round_to
from nvfp4_runtime.kernels.triton.kv_format import KV_CODES, cache_arguments
from nvfp4_runtime.kernels.triton.numbers import e4m3_bytes, has_e4m3, quantize_blocks

_VALUES = 1024  # of heads that one program turns


@triton.jit
def _load_heads(base, norm, eps, cols, partner, mask, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads [HEADS, D] in float32, normed, and beside each value the one it rotates with."""
    x = tl.load(base + cols, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(base + partner, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        inside = cols < D
        x = x * factor[:, None] * tl.load(norm + cols, mask=inside, other=0.0).to(tl.float32)
        other = other * factor[:, None] * tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32)
    return x, other


@triton.jit
def _store_heads(
    x,
    cache,
    blocks,
    scale,
    rows,
    inside,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write float32 heads [HEADS, WIDTH] to rows `rows` [HEADS] of a cache seen as [.., D]."""
    cols = tl.arange(0, WIDTH)[None, :]
    if KV == 2:  # NVFP4
        codes, stored = quantize_blocks(tl.reshape(x, (HEADS, WIDTH // 16, 16)), scale)
        low, high = tl.split(tl.reshape(codes, (HEADS, WIDTH // 2, 2)))
        at = tl.arange(0, WIDTH // 2)[None, :]
        packed = (low | (high << 4)).to(tl.uint8)
        tl.store(cache + rows[:, None] * (D // 2) + at, packed, mask=inside[:, None] & (at < D // 2))
        block = tl.arange(0, WIDTH // 16)[None, :]
        tl.store(blocks + rows[:, None] * (D // 16) + block, stored, mask=inside[:, None] & (block < D // 16))
    else:
        mask = inside[:, None] & (cols < D)
        if scale != 1.0:
            x = tl.div_rn(x, tl.zeros_like(x) + scale)
        if KV == 1:  # FP8
            tl.store(cache + rows[:, None] * D + cols, e4m3_bytes(x, HARDWARE_E4M3), mask=mask)
        else:
            tl.store(cache + rows[:, None] * D + cols, round_to(x, cache.dtype.element_ty, EMULATED), mask=mask)


@triton.jit
def rope_and_cache_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    out,
    k_cache,
    v_cache,
    k_blocks,
    v_blocks,
    k_scale,
    v_scale,
    slot_mapping,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KV: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (t, g) takes the g-th group of HEADS heads of token t: first those of Q, then of K, then of V.

    HALF   half of rotary_dim       WIDTH  D padded to a power of two
    KV     kv_format.KV_CODES       the caches' bytes where they are FP8 or NVFP4
    """
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    cols = tl.arange(0, WIDTH)[None, :]
    partner = tl.where(cols < HALF, cols + HALF, tl.where(cols < 2 * HALF, cols - HALF, cols))
    heads = tl.arange(0, HEADS)
    token = qkv + t * ((Q_HEADS + 2 * KV_HEADS) * D)

    slot = tl.load(slot_mapping + t)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if group >= Q_GROUPS + KV_GROUPS:  # V is stored as it is
        head = (group - Q_GROUPS - KV_GROUPS) * HEADS + heads
        inside = head < KV_HEADS
        start = (Q_HEADS + KV_HEADS + head)[:, None] * D
        v = tl.load(token + start + cols, mask=inside[:, None] & (cols < D), other=0.0).to(tl.float32)
        rows = (block * KV_HEADS + head) * BLOCK_SIZE + offset
        _store_heads(v, v_cache, v_blocks, v_scale, rows, inside, D, WIDTH, HEADS, KV, HARDWARE_E4M3, EMULATED)
    else:
        position = tl.load(positions + t)
        turn = tl.where(cols < HALF, cols, cols - HALF)
        rotates = cols < 2 * HALF
        c = tl.load(cos + position * HALF + turn, mask=rotates, other=1.0)
        s = tl.load(sin + position * HALF + turn, mask=rotates, other=0.0)
        s = tl.where(cols < HALF, -s, s)
        if group >= Q_GROUPS:
            head = (group - Q_GROUPS) * HEADS + heads
            inside = head < KV_HEADS
            mask = inside[:, None] & (cols < D)
            base = token + (Q_HEADS + head)[:, None] * D
            k, other = _load_heads(base, k_norm, eps, cols, partner, mask, D, HAS_NORM)
            k = tl.where(rotates, k * c + other * s, k)
            rows = (block * KV_HEADS + head) * BLOCK_SIZE + offset
            _store_heads(k, k_cache, k_blocks, k_scale, rows, inside, D, WIDTH, HEADS, KV, HARDWARE_E4M3, EMULATED)
        else:
            head = group * HEADS + heads
            mask = (head < Q_HEADS)[:, None] & (cols < D)
            q, other = _load_heads(token + head[:, None] * D, q_norm, eps, cols, partner, mask, D, HAS_NORM)
            q = tl.where(rotates, q * c + other * s, q)
            at = (t * Q_HEADS + head)[:, None] * D + cols
            tl.store(out + at, round_to(q, out.dtype.element_ty, EMULATED), mask=mask)


class TritonRope:
    """See `RopeKernel`. Positions and slots are not checked: on a device nobody could be told in time."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._width = max(16, triton.next_power_of_2(spec.head_dim))
        heads = max(1, _VALUES // self._width)
        self._heads = min(heads, triton.next_power_of_2(spec.num_heads))

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
        spec = self.spec
        self._check(qkv, cos, q_norm, k_norm)
        num_tokens = qkv.shape[0]
        out = torch.empty((num_tokens, spec.num_heads, spec.head_dim), dtype=self.dtype, device=qkv.device)
        if num_tokens == 0:
            return out
        groups = triton.cdiv(spec.num_heads, self._heads) + 2 * triton.cdiv(spec.num_kv_heads, self._heads)
        k, v, k_blocks, v_blocks = cache_arguments(kv, spec)
        rope_and_cache_kernel[(num_tokens, groups)](
            qkv,
            positions,
            cos,
            sin,
            cos if q_norm is None else q_norm,
            cos if k_norm is None else k_norm,
            eps,
            out,
            k,
            v,
            k_blocks,
            v_blocks,
            kv.k_scale,
            kv.v_scale,
            slot_mapping,
            HARDWARE_E4M3=has_e4m3(qkv.device),
            **self.constants(kv.block_size),
            num_warps=4,
            enable_fp_fusion=False,
        )
        return out

    def constants(self, block_size: int) -> dict[str, Any]:
        """What the kernel is compiled for, less HARDWARE_E4M3."""
        spec = self.spec
        return {
            "Q_HEADS": spec.num_heads,
            "KV_HEADS": spec.num_kv_heads,
            "D": spec.head_dim,
            "HALF": spec.rotary_dim // 2,
            "WIDTH": self._width,
            "HEADS": self._heads,
            "BLOCK_SIZE": block_size,
            "HAS_NORM": spec.qk_norm,
            "KV": KV_CODES[spec.kv_dtype],
            "EMULATED": emulated(),
        }

    def _check(self, qkv: Tensor, cos: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        spec = self.spec
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        if qkv.shape[1:] != (width,) or not qkv.is_contiguous():
            raise KernelError(f"qkv is {list(qkv.shape)}, expected contiguous rows of {width} (q, k and v heads)")
        if cos.shape[1:] != (spec.rotary_dim // 2,):
            raise KernelError(f"cos is {list(cos.shape)}, expected [max_positions, {spec.rotary_dim // 2}]")
        if (q_norm is not None) != spec.qk_norm or (k_norm is not None) != spec.qk_norm:
            raise KernelError(f"this layer was built with qk_norm={spec.qk_norm}; q_norm and k_norm must agree with it")


def compilations() -> list[Compilation]:
    """E4M3 by the instruction where there is one, by bits on sm_80."""
    found = []
    pointers = {"positions": "*i64", "slot_mapping": "*i64", "cos": "*fp32", "sin": "*fp32", "out": "*bf16"}
    caches = ("k_cache", "v_cache", "k_blocks", "v_blocks")
    for kv, cache, norm in (("bfloat16", "*bf16", True), ("fp8", "*u8", False), ("nvfp4", "*u8", False)):
        kernel = TritonRope(RopeSpec(32, 8, 128, 128, norm, kv, "bfloat16"))  # type: ignore[arg-type]
        signature = dict.fromkeys(("qkv", "q_norm", "k_norm"), "*bf16") | pointers | dict.fromkeys(caches, cache)
        signature |= dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32")
        found += [
            Compilation(
                name=f"{kv}{'' if hardware else '_bits'}",
                kernel=rope_and_cache_kernel,
                signature=signature,
                constexprs=kernel.constants(16) | {"HARDWARE_E4M3": hardware},
                expect=("cvt.rn.satfinite.e4m3x2",) if hardware and kv == "fp8" else (),
                targets=targets,
            )
            for hardware, targets in ((True, (89, 90, 100, 103, 120, 121)), (False, (80,)))
        ]
    return found
