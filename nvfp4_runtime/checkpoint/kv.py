"""Scales of a quantised KV cache, under all the names that exporters have given them over the years."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.errors import InvalidScaleError, UnsupportedFormatError

# Under the attention module's path; the first pair (K, V) that has a tensor wins.
NAMES = (
    ("k_proj.k_scale", "v_proj.v_scale"),  # ModelOpt
    ("k_scale", "v_scale"),  # compressed-tensors
    ("attn.k_scale", "attn.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),  # renamed by tools that fuse first
    ("qkqkv_proj.k_scale", "qkqkv_proj.v_scale"),  # and by one that fused twice
    ("k_proj.output_scale", "v_proj.output_scale"),  # early compressed-tensors
)
# One scale for both.
SHARED = ("kv_scale", "attn.kv_scale", "qkv_proj.kv_scale", "k_proj.kv_scale")
AFFINE = ("k_proj.k_bias", "v_proj.v_bias", "k_bias", "v_bias", "k_zero_point", "v_zero_point")


class KVScales(NamedTuple):
    """What one attention layer's files hold; `note` says what was odd, in words that follow "N layer(s) "."""

    k: float
    v: float
    note: str = ""


def kv_scales(shards: Shards, attn_prefix: str) -> KVScales | None:
    """The layer's scales, or None where the files hold none.

    A single scale serves both: kv_scale by its meaning, a lone k_scale or v_scale because writers of files with one
    (no v_proj, or one lost on the way) expect it. Raises InvalidScaleError for zero, negative and non-finite values,
    UnsupportedFormatError for scales per head and for affine caches.
    """
    for leaf in AFFINE:
        if (info := shards.info(f"{attn_prefix}.{leaf}")) is not None:
            raise UnsupportedFormatError(
                f"{info.name} in {info.file.name} is {info}: an affine KV cache is not read here; export the model "
                "with an FP8 or NVFP4 cache, or with none"
            )
    for pair in NAMES:
        found = [f"{attn_prefix}.{leaf}" for leaf in pair if f"{attn_prefix}.{leaf}" in shards]
        if len(found) == 2:
            return KVScales(_scale(shards, found[0]), _scale(shards, found[1]))
        if found:
            value = _scale(shards, found[0])
            leaf = found[0].rpartition(".")[2]
            return KVScales(value, value, f"have a {leaf} without its fellow: it serves keys and values")
    for leaf in SHARED:
        if (name := f"{attn_prefix}.{leaf}") in shards:
            value = _scale(shards, name)
            return KVScales(value, value)
    return None


def _scale(shards: Shards, name: str) -> float:
    info = shards.require(name)
    if math.prod(info.shape) != 1:
        raise UnsupportedFormatError(
            f"{name} in {info.file.name} is {info}: KV scales per head are not read here, one per tensor is; calibrate "
            "the cache with the strategy 'tensor'"
        )
    value = float(shards.read(name).to(torch.float32).reshape(()))
    if not math.isfinite(value) or value <= 0:
        raise InvalidScaleError(name, info.file.name, f"{value}")
    return value
