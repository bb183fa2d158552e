"""Causal grouped-query attention over paged keys and values, for a whole ragged batch at once.

Sequences with one new token share padded, vectorised passes; longer ones are taken one by one. The query heads of a KV
group are folded into the query length, so keys and values are never repeated. Everything is float32 until the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.nvfp4 import codec

_QUERY_TILE = 128  # queries scored together; bounds the score matrix
_GATHER_VALUES = 1 << 20  # keys gathered together for decoding: 4 MiB of float32


class ReferencePagedAttention:
    """See `AttentionKernel`. A window of None is full causal attention."""

    def __init__(self, spec: PagedAttentionSpec) -> None:
        self.window = spec.window
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

    def __call__(
        self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        bounds: list[int] = batch.cu_seqlens_q.tolist()
        lens: list[int] = batch.seq_lens.tolist()
        out = torch.empty_like(q, dtype=self.out_dtype)
        decoding: list[int] = []
        for b, seq_len in enumerate(lens):
            start, stop = bounds[b], bounds[b + 1]
            if stop - start == 1:
                decoding.append(b)
            elif stop > start:
                self._extend(q[start:stop], kv, batch.block_tables[b], seq_len, scale, sinks, out[start:stop])
        for group in _groups_of_bounded_size(decoding, lens, kv):
            rows = torch.tensor([bounds[b] for b in group], device=q.device)
            index = torch.tensor(group, device=q.device)
            lens_of, tables = batch.seq_lens[index], batch.block_tables[index]
            out[rows] = self._decode(q[rows], kv, tables, lens_of, scale, sinks).to(out.dtype)
        return out.flatten(1)

    def _decode(
        self, q: Tensor, kv: KVLayer, tables: Tensor, seq_lens: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """One query per sequence: q [n, Hq, D], tables [n, max_blocks], seq_lens [n] -> [n, Hq, D]."""
        lens = seq_lens.to(torch.int64).unsqueeze(1)
        size = kv.block_size
        first = torch.zeros_like(lens) if self.window is None else (lens - self.window).clamp(min=0) // size
        width = int(((lens - 1) // size - first).max()) + 1
        columns = first + torch.arange(width, device=q.device)  # [n, width], counted in blocks
        blocks = tables.to(torch.int64).gather(1, columns.clamp(max=tables.shape[1] - 1))
        positions = (columns.unsqueeze(2) * size + torch.arange(size, device=q.device)).flatten(1)
        visible = positions < lens
        if self.window is not None:
            visible &= positions >= lens - self.window
        k, v = keys_and_values(kv, blocks)
        # what lies in slots nobody may see can be anything; 0 * NaN would still be NaN
        v.masked_fill_(~visible[:, None, :, None], 0.0)
        return attend(q.unsqueeze(1), k, v, visible.unsqueeze(1), scale, sinks).squeeze(1)

    def _extend(
        self, q: Tensor, kv: KVLayer, table: Tensor, seq_len: int, scale: float, sinks: Tensor | None, out: Tensor
    ) -> None:
        """Several queries of one sequence, its last q.shape[0] tokens: q [t, Hq, D]; fills out [t, Hq, D]."""
        num_queries, size = q.shape[0], kv.block_size
        position = seq_len - num_queries  # of the first query
        base = self._first_visible(position) // size * size  # keys before it are seen by no query
        blocks = table[base // size : math.ceil(seq_len / size)].to(torch.int64).unsqueeze(0)
        k, v = (x[:, :, : seq_len - base] for x in keys_and_values(kv, blocks))
        # a weight of 0 does not hide NaN or Inf: where there are any, each query gets only the keys it sees
        tile = _QUERY_TILE if bool(v.isfinite().all()) else 1
        for i in range(0, num_queries, tile):
            p = torch.arange(position + i, position + min(i + tile, num_queries), device=q.device).unsqueeze(1)
            low, high = self._first_visible(position + i), position + min(i + tile, num_queries)
            keys = torch.arange(low, high, device=q.device)
            visible = keys <= p
            if self.window is not None:
                visible &= keys > p - self.window
            span = slice(low - base, high - base)
            rows = slice(i, i + tile)
            out[rows] = attend(q[None, rows], k[:, :, span], v[:, :, span], visible.unsqueeze(0), scale, sinks)[0]

    def _first_visible(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T) v, hidden keys left out.

    q         [n, t, Hq, D]      any float type
    k, v      fp32 [n, Hkv, S, D]
    visible   bool [n, t, S]     every query sees a key
    sinks     fp32 [Hq] or None  one more score of each head, without a value
    returns   fp32 [n, t, Hq, D]
    """
    n, t, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    folded = q.to(torch.float32).view(n, t, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)  # [n, Hkv, G, t, D]
    scores = (folded.reshape(n, num_kv_heads, group * t, head_dim) * scale) @ k.transpose(2, 3)
    scores = scores.view(n, num_kv_heads, group, t, num_keys).masked_fill_(~visible[:, None, None], -math.inf)
    if sinks is not None:
        extra = sinks.to(torch.float32).view(1, num_kv_heads, group, 1, 1).expand(n, -1, -1, t, 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys].reshape(n, num_kv_heads, group * t, num_keys)
    out = (weights @ v).view(n, num_kv_heads, group, t, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(n, t, num_heads, head_dim)


def keys_and_values(kv: KVLayer, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`gather` of both caches of a layer."""
    return gather(kv.k, kv.k_blocks, blocks, kv.k_scale), gather(kv.v, kv.v_blocks, blocks, kv.v_scale)


def gather(cache: Tensor, block_scales: Tensor | None, blocks: Tensor, scale: float) -> Tensor:
    """The given blocks of a cache [num_blocks, Hkv, block_size, D] as float32 values.

    block_scales  None, or e4m3 [num_blocks, Hkv, block_size, D/16] of a cache of packed E2M1 codes
    blocks        int64 [n, w]
    returns       fp32 [n, Hkv, w * block_size, D]
    """
    values = _take(cache, blocks)
    if block_scales is not None:
        values = codec.dequantize(values, _take(block_scales, blocks), torch.ones(()))
    else:
        values = values.to(torch.float32)
    return values * scale if scale != 1.0 else values


def _take(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of a cache as stored, [n, Hkv, w * block_size, last axis]."""
    num_blocks, num_heads, block_size, width = cache.shape
    heads = torch.arange(num_heads, device=cache.device)
    rows = (blocks.unsqueeze(1) * num_heads + heads[:, None]).flatten()  # [n * Hkv * w]
    flat = cache.view(num_blocks * num_heads, block_size * width)
    if cache.dtype == torch.float8_e4m3fn:  # not every index op knows float8; bytes are bytes
        stored = flat.view(torch.uint8).index_select(0, rows).view(cache.dtype)
    else:
        stored = flat.index_select(0, rows)
    return stored.view(blocks.shape[0], num_heads, -1, width)


def _groups_of_bounded_size(decoding: list[int], lens: list[int], kv: KVLayer) -> list[list[int]]:
    """Sequences of similar length together, so that padding to the longest stays small and fits into the cache."""
    per_key = kv.k.shape[1] * kv.k.shape[3] * (1 if kv.k_blocks is None else 2)
    groups: list[list[int]] = []
    for b in sorted(decoding, key=lambda b: -lens[b]):
        room = groups and (len(groups[-1]) + 1) * lens[groups[-1][0]] * per_key <= _GATHER_VALUES
        if room:
            groups[-1].append(b)
        else:
            groups.append([b])
    return groups
