"""Paged attention under the interpreter, against FP64 and the reference: ragged, windowed, split, and hostile."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton import paged_attention
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.kernels.triton.paged_attention import GPUFacts, TritonPagedAttention
from tests.kernels.conftest import Sequence, cached_values, make_batch, random_cache, random_tensor
from tests.kernels.test_cpu_attention import exact_attention

STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}
REFERENCE = ReferenceBackend()
# lengths at and around the edges of blocks (4) and of key tiles (64); a prompt, one token, none this step
MIXED = [Sequence(1, 1), Sequence(70, 1), Sequence(20, 9), Sequence(8, 8), Sequence(65, 5), Sequence(12, 0)]
DECODING = [Sequence(n, 1) for n in (1, 4, 5, 64, 65, 131)] + [Sequence(9, 0)]


def moved(item, device: torch.device):
    """A KVLayer or ForwardBatch on the backend's device."""
    fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    return dataclasses.replace(item, **{n: t.to(device) for n, t in fields.items() if isinstance(t, Tensor)})


def sinks_of(spec: PagedAttentionSpec) -> Tensor | None:
    return torch.linspace(-2, 6, spec.num_heads) if spec.sinks else None


def attend(backend: TritonBackend, spec: PagedAttentionSpec, q: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
    kernel = backend.paged_attention(spec)
    device, sinks = backend.device, sinks_of(spec)
    sinks = None if sinks is None else sinks.to(device)
    return kernel(q.to(device), moved(kv, device), moved(batch, device), spec.head_dim**-0.5, sinks).cpu()


def allowed_error(spec: PagedAttentionSpec, q: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
    """What rounding may cost, per value.

    With bfloat16 operands a score is off by nothing (q comes as bfloat16), a
    weight by 2^-8 of itself, so the mean of v by 2^-8 of the mean of |v|, and the result is rounded by 2^-8 once more.
    Exponentials and sums in float32 add some 1e-5.
    """
    magnitude = exact_attention(q, kv, batch, spec.head_dim**-0.5, spec.window, magnitudes=True)
    bits = 0.0 if spec.kv_dtype == "float32" else 2.0**-8
    bits += 2.0**-8 if spec.out_dtype == "bfloat16" else 0.0
    return magnitude * (bits + 1e-5) + 1e-6


def check(backend, spec, sequences, *, block_size=4, max_query_len=None, seed=0):
    needed = 1 + sum(-(-s.length // block_size) for s in sequences)
    batch = make_batch(sequences, block_size=block_size, num_blocks=needed)
    batch = dataclasses.replace(batch, max_query_len=max_query_len)
    kv = random_cache(needed, spec.num_kv_heads, block_size, spec.head_dim, seed=seed, dtype=STORED[spec.kv_dtype])
    tokens = int(batch.cu_seqlens_q[-1])
    q = random_tensor(tokens, spec.num_heads, spec.head_dim, seed=seed + 7, dtype=getattr(torch, spec.dtype))
    found = attend(backend, spec, q, kv, batch).double()
    expected = exact_attention(q, kv, batch, spec.head_dim**-0.5, spec.window, sinks=sinks_of(spec))
    excess = (found - expected).abs() - allowed_error(spec, q, kv, batch)
    assert excess.max() <= 0, f"off by {float(excess.max())} more than rounding explains"


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("decode", "sequences"), [(True, DECODING), (False, MIXED)])
def test_every_cache_and_both_ways_of_attending(triton_backend, kv_dtype, window, decode, sequences):
    spec = PagedAttentionSpec(2, 1, 32, window, kv_dtype, "bfloat16", "bfloat16")
    check(triton_backend, spec, sequences, max_query_len=1 if decode else None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize(("dim", "kv_dtype"), [(64, "bfloat16"), (96, "nvfp4"), (96, "fp8"), (128, "float32")])
def test_groups_and_head_dims(triton_backend, heads, kv_heads, dim, kv_dtype):
    spec = PagedAttentionSpec(heads, kv_heads, dim, None, kv_dtype, "bfloat16", "bfloat16")
    check(triton_backend, spec, [Sequence(17, 1), Sequence(5, 3)], block_size=16)


@pytest.mark.parametrize("window", [1, 4, 63, 64, 65])
def test_windows_that_end_at_block_and_tile_edges(triton_backend, window):
    spec = PagedAttentionSpec(1, 1, 16, window, "float32", "float32", "float32")
    check(triton_backend, spec, [Sequence(130, 1), Sequence(64, 2), Sequence(3, 3)])
    check(triton_backend, spec, [Sequence(130, 1), Sequence(64, 1)], max_query_len=1)


def test_a_group_that_does_not_divide_the_tile_and_prompts_of_several_tiles(triton_backend):
    spec = PagedAttentionSpec(3, 1, 32, None, "bfloat16", "bfloat16", "float32")
    check(triton_backend, spec, [Sequence(45, 45), Sequence(60, 22), Sequence(3, 1)])


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize(("decode", "sequences"), [(True, DECODING), (False, MIXED)])
def test_sinks_join_the_sum_once_however_keys_are_split(triton_backend, monkeypatch, processors, decode, sequences):
    monkeypatch.setattr(paged_attention, "gpu_facts", lambda device: GPUFacts(processors))
    spec = PagedAttentionSpec(6, 2, 32, None if decode else 40, "fp8", "bfloat16", "float32", sinks=True)
    check(triton_backend, spec, sequences, max_query_len=1 if decode else None)


@pytest.mark.parametrize("decode", [True, False])
def test_how_keys_are_split_changes_rounding_alone(triton_backend, monkeypatch, decode):
    """1 program a multiprocessor to 64 runs of keys: some runs are empty, some end inside a block."""
    spec = PagedAttentionSpec(2, 1, 32, None, "float32", "float32", "float32")
    for processors in (1, 3, 64):
        monkeypatch.setattr(paged_attention, "gpu_facts", lambda device, n=processors: GPUFacts(n))
        sequences = [Sequence(1, 1), Sequence(200, 1), Sequence(33, 1)] + ([] if decode else [Sequence(97, 3)])
        check(triton_backend, spec, sequences, max_query_len=1 if decode else None)


def test_the_cut_of_a_launch_depends_on_shapes_alone():
    spec = PagedAttentionSpec(32, 8, 128, None, "bfloat16", "bfloat16", "bfloat16")
    kernel, hopper = TritonPagedAttention(spec), GPUFacts(132)
    one = kernel.tile(1, 1, decode=True, most_keys=131072, gpu=hopper)
    assert (one.tiles, one.rows, one.splits) == (1, 16, 64)
    assert kernel.tile(1, 1, decode=True, most_keys=200, gpu=hopper).splits == 4, "no more runs than key tiles"
    assert kernel.tile(256, 256, decode=True, most_keys=131072, gpu=hopper).splits == 1
    prompt = kernel.tile(2048, 1, decode=False, most_keys=4096, gpu=hopper)
    assert (prompt.rows, prompt.tokens, prompt.tiles) == (128, 32, 65)
    assert kernel.tile(2048, 1, decode=False, most_keys=4096, gpu=GPUFacts(108, rows=64)).rows == 64
    windowed = TritonPagedAttention(dataclasses.replace(spec, window=128))
    assert windowed.tile(1, 1, decode=True, most_keys=131072, gpu=hopper).splits == 4


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "nvfp4"])
@pytest.mark.parametrize("decode", [True, False])
def test_nan_in_slots_nobody_may_see_does_not_leak(triton_backend, kv_dtype, decode):
    """Everything but the visible slots is NaN: the null block, the tails of last blocks, what windows have passed."""
    spec = PagedAttentionSpec(2, 1, 32, 9, kv_dtype, "bfloat16", "float32")
    sequences = [Sequence(13, 1), Sequence(30, 1)] + ([] if decode else [Sequence(6, 6)])
    batch = make_batch(sequences, block_size=8, num_blocks=10)
    kv = random_cache(10, 1, 8, 32, seed=1, dtype=STORED[kv_dtype])
    q = random_tensor(int(batch.cu_seqlens_q[-1]), 2, 32, seed=2)
    batch = dataclasses.replace(batch, max_query_len=1 if decode else None)
    clean = attend(triton_backend, spec, q, kv, batch)
    hidden = torch.ones(10, 8, dtype=torch.bool)
    for b, s in enumerate(sequences):
        for p in range(max(0, s.length - s.new - 8), s.length):
            hidden[batch.block_tables[b, p // 8], p % 8] = False
    for cache in (kv.k, kv.v) if kv_dtype != "nvfp4" else (kv.k_blocks, kv.v_blocks):
        wide = cache.float()
        wide[hidden.unsqueeze(1)] = torch.nan
        cache.copy_(wide.to(cache.dtype))
    assert any(x.isnan().any() for x in cached_values(kv))
    assert torch.equal(attend(triton_backend, spec, q, kv, batch), clean)


def test_a_visible_nan_reaches_only_the_queries_that_see_it(triton_backend):
    spec = PagedAttentionSpec(1, 1, 16, None, "bfloat16", "bfloat16", "float32")
    batch = make_batch([Sequence(6, 6), Sequence(4, 1)], block_size=4, num_blocks=4)
    q = random_tensor(7, 1, 16, seed=3)
    for cache, value in (("v", torch.nan), ("v", torch.inf), ("k", torch.nan)):
        kv = random_cache(4, 1, 4, 16, seed=4)
        clean = attend(triton_backend, spec, q, kv, batch)
        getattr(kv, cache)[batch.block_tables[0, 0], 0, 3, 5] = value  # position 3 of the prompt
        found = attend(triton_backend, spec, q, kv, batch)
        assert not found[3:6].isfinite().all(dim=1).any()
        assert torch.equal(found[[0, 1, 2, 6]], clean[[0, 1, 2, 6]])


def test_it_agrees_with_the_reference_on_huge_scores(triton_backend):
    """Scores in the thousands: softmax picks one key, and nothing overflows."""
    spec = PagedAttentionSpec(2, 2, 32, None, "float32", "float32", "float32")
    batch = make_batch([Sequence(40, 1), Sequence(7, 2)], block_size=4, num_blocks=20)
    kv = random_cache(20, 2, 4, 32, seed=1, dtype=torch.float32)
    q = random_tensor(3, 2, 32, seed=2, dtype=torch.float32) * 1e3
    expected = REFERENCE.paged_attention(spec)(q, kv, batch, math.sqrt(1 / 32))
    torch.testing.assert_close(attend(triton_backend, spec, q, kv, batch), expected, rtol=1e-3, atol=1e-3)


def test_an_empty_step_and_wrong_shapes(triton_backend):
    spec = PagedAttentionSpec(2, 1, 32, None, "bfloat16", "bfloat16", "bfloat16")
    batch = make_batch([Sequence(4, 1)], block_size=4, num_blocks=4)
    kv = random_cache(4, 1, 4, 32, seed=1)
    with pytest.raises(KernelError, match=r"expected contiguous \[T, 2, 32\]"):
        attend(triton_backend, spec, torch.zeros(1, 4, 32), kv, batch)
    with pytest.raises(KernelError, match="KV cache of bfloat16"):
        attend(triton_backend, spec, torch.zeros(1, 2, 32), random_cache(4, 1, 4, 32, 1, torch.float32), batch)
    assert attend(triton_backend, spec, torch.zeros(0, 2, 32), kv, batch).shape == (0, 64)
    with pytest.raises(KernelError, match="do not divide"):
        TritonPagedAttention(dataclasses.replace(spec, num_heads=3, num_kv_heads=2))
