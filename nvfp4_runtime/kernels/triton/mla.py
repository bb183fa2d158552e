"""One decoding step of multi-head latent attention, absorbed: each latent vector is read once, as key and as value.

All heads share the cache, so a program takes sixteen of them; long sequences are cut as in paged_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import MLASpec
from nvfp4_runtime.kernels.triton.common import dot, emulated, round_to
from nvfp4_runtime.kernels.triton.paged_attention import LOG2_E, MOST_SPLITS, combine, gpu_facts, partial_sums

HEADS = 16  # of a program: the rows of a matrix instruction
KEYS = 32  # of a key tile
_WAVES = 2  # programs a multiprocessor should see


@triton.jit(do_not_specialize=["table_width"])
def mla_decode_kernel(
    q_nope,
    q_rope,
    cache,
    out,
    partial,
    partial_m,
    partial_l,
    block_tables,
    seq_lens,
    table_width,
    scale,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (b, g, s): the g-th HEADS heads of sequence b over run s of its latent vectors.

    scale                 softmax scale * log2(e)
    out                   [B, NUM_HEADS, RANK], unless SPLIT; then partial fp32 [B, NUM_HEADS, S, RANK] and the rest as
                          in paged_attention_kernel, S the programs of the grid's last axis
    RANK_WIDTH            RANK padded to a power of two; ROPE_WIDTH likewise
    """
    seq = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens + seq)
    begin = 0
    stop = seq_len
    if SPLIT:
        splits = tl.num_programs(2)
        tiles = (seq_len + KEYS - 1) // KEYS
        length = (tiles + splits - 1) // splits * KEYS
        begin = split * length
        stop = tl.minimum(begin + length, seq_len)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < NUM_HEADS
    row = seq * NUM_HEADS + head
    rank = tl.arange(0, RANK_WIDTH)
    rope = tl.arange(0, ROPE_WIDTH)
    latent_mask = inside[:, None] & (rank < RANK)[None, :]
    rope_mask = inside[:, None] & (rope < ROPE)[None, :]
    q = tl.load(q_nope + row[:, None] * RANK + rank[None, :], mask=latent_mask, other=0.0)
    q = round_to(q.to(tl.float32), OPERAND, EMULATED)
    q_turned = tl.load(q_rope + row[:, None] * ROPE + rope[None, :], mask=rope_mask, other=0.0)
    q_turned = round_to(q_turned.to(tl.float32), OPERAND, EMULATED)

    m = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, RANK_WIDTH], tl.float32)
    zero = tl.zeros([HEADS, KEYS], tl.float32)
    for start in range(begin, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < stop
        block = tl.load(block_tables + seq * table_width + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = (block * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * (RANK + ROPE)
        latent = tl.load(cache + at + rank[None, :], mask=seen[:, None] & (rank < RANK)[None, :], other=0.0).to(OPERAND)
        turned = tl.load(cache + at + RANK + rope[None, :], mask=seen[:, None] & (rope < ROPE)[None, :], other=0.0)
        s = dot(q_turned, tl.trans(turned.to(OPERAND)), dot(q, tl.trans(latent), zero, EMULATED), EMULATED)
        s = tl.where(seen[None, :], s * scale, float("-inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(s - base[:, None])
        old = tl.exp2(m - base)
        total = total * old + tl.sum(weights, axis=1)
        acc = dot(round_to(weights, OPERAND, EMULATED), latent, acc * old[:, None], EMULATED)
        m = new

    if SPLIT:
        at = row * tl.num_programs(2) + split
        tl.store(partial_m + at, m, mask=inside)
        tl.store(partial_l + at, total, mask=inside)
        if begin < stop:  # an empty run's sums are never read
            tl.store(partial + at[:, None] * RANK + rank[None, :], acc, mask=latent_mask)
    else:
        result = round_to(acc / total[:, None], out.dtype.element_ty, EMULATED)
        tl.store(out + row[:, None] * RANK + rank[None, :], result, mask=latent_mask)


class TritonMLA:
    """See `MLAKernel`. Lengths and block tables are not checked; how a sequence is cut depends on shapes alone."""

    def __init__(self, spec: MLASpec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        spec = self.spec
        self._check(q_nope, q_rope, cache)
        num_seqs = q_nope.shape[0]
        out = torch.empty(q_nope.shape, dtype=self.out_dtype, device=q_nope.device)
        if num_seqs == 0:
            return out
        head_groups = triton.cdiv(spec.num_heads, HEADS)
        most_keys = block_tables.shape[1] * cache.shape[1]
        splits = self.splits(num_seqs * head_groups, most_keys, gpu_facts(out.device).processors)
        partials = partial_sums(num_seqs * spec.num_heads, splits, spec.kv_lora_rank, out)
        mla_decode_kernel[(num_seqs, head_groups, splits)](
            q_nope,
            q_rope,
            cache,
            out,
            *partials,
            block_tables,
            seq_lens,
            block_tables.shape[1],
            scale * LOG2_E,
            **self.constants(cache.shape[1], splits > 1),
            num_warps=4,
            num_stages=2,
        )
        if splits > 1:
            combine(partials, out, 1.0, spec.kv_lora_rank, splits)
        return out

    @staticmethod
    def splits(programs: int, most_keys: int, processors: int) -> int:
        wanted = triton.next_power_of_2(triton.cdiv(_WAVES * processors, programs))
        return int(min(wanted, triton.next_power_of_2(triton.cdiv(most_keys, KEYS)), MOST_SPLITS))

    def constants(self, block_size: int, split: bool) -> dict[str, Any]:
        """What the kernel is compiled for."""
        spec = self.spec
        return {
            "NUM_HEADS": spec.num_heads,
            "RANK": spec.kv_lora_rank,
            "RANK_WIDTH": max(16, triton.next_power_of_2(spec.kv_lora_rank)),
            "ROPE": spec.rope_dim,
            "ROPE_WIDTH": max(16, triton.next_power_of_2(spec.rope_dim)),
            "BLOCK_SIZE": block_size,
            "HEADS": HEADS,
            "KEYS": KEYS,
            "SPLIT": split,
            "OPERAND": tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32,
            "EMULATED": emulated(),
        }

    def _check(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor) -> None:
        spec = self.spec
        expected = {
            "q_nope": (q_nope, (spec.num_heads, spec.kv_lora_rank)),
            "q_rope": (q_rope, (spec.num_heads, spec.rope_dim)),
            "cache": (cache, (cache.shape[1], spec.kv_lora_rank + spec.rope_dim)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor.shape[1:] != shape or tensor.dtype != self.dtype or not tensor.is_contiguous():
                raise KernelError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, expected contiguous {self.dtype} rows of {shape}"
                )


def compilations() -> list[Compilation]:
    kernel = TritonMLA(MLASpec(128, 512, 64, "bfloat16", "bfloat16"))
    signature = dict.fromkeys(("q_nope", "q_rope", "cache", "out"), "*bf16")
    signature |= dict.fromkeys(("partial", "partial_m", "partial_l"), "*fp32")
    signature |= dict.fromkeys(("block_tables", "seq_lens"), "*i32") | {"table_width": "i32", "scale": "fp32"}
    return [
        Compilation(
            name=f"mla_decode_{'split' if split else 'whole'}",
            kernel=mla_decode_kernel,
            signature=signature,
            constexprs=kernel.constants(64, split),
            num_warps=4,
            num_stages=2,
            expect=("mma", "cp.async"),
            unaligned=("table_width",),
        )
        for split in (False, True)
    ]
