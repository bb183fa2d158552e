"""Counting sixteen codes at a time agrees with counting them one by one."""

from __future__ import annotations

import math

import pytest
import torch

from nvfp4_runtime.checkpoint.doctor import statistics
from nvfp4_runtime.checkpoint.doctor.statistics import count_codes, count_e4m3, count_plain, order_of_scales, raw_bytes
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import swizzle_scales


def test_a_histogram_of_every_scale_byte():
    counts = count_e4m3(raw_bytes(torch.arange(256, dtype=torch.int32).to(torch.uint8)))
    assert (counts.total, counts.nan, counts.zero, counts.at_max) == (256, 2, 2, 1)
    assert counts.negative == 126  # 0x81 to 0xFE: -0 scales like zero, 0xFF is NaN
    assert (counts.least, counts.most) == (2.0**-9, 448.0)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_codes_are_counted_as_one_by_one(monkeypatch, group, chunk):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (96, group), generator=generator, dtype=torch.uint8)
    codes[::5] &= 8  # blocks of zeros, some of them negative
    codes[1::5] &= 0xD
    codes[2::7] |= 7
    scales = torch.randint(0, 256, (96,), generator=generator, dtype=torch.uint8)
    scales[::3] = 0x7E
    scales[1::6] = 0
    told = []
    packed = raw_bytes(codec.pack_codes(codes))
    counts = count_codes(packed, raw_bytes(scales), group, told.append)
    sixes, nonzero = (codes & 7 == 7).sum(dim=1), (codes & 7 != 0).any(dim=1)
    assert counts.blocks == 96
    assert counts.zero_blocks == int((~nonzero).sum())
    assert counts.full_blocks == int((sixes > 0).sum())
    assert counts.lost_blocks == int((nonzero & (scales & 0x7F == 0)).sum()) > 0
    assert counts.top_blocks == int((scales == 0x7E).sum()) > 0
    assert counts.clipped_blocks == int(((scales == 0x7E) & (sixes >= 3)).sum()) > 0
    assert sum(told) == packed.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_values_are_counted_by_their_bits(dtype):
    x = torch.tensor([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 6e-8, -3.0], dtype=dtype)
    counts = count_plain(x)
    assert (counts.total, counts.nonfinite, counts.zero) == (8, 3, 2)


def test_bytes_at_odd_offsets_are_counted_as_well():
    codes = torch.randint(0, 256, (1 + 8 * 64,), dtype=torch.uint8)
    scales = torch.randint(1, 120, (64,), dtype=torch.uint8)
    shifted = count_codes(raw_bytes(codes[1:]), raw_bytes(scales), 16)
    assert shifted == count_codes(raw_bytes(codes[1:].clone()), raw_bytes(scales), 16)


def test_the_order_of_scales_shows_where_rows_and_columns_have_sizes_of_their_own():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(256, 1, generator=generator) + 0.5, torch.rand(1, 32, generator=generator) + 0.5
    noise = 1 + 0.3 * torch.rand(256, 32, generator=generator)
    scales = (100 * rows * columns * noise).to(torch.float8_e4m3fn)
    straight = order_of_scales(scales)
    assert straight.as_stored > 0.8
    assert straight.as_tiles < 0.3
    tiled = order_of_scales(swizzle_scales(scales).reshape(256, 32))
    assert (tiled.as_stored, tiled.as_tiles) == pytest.approx((tiled.as_stored, straight.as_stored))
    assert tiled.as_stored < 0.3
    featureless = order_of_scales((100 * noise).to(torch.float8_e4m3fn))
    assert abs(featureless.as_stored) < 0.03
    assert abs(featureless.as_tiles) < 0.03
    assert order_of_scales(scales[:100]) is None  # would change its shape if it were swizzled
