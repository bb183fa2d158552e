"""Weights, caches and batches for the benchmark, from a seed. Values are as large as those of a model's layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

BLOCK_SIZE = 16
INPUT_SCALE = 4.0 / 2688  # of activations up to 4
_SCALES = (0x50, 0x70)  # E4M3 bytes of 8 to 128
_RMS = 3.04 * 50.0  # of E2M1 values under such scales, roughly


def nvfp4_weight(n: int, k: int, seed: int, device: torch.device) -> NVFP4Weight:
    """[n, k] with a standard deviation near 1/sqrt(k), made on `device`."""
    g = torch.Generator(device).manual_seed(seed)
    scales = torch.randint(*_SCALES, (n, k // 16), generator=g, dtype=torch.uint8, device=device)
    return NVFP4Weight(
        packed=torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8, device=device),
        block_scale=scales.view(torch.float8_e4m3fn),
        weight_scale_2=torch.full((1,), k**-0.5 / _RMS, device=device),
        group_rows=(n,),
        input_scale=INPUT_SCALE,
    )


def activations(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal bfloat16."""
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device).to(torch.bfloat16)


def cache(kv_dtype: KVDtype, num_blocks: int, kv_heads: int, head_dim: int, seed: int, device: torch.device) -> KVLayer:
    """A cache whose every byte is written with finite values of magnitude near 1."""
    g = torch.Generator(device).manual_seed(seed)

    def random(width: int, low: int, high: int) -> Tensor:
        shape = (num_blocks, kv_heads, BLOCK_SIZE, width)
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8, device=device)

    if kv_dtype == "nvfp4":
        k, v = (random(head_dim // 2, 0, 256) for _ in "kv")
        k_blocks, v_blocks = (random(head_dim // 16, 0x28, 0x38).view(torch.float8_e4m3fn) for _ in "kv")
        return KVLayer(k, v, 1.0, 1.0, k_blocks, v_blocks)
    if kv_dtype == "fp8":
        k, v = (random(head_dim, 0x20, 0x40).view(torch.float8_e4m3fn) for _ in "kv")
        return KVLayer(k, v)
    # such bytes are positive BF16 numbers below 1; made in place, for a cache may take much of the memory
    k, v = (random(2 * head_dim, 0x20, 0x40).view(torch.bfloat16) for _ in "kv")
    return KVLayer(k, v)


def batch(lengths: list[int], new: list[int], device: torch.device, seed: int = 0) -> tuple[ForwardBatch, int]:
    """Sequences of `lengths` tokens, the last `new[i]` of them in this step, and the blocks a cache needs for them.

    Block ids are shuffled, as a pool's are after some time.
    """
    widths = [math.ceil(length / BLOCK_SIZE) for length in lengths]
    num_blocks = sum(widths) + 1
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)).to(torch.int32) + 1
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    positions, slots, start = [], [], 0
    for i, (length, count, width) in enumerate(zip(lengths, new, widths, strict=True)):
        tables[i, :width] = order[start : start + width]
        start += width
        position = torch.arange(length - count, length)
        positions.append(position)
        slots.append(tables[i, position // BLOCK_SIZE].to(torch.int64) * BLOCK_SIZE + position % BLOCK_SIZE)
    bounds = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(bounds[-1])
    made = ForwardBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        cu_seqlens_q=bounds.to(device),
        logits_rows=torch.arange(tokens, device=device),
        kv=(),
        max_query_len=max(new),
        max_seq_len=max(lengths),
    )
    return made, num_blocks
