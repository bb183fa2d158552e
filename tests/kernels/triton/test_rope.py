"""Rotary embedding and the cache's write, against the reference: the cache's bits, and the queries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import RopeSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from tests.kernels.conftest import cached_values, random_cache, random_tensor, same_bits

REFERENCE = ReferenceBackend()
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}
BLOCK_SIZE, NUM_BLOCKS, EPS = 4, 6, 1e-6


def cache_of(kv_dtype: str, heads: int, dim: int) -> KVLayer:
    return random_cache(NUM_BLOCKS, heads, BLOCK_SIZE, dim, seed=5, dtype=STORED[kv_dtype])


def copied(kv: KVLayer, device: torch.device) -> KVLayer:
    tensors = {f: getattr(kv, f) for f in ("k", "v", "k_blocks", "v_blocks")}
    return dataclasses.replace(kv, **{f: None if t is None else t.clone().to(device) for f, t in tensors.items()})


def run(backend, spec: RopeSpec, kv: KVLayer, scale: float = 1.0, tokens: int = 3) -> tuple[Tensor, KVLayer]:
    device = getattr(backend, "device", torch.device("cpu"))
    dtype = getattr(torch, spec.dtype)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = random_tensor(tokens, width, seed=1, dtype=dtype) * scale
    angles = random_tensor(32, spec.rotary_dim // 2, seed=2, dtype=torch.float32)
    norms = [random_tensor(spec.head_dim, seed=s) if spec.qk_norm else None for s in (3, 4)]
    positions, slots = torch.tensor([0, 31, 7])[:tokens], torch.tensor([23, 4, 11])[:tokens]
    kv = copied(kv, device)
    arguments = [qkv, positions, angles.cos(), angles.sin(), *norms]
    moved = [None if t is None else t.to(device) for t in arguments]
    q = backend.rope_and_cache(spec)(*moved, EPS, kv, slots.to(device))
    return q.cpu(), copied(kv, torch.device("cpu"))


def tensors(kv: KVLayer) -> list[Tensor]:
    return [t for t in (kv.k, kv.v, kv.k_blocks, kv.v_blocks) if t is not None]


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 4, 64, 64), (6, 2, 96, 96), (3, 1, 80, 32)])
def test_the_cache_has_the_reference_s_bits(triton_backend, kv_dtype, heads, kv_heads, dim, rotary):
    """Values up to 60 with scales of 1/8 and 1/16: some FP8 values saturate."""
    spec = RopeSpec(heads, kv_heads, dim, rotary, False, kv_dtype, "bfloat16")
    kv = cache_of(kv_dtype, kv_heads, dim)
    expected_q, expected = run(REFERENCE, spec, kv, scale=15)
    q, found = run(triton_backend, spec, kv, scale=15)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert same_bits(a, b)
    assert same_bits(q, expected_q)


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_qk_norm_values_agree_to_their_type_s_last_place(triton_backend, kv_dtype, dtype):
    spec = RopeSpec(4, 2, 64, 64, True, kv_dtype, dtype)
    kv = cache_of(kv_dtype, 2, 64)
    expected_q, expected = run(REFERENCE, spec, kv)
    q, found = run(triton_backend, spec, kv)
    assert same_bits(found.v, expected.v), "values are stored as they come"
    # a sum in another order moves a float32 by some 1e-6; at a rounding border that is one step of the stored type
    step = {"bfloat16": 2**-7, "float32": 2e-6, "fp8": 2**-3, "nvfp4": 0.5}[kv_dtype]
    for a, b in zip(cached_values(found), cached_values(expected), strict=True):
        close = torch.isclose(a, b, rtol=step, atol=0.13 if kv_dtype == "nvfp4" else 1e-5)
        assert close.all()
        assert (a == b).double().mean() > (0 if kv_dtype == "float32" else 0.99)
    torch.testing.assert_close(q, expected_q, rtol=2**-7 if dtype == "bfloat16" else 2e-6, atol=1e-5)


def test_hostile_values_are_stored_as_the_format_says(triton_backend):
    """NaN, infinities, -0, the smallest and largest floats into FP8 and NVFP4; they rotate by no angle."""
    values = [torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, -1e-30, 3e38, 448.0, 464.0, 2.0**-10]
    hostile = torch.tensor(values * 10)[:64]
    for kv_dtype in ("bfloat16", "fp8", "nvfp4"):
        spec = RopeSpec(1, 1, 64, 0, False, kv_dtype, "float32")
        results = []
        for backend in (REFERENCE, triton_backend):
            device = getattr(backend, "device", torch.device("cpu"))
            kv = copied(dataclasses.replace(cache_of(kv_dtype, 1, 64), k_scale=1.0, v_scale=1.0), device)
            tables = torch.zeros(4, 0).to(device)
            slot = torch.tensor([5]).to(device)
            qkv = hostile.repeat(3).unsqueeze(0).to(device)
            backend.rope_and_cache(spec)(qkv, slot * 0, tables, tables, None, None, EPS, kv, slot)
            results.append(kv)
        if kv_dtype == "nvfp4":
            reference, found = results
            assert same_bits(found.v_blocks.cpu(), reference.v_blocks)
            finite = ~reference.v_blocks.float().isnan().repeat_interleave(8, dim=-1)
            assert torch.equal(found.v.cpu()[finite], reference.v[finite])
        else:
            for a, b in zip(tensors(results[1]), tensors(results[0]), strict=True):
                a, b = a.cpu().float(), b.float()
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def test_tensors_of_another_shape_or_type_are_refused(triton_backend: TritonBackend):
    spec = RopeSpec(2, 1, 32, 32, False, "fp8", "bfloat16")
    with pytest.raises(KernelError, match=r"expected a contiguous torch.float8_e4m3fn"):
        run(triton_backend, spec, cache_of("bfloat16", 1, 32))
    bare = dataclasses.replace(cache_of("nvfp4", 1, 32), k_blocks=None)
    with pytest.raises(KernelError, match="block scales"):
        run(triton_backend, dataclasses.replace(spec, kv_dtype="nvfp4"), bare)
    kernel, kv = triton_backend.rope_and_cache(dataclasses.replace(spec, qk_norm=True)), cache_of("fp8", 1, 32)
    one = torch.zeros(1)
    with pytest.raises(KernelError, match="qk_norm=True"):
        kernel(torch.zeros(1, 128), one, torch.zeros(1, 16), torch.zeros(1, 16), None, None, EPS, kv, one)
