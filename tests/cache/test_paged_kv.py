"""Caches as tensors: their types, shapes and sizes."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block
from nvfp4_runtime.cache.specs import AttentionSpec

SPECS = [AttentionSpec(2, 64, k_scale=0.5, v_scale=0.25, has_scales=True), AttentionSpec(4, 32)]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "fp8", "nvfp4"])
def test_a_block_takes_the_bytes_that_are_allocated_for_it(kv_dtype: str) -> None:
    layers = allocate(SPECS, kv_dtype, 3, 16, torch.device("cpu"))
    tensors = [t for kv in layers for t in (kv.k, kv.v, kv.k_blocks, kv.v_blocks) if t is not None]
    assert sum(t.nbytes for t in tensors) == 3 * bytes_per_block(SPECS, kv_dtype, 16)
    assert not any(bool(t.view(torch.uint8).any()) for t in tensors)


def test_an_nvfp4_cache_has_packed_codes_and_a_scale_per_16_dimensions() -> None:
    kv = allocate(SPECS, "nvfp4", 3, 8, torch.device("cpu"))[0]
    assert (kv.k.dtype, tuple(kv.k.shape)) == (torch.uint8, (3, 2, 8, 32))
    assert kv.v_blocks is not None
    assert (kv.v_blocks.dtype, tuple(kv.v_blocks.shape)) == (torch.float8_e4m3fn, (3, 2, 8, 4))
    assert (kv.k_scale, kv.v_scale) == (0.5, 0.25)
    assert kv.block_size == 8
    assert SPECS[0].bytes_per_token("nvfp4") * 16 == SPECS[0].bytes_per_token("fp8") * 9  # 4.5 bits against 8


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32"])
def test_plain_caches_have_neither_scales_nor_block_scales(kv_dtype: str) -> None:
    kv = allocate(SPECS, kv_dtype, 3, 8, torch.device("cpu"))[0]
    assert (kv.k_scale, kv.v_scale, kv.k_blocks, kv.v_blocks) == (1.0, 1.0, None, None)
