"""The raw tensors of one matrix, read and checked: what every dialect's reader starts from.

A single module gives one `Parts`; a stack of experts gives one for each expert, turned to [N, K].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import PLAIN, Shards
from nvfp4_runtime.checkpoint.stored import Role, StoredLayer
from nvfp4_runtime.errors import InvalidScaleError, TensorShapeError, UnsupportedFormatError

_WEIGHT_DTYPES = {"nvfp4": ("U8",), "mxfp4": ("U8",), "fp8": ("F8_E4M3",)}
_SCALE_DTYPES = {"nvfp4": ("F8_E4M3",), "mxfp4": ("U8", "F8_E8M0"), "fp8": PLAIN}


@dataclass(frozen=True)
class Parts:
    """One matrix as stored, before a dialect's reader makes it canonical.

    weight           [N, K] plain or FP8, [N, K/2] packed
    scale            block scales [N, K/16] (NVFP4), [N, K/32] (MXFP4, W4A8); FP8's scales as float32; None for plain
    tensor_scale     fp32 [G], one per row group of equal size, positive and finite where the dialect divides by it
    input_scale      as stored, or None; may be 0 or not finite: the reader decides
    pre_quant_scale  fp32 [K] or None
    """

    layer: StoredLayer
    weight: Tensor
    scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    input_scale: float | None = None
    pre_quant_scale: Tensor | None = None
    bias: Tensor | None = None


def read_one(shards: Shards, layer: StoredLayer) -> Parts:
    """The tensors of a single matrix. Raises TensorShapeError and InvalidScaleError."""
    assert layer.experts == 0
    scale = _scale(shards, layer)
    tensor_scale = _tensor_scale(shards, layer)
    if tensor_scale is not None and tensor_scale.numel() != 1:
        raise _not_one(shards, layer, "tensor_scale")
    input_scale = _floats(shards, layer, "input_scale", check=False)
    if input_scale is not None and input_scale.numel() != 1:
        raise _not_one(shards, layer, "input_scale")
    pre_quant_scale = _floats(shards, layer, "pre_quant_scale")
    if pre_quant_scale is not None and tuple(pre_quant_scale.shape) != (layer.k,):
        info = shards.require(layer.tensors["pre_quant_scale"])
        raise TensorShapeError(info.name, info.file.name, f"BF16 or F32 {[layer.k]}", str(info))
    return Parts(
        layer,
        _read(shards, layer, "weight", _WEIGHT_DTYPES.get(layer.format, PLAIN)),
        scale,
        None if tensor_scale is None else tensor_scale.reshape(1),
        None if input_scale is None else float(input_scale),
        pre_quant_scale,
        shards.read(layer.tensors["bias"], (layer.n,)) if "bias" in layer.tensors else None,
    )


def read_stack(shards: Shards, layer: StoredLayer) -> Iterator[Parts]:
    """The tensors of each expert in turn, [N, K], from a stack. Raises as `read_one` does."""
    count, n = layer.experts, layer.n
    weight = _read(shards, layer, "weight", _WEIGHT_DTYPES.get(layer.format, PLAIN))
    scale = _scale(shards, layer)
    if layer.dialect == "gpt-oss":
        weight = weight.flatten(2)  # [E, N, K/32, 16] -> [E, N, K/2]
    if "pre_quant_scale" in layer.tensors:
        raise UnsupportedFormatError(
            f"{layer.tensors['pre_quant_scale']}: a stack of experts with a pre_quant_scale has no reader here"
        )
    tensor_scale = _per_expert(shards, layer, "tensor_scale", _tensor_scale(shards, layer))
    input_scale = _per_expert(shards, layer, "input_scale", _floats(shards, layer, "input_scale", check=False))
    bias = shards.read(layer.tensors["bias"], (count, n)) if "bias" in layer.tensors else None
    if scale is not None and scale.numel() == 1:  # FP8 under one scale for all experts
        scale = scale.reshape(1).expand(count)
    turn = _turned if layer.transposed else _as_it_is
    for e in range(count):
        yield Parts(
            layer,
            turn(weight[e]),
            None if scale is None else turn(scale[e]),
            None if tensor_scale is None else tensor_scale[e],
            None if input_scale is None else _widest(input_scale[e], layer.divides),
            None,
            None if bias is None else bias[e],
        )


def check_block_scales(scale: Tensor, name: str, shards: Shards) -> None:
    """Raise InvalidScaleError when E4M3 bytes hold NaN (0x7F, 0xFF) or a negative value."""
    raw = scale.view(torch.uint8)
    # numpy, not torch: hundreds of short calls that must not wait for OpenMP's threads where others use the cores
    if raw.numel() == 0 or int(raw.numpy(force=True).max()) < 0x7F:
        return
    if int((raw & 0x7F).max()) == 0x7F:
        count = int(((raw & 0x7F) == 0x7F).sum())
        raise InvalidScaleError(name, shards.require(name).file.name, f"NaN in {count} of {raw.numel()} blocks")
    if int(raw.max()) > 0x80:  # 0x80 is -0, which scales to zero like +0
        count = int((raw > 0x80).sum())
        raise InvalidScaleError(name, shards.require(name).file.name, f"{count} negative values of {raw.numel()}")


def _read(shards: Shards, layer: StoredLayer, role: Role, dtypes: tuple[str, ...]) -> Tensor:
    return shards.read(layer.tensors[role], None, dtypes)


def _scale(shards: Shards, layer: StoredLayer) -> Tensor | None:
    """Block scales as bytes of their type, squeezed to [N, K/16] (stacks: [E, ...]); FP8's as float32."""
    role: Role = "scale" if layer.format == "fp8" else "block_scale"
    if role not in layer.tensors:
        return None
    name = layer.tensors[role]
    scale = _read(shards, layer, role, _SCALE_DTYPES[layer.format])
    if layer.format == "nvfp4":
        check_block_scales(scale, name, shards)
    elif layer.format == "mxfp4":
        scale = scale.view(torch.uint8)
        if scale.numel() and int(scale.max()) == 255:
            count = int((scale == 255).sum())
            found = f"255, which is NaN in E8M0, in {count} of {scale.numel()} blocks"
            raise InvalidScaleError(name, shards.require(name).file.name, found)
    else:
        scale = scale.to(torch.float32)
        _check_finite(shards, name, scale)
        if layer.experts:
            return scale
    return scale[0] if layer.experts == 0 and scale.dim() == 3 and scale.shape[0] == 1 else scale


def _floats(shards: Shards, layer: StoredLayer, role: Role, check: bool = True) -> Tensor | None:
    if role not in layer.tensors:
        return None
    name = layer.tensors[role]
    values = shards.read(name).to(torch.float32)
    if check:
        _check_finite(shards, name, values)
    return values


def _check_finite(shards: Shards, name: str, values: Tensor) -> None:
    bad = ~torch.isfinite(values) | (values < 0)
    if bool(bad.any()):
        raise InvalidScaleError(name, shards.require(name).file.name, f"{float(values[bad][0])}")


def _tensor_scale(shards: Shards, layer: StoredLayer) -> Tensor | None:
    values = _floats(shards, layer, "tensor_scale")
    if values is not None and layer.divides and not bool(torch.isfinite(torch.reciprocal(values)).all()):
        name = layer.tensors["tensor_scale"]
        raise InvalidScaleError(name, shards.require(name).file.name, f"{float(values.min())}, and it is a divisor")
    return values


def _per_expert(shards: Shards, layer: StoredLayer, role: Role, values: Tensor | None) -> Tensor | None:
    """A scale of a stack as [E, G]: one value for all, one for each expert, or one for each of its halves."""
    if values is None:
        return None
    count, size = layer.experts, values.numel()
    if size == 1:
        return values.reshape(1, 1).expand(count, 1)
    if values.shape[0] == count and (size == count or (size == 2 * count and layer.n % 2 == 0)):
        return values.reshape(count, size // count)
    info = shards.require(layer.tensors[role])
    raise TensorShapeError(info.name, info.file.name, f"F32 [], {[count]} or {[count, 2]}", str(info))


def _widest(values: Tensor, divides: bool) -> float:
    """The usable scale of the widest range, since one activation enters all parts; where none is usable, the first."""
    usable_ones = values[torch.isfinite(values) & (values > 0)]
    if not usable_ones.numel():
        return float(values[0])
    return float(usable_ones.min() if divides else usable_ones.max())


def _turned(matrix: Tensor) -> Tensor:
    if matrix.dim() != 2:
        return matrix
    if matrix.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):  # bytes are bytes
        return matrix.view(torch.uint8).t().contiguous().view(matrix.dtype)
    return matrix.t().contiguous()


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


def _not_one(shards: Shards, layer: StoredLayer, role: Role) -> TensorShapeError:
    info = shards.require(layer.tensors[role])
    return TensorShapeError(info.name, info.file.name, "one value, [] or [1]", str(info))


def usable(value: float | None) -> bool:
    """Whether a scale can be multiplied and divided by."""
    return value is not None and math.isfinite(value) and value > 0
