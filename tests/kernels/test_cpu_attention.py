"""Native paged attention against FP64 and the reference, and bit for bit under every way of cutting a prompt."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import (
    Sequence,
    cached_values,
    cpu_backend,
    make_batch,
    random_cache,
    random_tensor,
    same_bits,
)

NAMES: dict[torch.dtype, Any] = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "fp8",
    torch.uint8: "nvfp4",
}
KV_TYPES = list(NAMES)
RAGGED = [Sequence(1, 1), Sequence(300, 1), Sequence(77, 20), Sequence(64, 64), Sequence(130, 129), Sequence(17, 0)]


def exact_attention(
    q: Tensor,
    kv: KVLayer,
    batch: ForwardBatch,
    scale: float,
    window: int | None,
    magnitudes: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query at a time in FP64; of the values' magnitudes if asked."""
    extra = torch.full((q.shape[1], 1), -math.inf) if sinks is None else sinks.cpu().unsqueeze(1)
    rows: list[Tensor] = []
    size, group = kv.block_size, q.shape[1] // kv.k.shape[1]
    for b in range(len(batch.seq_lens)):
        start, stop, length = int(batch.cu_seqlens_q[b]), int(batch.cu_seqlens_q[b + 1]), int(batch.seq_lens[b])
        at = torch.arange(length)
        blocks = batch.block_tables[b].long()[at // size]
        k, v = (x[blocks, :, at % size] for x in cached_values(kv))  # [S, Hkv, D]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        for row in range(start, stop):
            p = length - (stop - row)
            low = 0 if window is None else max(0, p - window + 1)
            scores = torch.einsum("hd,shd->hs", q[row].double(), k[low : p + 1]) * scale
            seen = v[low : p + 1].abs() if magnitudes else v[low : p + 1]
            weights = torch.cat([scores, extra.double()], dim=1).softmax(-1)[:, :-1]
            rows.append(torch.einsum("hs,shd->hd", weights, seen).flatten())
    return torch.stack(rows)


def multiplies_pairs(isa: str, dtype: torch.dtype, out_dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether queries and weights are rounded to BF16 and multiplied as such."""
    return isa == "avx512bf16" and torch.bfloat16 in (dtype, out_dtype) and kv_dtype != torch.float32


SHAPES = [(9, 3, 64), (4, 4, 32), (4, 1, 80), (2, 1, 24)]
TYPES = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
# (types, shape, window): plain queries in every shape; as layers call it (FP32 in, BF16 out), and wide heads, once each
CASES = [(types, shape, window) for types in TYPES[:2] for shape in SHAPES for window in (None, 1, 50)]
CASES += [(TYPES[2], SHAPES[0], None), (TYPES[2], (4, 2, 128), 50), (TYPES[0], (2, 2, 192), None)]


@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize(("types", "shape", "window"), CASES)
def test_attention_agrees_with_fp64(
    isa: str,
    types: tuple[torch.dtype, torch.dtype],
    kv_dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
) -> None:
    (dtype, out_dtype), (heads, kv_heads, head_dim) = types, shape
    spec = PagedAttentionSpec(heads, kv_heads, head_dim, window, NAMES[kv_dtype], NAMES[dtype], NAMES[out_dtype])
    if NAMES[kv_dtype] == "nvfp4" and head_dim % 16:
        assert "needs a head_dim divisible by 16" in str(cpu_backend(isa).refuses(spec))
        return
    batch = make_batch(RAGGED, 16, 50, seed=1)
    kv = random_cache(50, kv_heads, 16, head_dim, seed=2, dtype=kv_dtype)
    q = random_tensor(int(batch.cu_seqlens_q[-1]), heads, head_dim, seed=4, dtype=dtype)
    scale = 1 / math.sqrt(head_dim)
    y = cpu_backend(isa).paged_attention(spec)(q, kv, batch, scale)
    if multiplies_pairs(isa, dtype, out_dtype, kv_dtype):
        q = q.bfloat16()
    exact = exact_attention(q, kv, batch, scale, window)
    # scores up to about 6 are off by D * 2^-24 of that, weights likewise; values up to 5; one final rounding
    room = head_dim * 2.0**-24 * 6 * 5 + {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}[out_dtype] * exact.abs()
    if multiplies_pairs(isa, dtype, out_dtype, kv_dtype):
        # a weight is off by 2^-8 of itself at most, above and (NVFP4: not) below the fraction bar
        bound = 2.0**-8 if kv.k_blocks is not None else 2.0**-7
        room += bound * exact_attention(q, kv, batch, scale, window, magnitudes=True)
    assert bool(((y.double() - exact).abs() <= room).all())


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
def test_attention_with_sinks_agrees_with_fp64(isa: str, kv_dtype: torch.dtype, window: int | None) -> None:
    """From sinks that weigh nothing to one that leaves nothing for the values."""
    spec = PagedAttentionSpec(8, 2, 32, window, NAMES[kv_dtype], "float32", "float32", sinks=True)
    batch = make_batch(RAGGED, 16, 50, seed=1)
    kv = random_cache(50, 2, 16, 32, seed=2, dtype=kv_dtype)
    q = random_tensor(int(batch.cu_seqlens_q[-1]), 8, 32, seed=4, dtype=torch.float32)
    sinks = torch.tensor([0.0, 1.0, -2.0, 8.0, 3.0, -200.0, 200.0, 5.0])
    exact = exact_attention(q, kv, batch, 0.2, window, sinks=sinks)
    found = cpu_backend(isa).paged_attention(spec)(q, kv, batch, 0.2, sinks)
    plain = ReferenceBackend().paged_attention(spec)(q, kv, batch, 0.2, sinks)
    for y in (found, plain):
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=32 * 2.0**-24 * 6 * 5)
    assert bool((found.view(-1, 8, 32)[:, 6] == 0).all())
    with pytest.raises(KernelError, match="built with sinks=True"):
        cpu_backend(isa).paged_attention(spec)(q, kv, batch, 0.2)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64, 100])
def test_any_block_size_gives_the_reference_result(isa: str, block_size: int) -> None:
    batch = make_batch(RAGGED, block_size, 700 // block_size + 8, seed=1)
    kv = random_cache(700 // block_size + 8, 2, block_size, 32, seed=2)
    q = random_tensor(int(batch.cu_seqlens_q[-1]), 6, 32, seed=3, dtype=torch.float32)
    spec = PagedAttentionSpec(6, 2, 32, None, "bfloat16", "float32", "float32")
    y = cpu_backend(isa).paged_attention(spec)(q, kv, batch, 0.2)
    want = ReferenceBackend().paged_attention(spec)(q, kv, batch, 0.2)
    torch.testing.assert_close(y, want, rtol=0, atol=32 * 2.0**-24 * 6 * 5 * 2)  # twice the bound above: two results


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_has_the_same_bits_however_the_prompt_is_cut(
    isa: str, window: int | None, kv_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    length, heads, kv_heads, dim = 200, 6, 2, 32
    kv = random_cache(40, kv_heads, 16, dim, seed=1, dtype=kv_dtype)
    q = random_tensor(length, heads, dim, seed=3, dtype=dtype)
    # FP32 out: no last rounding that could hide a bit
    spec = PagedAttentionSpec(heads, kv_heads, dim, window, NAMES[kv_dtype], NAMES[dtype], "float32")
    whole_batch = make_batch([Sequence(length, length)], 16, 40)
    tables = whole_batch.block_tables
    whole = cpu_backend(isa, 2).paged_attention(spec)(q, kv, whole_batch, 0.17)

    def part(start: int, stop: int, threads: int, companions: int = 0) -> Tensor:
        """Tokens start..stop of the sequence, behind some other sequences of the batch."""
        others = [Sequence(30 + 7 * i, 1 + 5 * i) for i in range(companions)]
        batch = make_batch([*others, Sequence(stop, stop - start)], 16, 40, seed=5)
        width = max(tables.shape[1], batch.block_tables.shape[1])
        wide = torch.zeros(companions + 1, width, dtype=torch.int32)
        wide[:, : batch.block_tables.shape[1]] = batch.block_tables
        wide[-1, : tables.shape[1]] = tables[0]
        batch = dataclasses.replace(batch, block_tables=wide)
        before = random_tensor(int(batch.cu_seqlens_q[-2]), heads, dim, seed=8, dtype=dtype)
        y = cpu_backend(isa, threads).paged_attention(spec)(torch.cat([before, q[start:stop]]), kv, batch, 0.17)
        return y[len(before) :]

    for chunk, threads, companions in [(1, 1, 0), (7, 2, 0), (16, 3, 2), (64, 1, 1), (65, 2, 3), (199, 3, 4)]:
        pieces = [part(i, min(i + chunk, length), threads, companions) for i in range(0, length, chunk)]
        assert same_bits(torch.cat(pieces), whole), f"chunks of {chunk}"


def test_what_lies_beyond_a_sequence_never_shows(isa: str) -> None:
    """NaN in unused slots, in the null block, and in the keys and values of later tokens."""
    batch = make_batch([Sequence(70, 70), Sequence(33, 1)], 16, 20, seed=1)
    kv = random_cache(20, 1, 16, 32, seed=2)
    q = random_tensor(71, 2, 32, seed=3)
    attend = cpu_backend(isa).paged_attention(PagedAttentionSpec(2, 1, 32, None, "bfloat16", "bfloat16", "bfloat16"))
    clean = attend(q, kv, batch, 0.2)
    used = torch.zeros(20 * 16, dtype=torch.bool)
    for b, length in enumerate((70, 33)):
        at = torch.arange(length)
        used[batch.block_tables[b].long()[at // 16] * 16 + at % 16] = True
    hidden = ~used.view(20, 1, 16, 1).expand(20, 1, 16, 32)
    kv.k[hidden], kv.v[hidden] = torch.nan, torch.nan
    assert same_bits(attend(q, kv, batch, 0.2), clean)
    late = int(batch.block_tables[0, 4])  # positions 64..69 of the first sequence
    kv.k[late, 0, 1], kv.v[late, 0, 1] = torch.nan, torch.inf
    y = attend(q, kv, batch, 0.2)
    assert same_bits(y[:65], clean[:65])  # position 65 and later see it
    assert bool(y[65:70].isnan().all())
    assert same_bits(y[70:], clean[70:])


def test_extreme_scores_do_not_overflow(isa: str) -> None:
    batch = make_batch([Sequence(150, 2)], 16, 12)
    kv = random_cache(12, 1, 16, 32, seed=2, dtype=torch.float32)
    q = random_tensor(2, 2, 32, seed=3, dtype=torch.float32) * 1e4
    spec = PagedAttentionSpec(2, 1, 32, None, "float32", "float32", "float32")
    y = cpu_backend(isa).paged_attention(spec)(q, kv, batch, 1.0)
    # the best key wins alone: weights are 0 or 1 and the result is one value row, scaled by 1/1
    torch.testing.assert_close(y.double(), exact_attention(q, kv, batch, 1.0, None), rtol=1e-5, atol=1e-5)


def test_tables_and_lengths_that_point_outside_are_refused() -> None:
    kv = random_cache(8, 1, 16, 32, seed=1)
    attend = cpu_backend().paged_attention(PagedAttentionSpec(2, 1, 32, None, "bfloat16", "bfloat16", "bfloat16"))
    good = make_batch([Sequence(20, 2)], 16, 8)
    q = random_tensor(2, 2, 32, seed=1)
    outside = dataclasses.replace(good, block_tables=torch.tensor([[3, 8]], dtype=torch.int32))
    with pytest.raises(IndexError, match=r"block_tables\[0, 1\] is 8; the cache has 8 blocks"):
        attend(q, kv, outside, 0.2)
    with pytest.raises(IndexError, match="needs 3 blocks; its block table holds 2"):
        attend(q, kv, dataclasses.replace(good, seq_lens=torch.tensor([33], dtype=torch.int32)), 0.2)
    with pytest.raises(IndexError, match="2 new tokens and seq_lens 1"):
        attend(q, kv, dataclasses.replace(good, seq_lens=torch.tensor([1], dtype=torch.int32)), 0.2)
    with pytest.raises(IndexError, match="q has 2 rows"):
        attend(q, kv, dataclasses.replace(good, cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32)), 0.2)
    with pytest.raises(KernelError, match=r"seq_lens: expected a contiguous torch.int32"):
        attend(q, kv, dataclasses.replace(good, seq_lens=torch.tensor([20])), 0.2)
    with pytest.raises(KernelError, match=r"q: expected"):
        attend(q.float(), kv, good, 0.2)
