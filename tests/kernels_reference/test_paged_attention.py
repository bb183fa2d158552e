"""Paged attention against a loop over queries and heads in float64, on ragged and hostile batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import Dtype, KVDtype
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.reference import paged_attention
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4 import codec

BACKEND = ReferenceBackend()
BLOCK = 4
KV_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}
# (new tokens, tokens in all): decodes and prompt parts mixed, an empty prefix, one-token sequences, block edges
RAGGED = [(1, 1), (1, 4), (1, 5), (5, 5), (3, 11), (1, 33), (4, 8), (2, 2), (0, 6)]


def random_batch(
    pieces: Sequence[tuple[int, int]], kv_heads: int, dim: int, kv_dtype: KVDtype, poison: bool = True
) -> ForwardBatch:
    """Sequences in scattered blocks; with `poison`, every slot nobody may read holds NaN."""
    g = torch.Generator().manual_seed(len(pieces))
    needed = [math.ceil(total / BLOCK) for _, total in pieces]
    order = (torch.randperm(sum(needed), generator=g) + 1).tolist()
    tables = torch.zeros(len(pieces), max(needed) + 2, dtype=torch.int32)
    caches = [torch.full((sum(needed) + 1, kv_heads, BLOCK, dim), float("nan") if poison else 0.0) for _ in "kv"]
    for b, (_, total) in enumerate(pieces):
        mine = [order.pop() for _ in range(needed[b])]
        tables[b, : len(mine)] = torch.tensor(mine)
        for p in range(total):
            for cache in caches:
                cache[mine[p // BLOCK], :, p % BLOCK] = torch.randn(kv_heads, dim, generator=g) * 2
    scales = (0.03, 0.07) if kv_dtype == "fp8" else (1.0, 1.0)
    k, v = ((c / s).to(KV_TYPES[kv_dtype]) for c, s in zip(caches, scales, strict=True))
    none = torch.zeros(0, dtype=torch.int64)
    new = torch.tensor([0, *(n for n, _ in pieces)])
    return ForwardBatch(
        input_ids=none,
        positions=none,
        slot_mapping=none,
        block_tables=tables,
        seq_lens=torch.tensor([total for _, total in pieces], dtype=torch.int32),
        cu_seqlens_q=new.cumsum(0).to(torch.int32),
        logits_rows=none,
        kv=(KVLayer(k, v, *scales),),
    )


def expected(q: Tensor, batch: ForwardBatch, window: int | None, scale: float) -> Tensor:
    kv = batch.kv[0]
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // kv.k.shape[1]
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        start, stop = batch.cu_seqlens_q[b : b + 2].tolist()
        for row in range(start, stop):
            p = seq_len - (stop - row)
            seen = range(0 if window is None else max(0, p - window + 1), p + 1)
            at = [(int(batch.block_tables[b, s // BLOCK]), s % BLOCK) for s in seen]
            for h in range(q.shape[1]):
                k = torch.stack([kv.k[i, h // group, j].float().double() for i, j in at]) * kv.k_scale
                v = torch.stack([kv.v[i, h // group, j].float().double() for i, j in at]) * kv.v_scale
                out[row, h] = torch.softmax(k @ q[row, h].double() * scale, dim=0) @ v
    return out.flatten(1)


def run(q: Tensor, batch: ForwardBatch, window: int | None, kv_dtype: KVDtype, scale: float) -> Tensor:
    dtype: Dtype = "bfloat16" if q.dtype == torch.bfloat16 else "float32"
    spec = PagedAttentionSpec(q.shape[1], batch.kv[0].k.shape[1], q.shape[2], window, kv_dtype, dtype, dtype)
    return BACKEND.paged_attention(spec)(q, batch.kv[0], batch, scale)


def random_q(batch: ForwardBatch, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(int(batch.cu_seqlens_q[-1]), heads, dim, generator=g).to(dtype)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_ragged_batch_sees_exactly_its_own_visible_tokens(
    kv_dtype: KVDtype, dtype: torch.dtype, window: int | None, heads: int, kv_heads: int
) -> None:
    """Unwritten slots and the null block hold NaN, so reading one too many fails as surely as one too few."""
    batch = random_batch(RAGGED, kv_heads, 8, kv_dtype)
    q = random_q(batch, heads, 8, dtype)
    y = run(q, batch, window, kv_dtype, 0.35)
    assert y.dtype == dtype
    # FP32 throughout: about 1e-6 for values of a few units; bfloat16 adds its one rounding
    rtol, atol = (2.0**-8, 1e-5) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(y.double(), expected(q, batch, window, 0.35), rtol=rtol, atol=atol)


def test_prompt_longer_than_a_query_tile_with_and_without_window() -> None:
    length = paged_attention._QUERY_TILE * 2 + 3
    batch = random_batch([(length - 10, length)], 1, 8, "float32")
    q = random_q(batch, 2, 8, torch.float32)
    for window in (None, 50):
        torch.testing.assert_close(
            run(q, batch, window, "float32", 0.35).double(), expected(q, batch, window, 0.35), rtol=1e-5, atol=1e-5
        )


def test_decodes_too_many_for_one_gather_are_split_and_return_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch([(1, n) for n in (3, 40, 7, 21, 5, 33, 1, 18)], 2, 8, "float32")
    q = random_q(batch, 4, 8, torch.float32)
    together = run(q, batch, None, "float32", 0.35)
    monkeypatch.setattr(paged_attention, "_GATHER_VALUES", 40 * 2 * 8)  # room for the longest alone
    split = run(q, batch, None, "float32", 0.35)
    torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.double(), expected(q, batch, None, 0.35), rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    batch = random_batch([(1, 9), (6, 6)], 1, 8, "float32")
    q = random_q(batch, 1, 8, torch.float32) * 1e4
    y = run(q, batch, None, "float32", 1.0)
    assert bool(y.isfinite().all())
    # scores of 1e5 have FP32 steps of 2^-7, so weights near a tie may differ by about one percent
    torch.testing.assert_close(y.double(), expected(q, batch, None, 1.0), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [None, 3])
def test_a_bad_token_reaches_only_the_queries_that_see_it(bad: float, window: int | None) -> None:
    """Sequence 1 has a broken value at position 4: queries before it, or past its window, and others stay clean."""
    batch = random_batch([(1, 6), (10, 10), (1, 7)], 1, 8, "float32")
    q = random_q(batch, 2, 8, torch.float32)
    clean = run(q, batch, window, "float32", 0.35)
    batch.kv[0].v[int(batch.block_tables[1, 1]), 0, 0] = bad
    y = run(q, batch, window, "float32", 0.35)
    sees = [1 + p for p in range(10) if p >= 4 and (window is None or p < 4 + window)]
    hidden = [row for row in range(12) if row not in sees]
    assert not bool(y[sees].isfinite().any())
    torch.testing.assert_close(y[hidden], clean[hidden], rtol=1e-5, atol=1e-6)


def test_a_nan_query_stays_in_its_row() -> None:
    batch = random_batch([(1, 6), (3, 10), (1, 7)], 1, 8, "float32")
    q = random_q(batch, 2, 8, torch.float32)
    clean = run(q, batch, None, "float32", 0.35)
    q[2] = float("nan")
    y = run(q, batch, None, "float32", 0.35)
    assert bool(y[2].isnan().all())
    torch.testing.assert_close(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_an_nvfp4_cache_attends_as_its_dequantised_values_do(window: int | None) -> None:
    dim = 32
    batch = random_batch(RAGGED, 2, dim, "float32", poison=False)
    kv = batch.kv[0]
    parts = []
    for cache in (kv.k, kv.v):
        codes, blocks = codec.quantize_activation(cache.flatten(0, 2), torch.tensor(0.5))
        shape = cache.shape[:3]
        parts.append((codec.pack_codes(codes).view(*shape, -1), blocks.view(*shape, -1)))
    (k, k_blocks), (v, v_blocks) = parts
    plain = [codec.dequantize(c, s, torch.tensor(0.5)) for c, s in parts]
    q = random_q(batch, 6, dim, torch.float32)
    packed = dataclasses.replace(batch, kv=(KVLayer(k, v, 0.5, 0.5, k_blocks, v_blocks),))
    wide = dataclasses.replace(batch, kv=(KVLayer(*plain),))
    spec = PagedAttentionSpec(6, 2, dim, window, "nvfp4", "float32", "float32")
    y = BACKEND.paged_attention(spec)(q, packed.kv[0], packed, 0.35)
    # one scale on the gathered values or two on the stored ones: a rounding each, and the order of the sums is the same
    torch.testing.assert_close(y, run(q, wide, window, "float32", 0.35), rtol=1e-5, atol=1e-5)
