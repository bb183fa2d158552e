"""ModelOpt's NVFP4 layout: packed weight, E4M3 block scales, FP32 weight_scale_2 and input_scale (multipliers).

weight          U8       [N, K/2]    even k in the low nibble
weight_scale    F8_E4M3  [N, K/16]   row-major
weight_scale_2  F32      [] or [1]
input_scale     F32      [] or [1]   absent in W4A16_NVFP4
k_proj.k_scale, v_proj.v_scale       F32 [] of an FP8 KV cache; absent in "cast" exports, which mean 1.0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.errors import InvalidScaleError, TensorShapeError, UnsupportedFormatError
from nvfp4_runtime.nvfp4.codec import BLOCK
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

_HINT = "its weight is packed NVFP4, which is meaningless without its scales: fetch or export the checkpoint again"


def holds(shards: Shards, prefix: str) -> bool:
    """Whether `prefix`'s weight is packed into bytes, as NVFP4 is."""
    info = shards.info(f"{prefix}.weight")
    return info is not None and info.dtype == "U8"


def linear(shards: Shards, prefix: str, n: int, k: int) -> NVFP4Weight:
    """`prefix` as a canonical weight [n, k].

    Raises MissingTensorError, TensorShapeError, InvalidScaleError, and UnsupportedFormatError for relatives of the
    layout (group 32, E8M0 scales, pre_quant_scale) whose arithmetic differs. An input_scale of 0 counts as absent.
    """
    name = f"{prefix}.weight"
    if k % BLOCK:
        file = shards.require(name).file.name
        raise TensorShapeError(name, file, f"input features in multiples of {BLOCK}, as NVFP4 needs", f"{k}")
    _refuse_relatives(shards, prefix, n, k)
    packed = shards.read(name, (n, k // 2), ("U8",))
    block_scale = shards.read(f"{prefix}.weight_scale", (n, k // BLOCK), ("F8_E4M3",), _HINT)
    check_block_scales(block_scale, f"{prefix}.weight_scale", shards)
    scale_2 = _scale(shards, f"{prefix}.weight_scale_2", _HINT)
    input_scale = _scale(shards, f"{prefix}.input_scale") if f"{prefix}.input_scale" in shards else None
    return NVFP4Weight(
        packed=packed,
        block_scale=block_scale,
        weight_scale_2=torch.tensor([scale_2], dtype=torch.float32),
        group_rows=(n,),
        input_scale=input_scale or None,
        bias=shards.read(f"{prefix}.bias", (n,)) if f"{prefix}.bias" in shards else None,
    )


def kv_scales(shards: Shards, attn_prefix: str) -> tuple[float, float] | None:
    """The FP8 KV cache's scales of one attention layer, or None where the files hold none."""
    k_name, v_name = f"{attn_prefix}.k_proj.k_scale", f"{attn_prefix}.v_proj.v_scale"
    if k_name not in shards and v_name not in shards:
        return None
    k_scale = _scale(shards, k_name, "its v_scale is there")
    v_scale = _scale(shards, v_name, "its k_scale is there")
    for name, value in ((k_name, k_scale), (v_name, v_scale)):
        if value == 0:
            raise InvalidScaleError(name, shards.require(name).file.name, "0")
    return k_scale, v_scale


def check_block_scales(scale: Tensor, name: str, shards: Shards) -> None:
    """Raise InvalidScaleError when E4M3 bytes hold NaN (0x7F, 0xFF) or a negative value."""
    raw = scale.view(torch.uint8)
    if raw.numel() == 0:
        return
    if int((raw & 0x7F).max()) == 0x7F:
        count = int(((raw & 0x7F) == 0x7F).sum())
        raise InvalidScaleError(name, shards.require(name).file.name, f"NaN in {count} of {raw.numel()} blocks")
    if int(raw.max()) > 0x80:  # 0x80 is -0, which scales to zero like +0
        count = int((raw > 0x80).sum())
        raise InvalidScaleError(name, shards.require(name).file.name, f"{count} negative values of {raw.numel()}")


def _scale(shards: Shards, name: str, hint: str = "") -> float:
    value = shards.read_scalar(name, hint)
    if not math.isfinite(value) or value < 0:
        raise InvalidScaleError(name, shards.require(name).file.name, f"{value}")
    return value


def _refuse_relatives(shards: Shards, prefix: str, n: int, k: int) -> None:
    if f"{prefix}.pre_quant_scale" in shards:
        raise UnsupportedFormatError(
            f"{prefix} has a pre_quant_scale (NVFP4_AWQ): its input must be scaled before quantisation, which this "
            "build does not do"
        )
    scale = shards.info(f"{prefix}.weight_scale")
    if scale is None:
        return
    if scale.dtype == "U8":
        raise UnsupportedFormatError(f"{prefix}.weight_scale is {scale}: E8M0 scales (MXFP4) are not read here")
    if scale.shape == (n, k // 32) and k % 32 == 0:
        raise UnsupportedFormatError(
            f"{prefix}.weight_scale is {scale}: one scale per 32 values (W4A8_NVFP4_FP8) is not read here"
        )
