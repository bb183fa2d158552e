"""Native attention at the borders of its key segments: every cache type, GQA ratio, head width; hostile caches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import (
    Sequence,
    cpu_backend,
    make_batch,
    random_cache,
    random_tensor,
    same_bits,
)
from tests.kernels.test_cpu_attention import KV_TYPES, NAMES

BORDERS = [1, 63, 64, 255, 256, 257, 511, 512, 513, 640, 769]


def attend(
    kv: KVLayer,
    q: Tensor,
    batch: ForwardBatch,
    kv_dtype: torch.dtype,
    window: int | None = None,
    isa: str | None = None,
    threads: int = 2,
) -> Tensor:
    """Native attention in FP32 out, so that no last rounding hides a bit. BF16 queries may be multiplied as such."""
    width = q.shape[2]
    spec = PagedAttentionSpec(q.shape[1], kv.k.shape[1], width, window, NAMES[kv_dtype], NAMES[q.dtype], "float32")
    return cpu_backend(isa, threads).paged_attention(spec)(q, kv, batch, 1 / math.sqrt(width))


def reference(kv: KVLayer, q: Tensor, batch: ForwardBatch, kv_dtype: torch.dtype, window: int | None = None) -> Tensor:
    width = q.shape[2]
    spec = PagedAttentionSpec(q.shape[1], kv.k.shape[1], width, window, NAMES[kv_dtype], "float32", "float32")
    return ReferenceBackend().paged_attention(spec)(q.float(), kv, batch, 1 / math.sqrt(width))


def room(width: int, dtype: torch.dtype = torch.float32) -> float:
    """Twice (two results): scores up to about 6 are off by width * 2^-24 of that, weights likewise; values up to 5.

    Under BF16 queries weights may be rounded to BF16: 2^-8 of each, above and below the fraction bar.
    """
    return 2 * width * 2.0**-24 * 6 * 5 + (2.0**-7 * 5 if dtype == torch.bfloat16 else 0.0)


TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of queries


@TYPES
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("window", [None, 64, 257, 512])
def test_a_token_has_the_same_bits_decoded_alone_in_company_and_within_a_prompt(
    isa: str, kv_dtype: torch.dtype, window: int | None, dtype: torch.dtype
) -> None:
    """Decoding splits keys over threads; the prompt walks them in one item. Positions around every segment's border."""
    length, heads, kv_heads, width = max(BORDERS), 6, 2, 32
    kv = random_cache(60, kv_heads, 16, width, seed=1, dtype=kv_dtype)
    q = random_tensor(length, heads, width, seed=3, dtype=dtype)
    prompt = make_batch([Sequence(length, length)], 16, 60)
    whole = attend(kv, q, prompt, kv_dtype, window, isa)
    tables = prompt.block_tables
    for threads in (1, 3):
        for p in BORDERS:
            alone = dataclasses.replace(make_batch([Sequence(p, 1)], 16, 60), block_tables=tables)
            row = attend(kv, q[p - 1 : p], alone, kv_dtype, window, isa, threads)
            assert same_bits(row, whole[p - 1 : p]), f"position {p - 1}, {threads} thread(s)"
    together = dataclasses.replace(
        make_batch([Sequence(p, 1) for p in BORDERS], 16, 1000), block_tables=tables.repeat(len(BORDERS), 1)
    )
    rows = torch.tensor(BORDERS) - 1
    assert same_bits(attend(kv, q[rows], together, kv_dtype, window, isa), whole[rows])


@TYPES
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("chunk", [2, 37, 256, 300])
def test_chunked_prefill_over_segment_borders_has_the_prompts_bits(
    isa: str, kv_dtype: torch.dtype, chunk: int, dtype: torch.dtype
) -> None:
    length, heads, kv_heads, width = 530, 3, 1, 64
    kv = random_cache(40, kv_heads, 16, width, seed=1, dtype=kv_dtype)
    q = random_tensor(length, heads, width, seed=3, dtype=dtype)
    prompt = make_batch([Sequence(length, length)], 16, 40)
    whole = attend(kv, q, prompt, kv_dtype, None, isa)
    starts = range(0, length, chunk) if chunk > 2 else range(500, length, chunk)  # pairs: around a border is enough
    for start in starts:
        stop = min(start + chunk, length)
        part = dataclasses.replace(make_batch([Sequence(stop, stop - start)], 16, 40), block_tables=prompt.block_tables)
        assert same_bits(attend(kv, q[start:stop], part, kv_dtype, None, isa, 1 + start % 3), whole[start:stop])


@pytest.mark.parametrize("width", [64, 80, 128, 192])
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("block_size", [3, 16])
def test_every_gqa_ratio_and_width_has_the_prompts_bits(
    isa: str, kv_dtype: torch.dtype, width: int, block_size: int
) -> None:
    """Decoded and in a prompt, with a window that begins and ends within a pair of positions."""
    kv = random_cache(140, 1, block_size, width, seed=1, dtype=kv_dtype)
    prompt = make_batch([Sequence(300, 12)], block_size, 140)
    for group in (1, 2, 3, 4, 7):
        q = random_tensor(12, group, width, seed=group)
        whole = attend(kv, q, prompt, kv_dtype, 41, isa)
        for i in range(12):
            alone = make_batch([Sequence(289 + i, 1)], block_size, 140)
            alone = dataclasses.replace(alone, block_tables=prompt.block_tables)
            assert same_bits(attend(kv, q[i : i + 1], alone, kv_dtype, 41, isa), whole[i : i + 1])


@TYPES
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("group", range(1, 10))
def test_every_gqa_ratio_agrees_with_the_reference(
    isa: str, kv_dtype: torch.dtype, group: int, dtype: torch.dtype
) -> None:
    batch = make_batch([Sequence(270, 1), Sequence(300, 70), Sequence(5, 0), Sequence(1, 1), Sequence(40, 2)], 16, 60)
    kv = random_cache(60, 2, 16, 64, seed=group, dtype=kv_dtype)
    q = random_tensor(74, 2 * group, 64, seed=3, dtype=dtype)
    y, want = attend(kv, q, batch, kv_dtype, None, isa), reference(kv, q, batch, kv_dtype)
    torch.testing.assert_close(y, want, rtol=0, atol=room(64, dtype))


@TYPES
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
def test_every_head_width_agrees_with_the_reference(
    isa: str, kv_dtype: torch.dtype, width: int, dtype: torch.dtype
) -> None:
    batch = make_batch([Sequence(290, 1), Sequence(270, 30)], 16, 60)
    kv = random_cache(60, 2, 16, width, seed=width, dtype=kv_dtype)
    q = random_tensor(31, 4, width, seed=3, dtype=dtype)
    for window in (None, 20):
        y, want = attend(kv, q, batch, kv_dtype, window, isa), reference(kv, q, batch, kv_dtype, window)
        torch.testing.assert_close(y, want, rtol=0, atol=room(width, dtype))


@TYPES
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16, 40])
def test_any_block_size_agrees_with_the_reference(
    isa: str, kv_dtype: torch.dtype, block_size: int, dtype: torch.dtype
) -> None:
    blocks = 700 // block_size + 8
    batch = make_batch([Sequence(290, 1), Sequence(270, 30)], block_size, blocks)
    kv = random_cache(blocks, 1, block_size, 48, seed=2, dtype=kv_dtype)
    q = random_tensor(31, 5, 48, seed=3, dtype=dtype)
    y, want = attend(kv, q, batch, kv_dtype, None, isa), reference(kv, q, batch, kv_dtype)
    torch.testing.assert_close(y, want, rtol=0, atol=room(48, dtype))


@TYPES
def test_every_stored_byte_is_read_as_its_value(isa: str, dtype: torch.dtype) -> None:
    """One visible key: the result is its value, exactly. All 256 FP8 bytes; all 16 codes under every block scale."""
    batch = make_batch([Sequence(1, 1)], 16, 2)
    block = int(batch.block_tables[0, 0])
    q = torch.ones(1, 1, 256, dtype=dtype)
    kv = KVLayer(*(torch.zeros(2, 1, 16, 256, dtype=torch.float8_e4m3fn) for _ in range(2)))
    every = torch.arange(256, dtype=torch.uint8)
    kv.v.view(torch.uint8)[block, 0, 0] = every
    torch.testing.assert_close(
        attend(kv, q, batch, torch.float8_e4m3fn, None, isa)[0],
        every.view(torch.float8_e4m3fn).float(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    q = torch.ones(1, 1, 16, dtype=dtype)
    codes = torch.zeros(2, 1, 16, 8, dtype=torch.uint8)
    codes[block, 0, 0] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for byte in range(256):
        scales = torch.zeros(2, 1, 16, 1, dtype=torch.uint8)
        scales[block, 0, 0] = byte
        stored = scales.view(torch.float8_e4m3fn)
        kv = KVLayer(torch.zeros_like(codes), codes, 1.0, 1.0, torch.zeros_like(scales).view(stored.dtype), stored)
        y = attend(kv, q, batch, torch.uint8, None, isa)[0]
        want = values * torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@TYPES
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("at", [300, 301])
def test_a_bad_key_or_value_reaches_only_the_rows_that_see_it(
    isa: str, kv_dtype: torch.dtype, bad: float, at: int, dtype: torch.dtype
) -> None:
    length, width = 400, 32
    batch = make_batch([Sequence(length, length), Sequence(length, 1)], 16, 60)
    kv = random_cache(60, 1, 16, width, seed=2, dtype=kv_dtype)
    q = random_tensor(length + 1, 2, width, seed=3, dtype=dtype)
    clean = attend(kv, q, batch, kv_dtype, 64, isa)
    block, offset = int(batch.block_tables[0, at // 16]), at % 16
    for cache in (kv.k, kv.v):
        kept = cache[block, 0, offset].clone()
        cache[block, 0, offset] = bad
        y, want = attend(kv, q, batch, kv_dtype, 64, isa), reference(kv, q, batch, kv_dtype, 64)
        cache[block, 0, offset] = kept
        assert same_bits(y[:at], clean[:at])
        assert same_bits(y[at + 64 :], clean[at + 64 :])
        seen, wanted = y[at : at + 64], want[at : at + 64]
        # a key of +-huge takes the whole weight or none, by the sign of its score; where FP32 overflows
        # inside the dot product the order of additions may give Inf or NaN, and so may the reference
        finite = seen.isfinite() & wanted.isfinite()
        torch.testing.assert_close(
            seen[finite], wanted[finite], rtol=1e-4 if dtype == torch.float32 else 2.0**-7, atol=room(width, dtype)
        )
        assert bool(wanted.isfinite().all()) or not bool(seen.isfinite().all())


def test_a_segment_whose_scores_are_all_minus_infinity_weighs_nothing(isa: str) -> None:
    """Keys 0..255 give -inf (0 weight), later ones do not: the first segment must not turn the merge into NaN."""
    batch = make_batch([Sequence(300, 1)], 16, 30)
    kv = random_cache(30, 1, 16, 16, seed=2, dtype=torch.float32)
    for p in range(256):
        kv.k[int(batch.block_tables[0, p // 16]), 0, p % 16] = -3e38
    q = torch.full((1, 1, 16), 100.0)
    for p in range(256, 300):
        kv.k[int(batch.block_tables[0, p // 16]), 0, p % 16] *= 1e-3
    y, want = attend(kv, q, batch, torch.float32, None, isa), reference(kv, q, batch, torch.float32)
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y, want, rtol=0, atol=room(16))


@TYPES
@pytest.mark.parametrize("position", [20, 21])
def test_nan_block_scale_of_an_nvfp4_value_shows(isa: str, position: int, dtype: torch.dtype) -> None:
    batch = make_batch([Sequence(40, 40)], 16, 10)
    kv = random_cache(10, 1, 16, 64, seed=2, dtype=torch.uint8)
    assert kv.v_blocks is not None
    kv.v_blocks.view(torch.uint8)[int(batch.block_tables[0, 1]), 0, position - 16, 2] = 0x7F  # dimensions 32..47
    y = attend(kv, random_tensor(40, 1, 64, seed=1, dtype=dtype), batch, torch.uint8, None, isa)
    nan = y.isnan()
    assert bool(nan[position:, 32:48].all())
    assert int(nan.sum()) == (40 - position) * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.037])
def test_nvfp4_cache_write_has_the_references_codes_and_scales(isa: str, dtype: torch.dtype, scale: float) -> None:
    """Values of every magnitude, saturating blocks, blocks too small for a scale; rotary_dim 0, so bits can agree."""
    tokens, width = 64, 48
    spec = RopeSpec(1, 2, width, 0, False, "nvfp4", NAMES[dtype])
    exponents = torch.randint(-14, 14, (tokens, 5 * width // 16), generator=torch.Generator().manual_seed(1))
    qkv = random_tensor(tokens, 5 * width, seed=2, dtype=torch.float32)
    qkv = (qkv * 2.0 ** exponents.repeat_interleave(16, dim=1)).to(dtype)
    positions, slots = torch.zeros(tokens, dtype=torch.int64), torch.randperm(80)[:tokens]
    caches = []
    for backend in (cpu_backend(isa), ReferenceBackend()):
        kv = random_cache(5, 2, 16, width, seed=3, dtype=torch.uint8)
        kv = dataclasses.replace(kv, k_scale=scale, v_scale=scale)
        none = torch.zeros(4, 0)
        backend.rope_and_cache(spec)(qkv, positions, none, none, None, None, 1e-6, kv, slots)
        caches.append(kv)
    ours, theirs = caches
    for a, b in (
        (ours.k, theirs.k),
        (ours.v, theirs.v),
        (ours.k_blocks, theirs.k_blocks),
        (ours.v_blocks, theirs.v_blocks),
    ):
        assert a is not None
        assert b is not None
        assert same_bits(a, b)


def test_nan_and_infinity_enter_an_nvfp4_cache_as_they_enter_the_references(isa: str) -> None:
    spec = RopeSpec(1, 1, 16, 0, False, "nvfp4", "float32")
    rows = torch.zeros(3, 48)
    rows[:, 32:] = torch.linspace(-3, 3, 16)
    rows[0, 35], rows[1, 35], rows[2, 35] = math.nan, math.inf, -3e38
    stored = []
    for backend in (cpu_backend(isa), ReferenceBackend()):
        kv = random_cache(1, 1, 4, 16, seed=3, dtype=torch.uint8)
        kv = dataclasses.replace(kv, k_scale=1.0, v_scale=1.0)
        none = torch.zeros(1, 0)
        zeros = torch.zeros(3, dtype=torch.int64)
        backend.rope_and_cache(spec)(rows, zeros, none, none, None, None, 1e-6, kv, torch.arange(3))
        stored.append(kv)
    ours, theirs = stored
    assert ours.v_blocks is not None
    assert theirs.v_blocks is not None
    assert same_bits(ours.v_blocks, theirs.v_blocks)
    assert bool(ours.v_blocks[0, 0, 0].float().isnan())
    assert same_bits(ours.v[0, 0, 1:3], theirs.v[0, 0, 1:3])


def test_an_nvfp4_cache_with_the_wrong_parts_is_refused() -> None:
    backend = cpu_backend()
    narrow = PagedAttentionSpec(2, 1, 24, None, "nvfp4", "float32", "float32")
    assert "divisible by 16" in str(backend.refuses(narrow))
    assert backend.refuses(narrow) == ReferenceBackend().refuses(narrow)
    batch = make_batch([Sequence(20, 1)], 16, 4)
    kv, q = random_cache(4, 1, 16, 32, seed=1, dtype=torch.uint8), random_tensor(1, 2, 32, seed=1, dtype=torch.float32)
    with pytest.raises(KernelError, match="needs block scales"):
        attend(dataclasses.replace(kv, k_blocks=None), q, batch, torch.uint8)
    with pytest.raises(KernelError, match=r"kv.v_blocks: expected"):
        attend(dataclasses.replace(kv, v_blocks=kv.v), q, batch, torch.uint8)
    plain = random_cache(4, 1, 16, 32, seed=1)
    with pytest.raises(KernelError, match="has no block scales"):
        attend(dataclasses.replace(plain, k_blocks=kv.k_blocks), q, batch, torch.bfloat16)
