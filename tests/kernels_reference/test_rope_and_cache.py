"""QK-norm, rotation and the cache write, against loops over tokens and heads in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.config import Dtype, KVDtype
from nvfp4_runtime.kernels.ops import RopeSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.nvfp4 import codec

BACKEND = ReferenceBackend()
KV_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}
RTOL = {"bfloat16": 2.0**-8, "float32": 2.0**-20, "fp8": 2.0**-4}  # one rounding: 8, 24, 4 significant bits


def turned(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    if norm is not None:
        x = norm.double() * x / math.sqrt(float(x.square().mean()) + eps)
    out, half = x.clone(), cos.shape[0]
    for i in range(half):
        a, b, c, s = float(x[i]), float(x[i + half]), float(cos[i]), float(sin[i])
        out[i], out[i + half] = a * c - b * s, b * c + a * s
    return out


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_queries_turn_and_keys_and_values_land_in_their_slots(
    kv_dtype: KVDtype, dtype: Dtype, qk_norm: bool, rotary_dim: int
) -> None:
    tokens, heads, kv_heads, dim, block = 7, 4, 2, 16, 4
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=g).to(getattr(torch, dtype))
    angles = torch.rand(50, rotary_dim // 2, generator=g) * 6
    cos, sin = angles.cos() * 1.1, angles.sin() * 1.1
    positions = torch.tensor([3, 4, 5, 0, 49, 7, 8])
    slots = torch.tensor([9, 4, 31, 5, 16, 22, 11])
    q_norm, k_norm = (torch.randn(dim, generator=g), torch.randn(dim, generator=g)) if qk_norm else (None, None)
    scales = (0.02, 0.05) if kv_dtype == "fp8" else (1.0, 1.0)
    k, v = (torch.full((8, kv_heads, block, dim), 0.5).to(KV_TYPES[kv_dtype]) for _ in "kv")
    kv = KVLayer(k, v, *scales)
    spec = RopeSpec(heads, kv_heads, dim, rotary_dim, qk_norm, kv_dtype, dtype)
    q = BACKEND.rope_and_cache(spec)(qkv, positions, cos, sin, q_norm, k_norm, 1e-6, kv, slots)
    assert q.shape == (tokens, heads, dim)
    assert q.dtype == qkv.dtype
    by_head = qkv.view(tokens, heads + 2 * kv_heads, dim)
    touched = torch.zeros(8, block, dtype=torch.bool)
    # absolute part: FP8's subnormal step is 2^-9 times the scale; FP32 cancellation in a*c - b*s otherwise
    atol = 2.0**-9 * 0.05 if kv_dtype == "fp8" else 1e-6
    for t in range(tokens):
        p, where, at = int(positions[t]), int(slots[t]) // block, int(slots[t]) % block
        touched[where, at] = True
        for h in range(heads):
            want = turned(by_head[t, h], cos[p], sin[p], q_norm, 1e-6)
            torch.testing.assert_close(q[t, h].double(), want, rtol=RTOL[dtype], atol=1e-6)
        for h in range(kv_heads):
            key = turned(by_head[t, heads + h], cos[p], sin[p], k_norm, 1e-6)
            value = by_head[t, heads + kv_heads + h].double()
            stored_k = kv.k[where, h, at].float().double() * scales[0]
            stored_v = kv.v[where, h, at].float().double() * scales[1]
            torch.testing.assert_close(stored_k, key, rtol=RTOL[kv_dtype], atol=atol)
            torch.testing.assert_close(stored_v, value, rtol=RTOL[kv_dtype], atol=atol)
    untouched = kv.k.float().permute(0, 2, 1, 3)[~touched]
    assert bool((untouched == 0.5).all())


def test_fp8_saturates_and_keeps_nan() -> None:
    qkv = torch.tensor([[0.0, 0.0, 1e6, -1e6, float("nan"), 1.0]])
    k, v = (torch.zeros(2, 1, 1, 2).to(torch.float8_e4m3fn) for _ in "kv")
    kv = KVLayer(k, v, k_scale=0.5, v_scale=2.0)
    one, zero = torch.ones(4, 1), torch.zeros(4, 1)
    spec = RopeSpec(1, 1, 2, 2, False, "fp8", "float32")
    BACKEND.rope_and_cache(spec)(qkv, torch.tensor([0]), one, zero, None, None, 0.0, kv, torch.tensor([1]))
    assert kv.k[1].float().flatten().tolist() == [448.0, -448.0]
    value = kv.v[1].float().flatten()
    assert bool(value[0].isnan())
    assert value[1] == 0.5


def test_fp8_stores_the_nearest_of_every_representable_value() -> None:
    """All 126 magnitudes and both signs survive a round trip through the scale."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    scale = 0.0371
    qkv = torch.zeros(len(codes), 3, 2)
    qkv[:, 1, 0] = codes * torch.tensor(scale)
    k, v = (torch.zeros(len(codes), 1, 1, 2).to(torch.float8_e4m3fn) for _ in "kv")
    kv = KVLayer(k, v, k_scale=scale)
    positions = torch.zeros(len(codes), dtype=torch.int64)
    spec = RopeSpec(1, 1, 2, 2, False, "fp8", "float32")
    rope = BACKEND.rope_and_cache(spec)
    slots = torch.arange(len(codes))
    rope(qkv.view(-1, 6), positions, torch.ones(1, 1), torch.zeros(1, 1), None, None, 0.0, kv, slots)
    assert torch.equal(kv.k[:, 0, 0, 0].float(), codes)


def test_nvfp4_stores_the_codecs_codes_and_block_scales() -> None:
    """Keys after the rotation, values as they came; a read gives code * block scale * k_scale."""
    tokens, dim, block = 5, 32, 4
    qkv = torch.randn(tokens, 3 * dim, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(9, dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    slots = torch.tensor([9, 4, 11, 5, 0])
    kv = KVLayer(
        *(torch.zeros(3, 1, block, dim // 2, dtype=torch.uint8) for _ in "kv"),
        0.5,
        0.25,
        *(torch.zeros(3, 1, block, dim // 16).to(torch.float8_e4m3fn) for _ in "kv"),
    )
    spec = RopeSpec(1, 1, dim, dim, False, "nvfp4", "float32")
    positions = torch.tensor([0, 8, 3, 1, 2])
    BACKEND.rope_and_cache(spec)(qkv, positions, angles.cos(), angles.sin(), None, None, 1e-6, kv, slots)
    key = torch.stack(
        [turned(qkv[t, dim : 2 * dim], angles[p].cos(), angles[p].sin(), None, 0) for t, p in enumerate(positions)]
    )
    for values, cache, blocks, scale in (
        (key.float(), kv.k, kv.k_blocks, 0.5),
        (qkv[:, 2 * dim :], kv.v, kv.v_blocks, 0.25),
    ):
        assert blocks is not None
        at = (slots // block, 0, slots % block)
        stored = codec.dequantize(cache[at], blocks[at], torch.tensor(scale))
        # a block scale is off by at most half a step of E4M3 (2^-4), a code by half the widest step of E2M1 (1 of 6)
        amax = values.view(tokens, -1, 16).abs().amax(-1, keepdim=True).expand(-1, -1, 16).reshape(tokens, dim)
        assert bool(((stored - values).abs() <= (1 / 6 + 2.0**-4) * amax).all())
    codes, block_scale = codec.quantize_activation(qkv[:, 2 * dim :], torch.tensor(0.25))
    assert kv.v_blocks is not None
    assert torch.equal(kv.v[slots // block, 0, slots % block], codec.pack_codes(codes))
    assert torch.equal(kv.v_blocks[slots // block, 0, slots % block].float(), block_scale.float())
