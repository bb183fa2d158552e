"""Layers whose stored weights are lost, quantised anew by `max` from a parent that is proven to be this model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.case import Case, expert_group
from nvfp4_runtime.checkpoint.doctor.checks import layout, scales
from nvfp4_runtime.checkpoint.doctor.decode import CHUNK_VALUES, read_any
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.parent import POOR_DB, parent_matrix
from nvfp4_runtime.checkpoint.doctor.report import Change
from nvfp4_runtime.checkpoint.doctor.treatment import Tensors, Treatment
from nvfp4_runtime.checkpoint.shards import PLAIN, Shards
from nvfp4_runtime.checkpoint.writer import TensorSpec
from nvfp4_runtime.nvfp4 import codec

_BF16_SLACK = 2.0**-7  # compressed-tensors computes its global scale in bfloat16
_REORDERED = ("nibbles", "swizzled", "inverted")


def why_untrusted(case: Case, parent: Shards) -> str | None:
    """Why weights of `parent` may not take the place of lost ones, or None: it must be this model, and unchanged.

    AWQ and distillation change norms and neighbours together with a weight, and a weight of the parent alone would be
    part of another function. So every vector must be the parent's, and every sound quantised layer must fit it.
    """
    if any(word in (case.quant.algo or "") for word in ("AWQ", "SVD")):
        return f"{case.quant.algo} folds factors into the neighbours of a weight"
    fitting = vectors = 0
    for layer in case.layers:
        comparison = layer.comparison
        if comparison is not None and comparison.misread not in _REORDERED and lost(case, layer) is None:
            if not comparison.sqnr_db >= POOR_DB:
                return f"{layer.name} is {comparison.sqnr_db:.1f} dB from the parent's"
            fitting += 1
        ours = case.shards.info(layer.stored.tensors.get("weight", ""))
        theirs = parent.info(ours.name) if ours is not None else None
        if ours is None or theirs is None or len(ours.shape) != 1 or {ours.dtype, theirs.dtype} - set(PLAIN):
            continue
        vector = read_any(case.shards, ours.name)
        if not torch.equal(vector, read_any(parent, ours.name).to(vector.dtype)):
            return f"{ours.name} is not the parent's"
        vectors += 1
    return None if fitting or vectors else "no sound layer is left to recognise it by"


def requantise(case: Case, layer: Measured, parent: Shards | None) -> Treatment | None:
    """Quantise a layer anew by `max` from its parent, because what is stored has lost the weights."""
    why = lost(case, layer)
    if why is None or parent is None or layer.stored.experts or "pre_quant_scale" in layer.stored.tensors:
        return None
    names = _names(case, layer)
    if names is None:
        return None
    codes, block_scale, tensor_scale = names
    info = case.shards.require(codes)
    n, k = (info.shape[0], 2 * info.shape[1]) if len(info.shape) == 2 else (0, 0)
    original = _parent_of(parent, layer, n, k)
    if original is None or k % codec.BLOCK or not k:
        return None
    divides = codes.endswith("_packed")
    amax = _amax(original)
    if not math.isfinite(amax) or amax == 0:
        return None
    value = _shared_scale(case, layer, amax, divides, parent)
    old = case.shards.info(tensor_scale)
    shape = old.shape if old is not None and old.shape in ((), (1,)) else ((1,) if divides else ())
    specs = (
        TensorSpec(codes, "U8", (n, k // 2)),
        TensorSpec(block_scale, "F8_E4M3", (n, k // codec.BLOCK)),
        TensorSpec(tensor_scale, "F32", shape),
    )

    def make() -> Tensors:
        stored = torch.tensor(value, dtype=torch.float32)
        multiplier = 1 / stored if divides else stored
        packed, block = codec.quantize(original, multiplier)
        return {codes: packed, block_scale: block, tensor_scale: stored.reshape(shape)}

    change = Change(why, layer.name, f"quantised again from the parent by `max`, tensor scale {value:.6g}", False)
    return Treatment(specs, make, (change,))


def lost(case: Case, layer: Measured) -> str | None:
    """The finding by which a layer's stored weights are gone, or None."""
    if layout.padded_scale(case.shards, layer.stored) is not None:
        return None
    if layer.stored.problem is not None:
        return "expert-uninitialised" if expert_group(layer.name) is not None else "layer-unreadable"
    if layer.stored.format != "nvfp4" or layer.stored.block != (1, codec.BLOCK):
        return None
    if layer.blocks is not None and layer.blocks.nan:
        return "block-scale-nan"
    if layer.blocks is not None and layer.blocks.negative:
        return "block-scale-negative"
    if scales.is_tensor_scale_invalid(layer):
        return "tensor-scale-invalid"
    if scales.lost_share(layer) > scales.LOST_SHARE:
        return "block-scale-zero"
    group = case.experts.get(expert_group(layer.name) or ("", ""), [])
    if layer.all_zero and any(not other.all_zero for other in group):
        return "expert-uninitialised"
    return None


def _names(case: Case, layer: Measured) -> tuple[str, str, str] | None:
    """Names of codes, block scales and tensor scale, as the layer's dialect spells them; None for other layouts."""
    name = layer.name
    for leaf, tensor_scale in (("weight_packed", "weight_global_scale"), ("weight", "weight_scale_2")):
        info = case.shards.info(f"{name}.{leaf}")
        if info is not None and info.dtype == "U8":
            return info.name, f"{name}.weight_scale", f"{name}.{tensor_scale}"
    return None


def _parent_of(parent: Shards, layer: Measured, n: int, k: int) -> Tensor | None:
    info = parent.info(f"{layer.name}.weight")
    if info is None or info.shape != (n, k) or info.dtype not in ("BF16", "F16", "F32"):
        return None
    return parent.read(info.name)


def _amax(weight: Tensor) -> float:
    step = max(1, CHUNK_VALUES // max(1, weight.shape[1]))
    starts = range(0, weight.shape[0], step)
    return max((float(weight[i : i + step].to(torch.float32).abs().max()) for i in starts), default=0.0)


def _shared_scale(case: Case, layer: Measured, amax: float, divides: bool, parent: Shards) -> float:
    """The tensor scale to store: that of the siblings where it is large enough, else from the group's own maximum."""
    group = next((g for g in case.siblings if any(m.name == layer.name for m in g)), ())
    kept = [
        m
        for m in group
        if m.name != layer.name
        and m.stored.format == "nvfp4"
        and m.stored.divides == divides
        and lost(case, m) is None
        and not scales.is_inverted(m)
    ]
    theirs = {m.tensor_scale.values[0] for m in kept if m.tensor_scale is not None}
    if len(theirs) == 1:
        (value,) = theirs
        if kept[0].multiplier(value) * codec.SCALE_2_DENOMINATOR >= amax * (1 - _BF16_SLACK):
            return value
    if not kept:
        weights = [w for m in group if (w := parent_matrix(parent, m.stored)) is not None]
        amax = max([amax, *map(_amax, weights)])
    return codec.SCALE_2_DENOMINATOR / amax if divides else amax / codec.SCALE_2_DENOMINATOR
