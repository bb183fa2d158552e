"""What `--repair` does to layers: each treatment says what changes, and computes the new tensors when they are written.

A treatment is applied only where the evidence is certain; what it cannot cure it leaves as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.case import Case, expert_group
from nvfp4_runtime.checkpoint.doctor.checks import groups, inputs, layout, scales
from nvfp4_runtime.checkpoint.doctor.decode import CHUNK_VALUES, read_any, swap_nibbles
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.parent import parent_matrix
from nvfp4_runtime.checkpoint.doctor.report import Change
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.writer import TensorSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import unswizzle_scales

Tensors = dict[str, Tensor]
_UNIT_SCALE = 0x38  # 1.0 in E4M3: what ModelOpt gives a block of zeros
_BF16_SLACK = 2.0**-7  # compressed-tensors computes its global scale in bfloat16


@dataclass(frozen=True)
class Treatment:
    """New tensors for one layer or one group of layers.

    specs    what `make` will return
    make     computes them: one layer's tensors in memory
    changes  what it does, for people
    exact    layers whose weights must dequantise to the same bits afterwards
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[], Tensors]
    changes: tuple[Change, ...]
    exact: tuple[str, ...] = ()


@dataclass
class Plan:
    """Every treatment, and the tensors that are left out."""

    treatments: list[Treatment] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)


def plan(case: Case, parent: Shards | None) -> Plan:
    """Decide what to do about every finding that has a sure cure."""
    made = Plan()
    treated: set[str] = set()
    for layer in case.layers:
        treatment = _requantise(case, layer, parent) or _reorder(case, layer) or _zero_blocks(case, layer)
        if treatment is not None:
            made.treatments.append(treatment)
            treated.add(layer.name)
    for group in groups.differing_scales(case):
        if not treated & {layer.name for layer in group} and (folded := _fold(case, group)) is not None:
            made.treatments.append(folded)
    made.treatments += _fill_inputs(case)
    for item in case.loose:
        if item.kind == "orphan" and not item.info.name.endswith(("bias", "_double_scale")):
            made.dropped.add(item.info.name)
            made.changes.append(Change("orphan-tensor", item.info.name, "left out: it scales nothing", True))
    made.changes += [change for treatment in made.treatments for change in treatment.changes]
    return made


def _requantise(case: Case, layer: Measured, parent: Shards | None) -> Treatment | None:
    """Quantise a layer anew by `max` from its parent, because what is stored has lost the weights."""
    why = _lost(case, layer)
    if why is None or parent is None or layer.stored.experts:
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


def _lost(case: Case, layer: Measured) -> str | None:
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
        and _lost(case, m) is None
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


def _reorder(case: Case, layer: Measured) -> Treatment | None:
    """Put swizzled scales, swapped nibbles or a reciprocal tensor scale right: one of them, as the evidence says."""
    names = layer.stored.tensors
    if layout.is_surely_swizzled(case.shards, layer):
        scale = case.shards.require(names.get("block_scale", names.get("scale", "")))
        size = layout.padded_scale(case.shards, layer.stored) or (scale.shape[0], scale.shape[1])
        spec = TensorSpec(scale.name, "F8_E4M3", size)

        def unswizzled() -> Tensors:
            return {scale.name: unswizzle_scales(read_any(case.shards, scale.name).reshape(-1), *size)}

        change = Change("scales-swizzled", layer.name, "block scales put in row-major order", False)
        return Treatment((spec,), unswizzled, (change,))
    if layer.comparison is not None and layer.comparison.misread == "nibbles":
        codes = case.shards.require(names["weight"])
        spec = TensorSpec(codes.name, "U8", codes.shape)
        change = Change("nibbles-swapped", layer.name, "the two codes of every byte exchanged", False)
        return Treatment((spec,), lambda: {codes.name: swap_nibbles(read_any(case.shards, codes.name))}, (change,))
    if scales.is_inverted(layer):
        return _invert(case, layer)
    return None


def _invert(case: Case, layer: Measured) -> Treatment:
    """Store reciprocals; of the input_scale as well where it is as implausible."""
    names = [layer.stored.tensors["tensor_scale"]]
    if inputs.is_input_inverted(layer):
        names.append(layer.stored.tensors["input_scale"])
    infos = [case.shards.require(name) for name in names]
    specs = tuple(TensorSpec(info.name, "F32", info.shape) for info in infos)

    def make() -> Tensors:
        return {name: 1 / read_any(case.shards, name).to(torch.float32) for name in names}

    whats = [name.rpartition(".")[2] for name in names]
    change = Change("tensor-scale-inverted", layer.name, f"{' and '.join(whats)} replaced by the reciprocal", False)
    return Treatment(specs, make, (change,))


def _zero_blocks(case: Case, layer: Measured) -> Treatment | None:
    """Write blocks whose scale is zero as the zeros they read as: zero codes under scale 1."""
    if layer.codes is None or not layer.codes.lost_blocks or layer.stored.block != (1, codec.BLOCK):
        return None
    if scales.lost_share(layer) > scales.LOST_SHARE or layer.stored.experts:
        return None
    names = layer.stored.tensors
    codes, scale = case.shards.require(names["weight"]), case.shards.require(names["block_scale"])

    def make() -> Tensors:
        stored = read_any(case.shards, scale.name).view(torch.uint8)
        packed = read_any(case.shards, codes.name)
        lost = (stored & 0x7F) == 0
        # codes keep their sign bits: -0 stays -0, so the dequantised bits are the same
        kept = torch.where(lost.repeat_interleave(codec.BLOCK // 2, dim=-1), packed & 0x88, packed)
        return {
            codes.name: kept,
            scale.name: torch.where(lost, torch.full_like(stored, _UNIT_SCALE), stored).view(torch.float8_e4m3fn),
        }

    specs = (TensorSpec(codes.name, "U8", codes.shape), TensorSpec(scale.name, "F8_E4M3", scale.shape))
    what = f"{layer.codes.lost_blocks} block(s) under a zero scale written as zeros under scale 1"
    return Treatment(specs, make, (Change("block-scale-zero", layer.name, what, True),), (layer.name,))


def _fold(case: Case, group: tuple[Measured, ...]) -> Treatment | None:
    """One tensor scale for siblings, the ratio moved into their block scales, where E4M3 holds every result exactly."""
    stored = {m.name: read_any(case.shards, m.stored.tensors["tensor_scale"]) for m in group}
    for target in sorted({float(t.reshape(-1)[0]) for t in stored.values()}, reverse=True):
        parts = [m for m in group if float(stored[m.name].reshape(-1)[0]) != target]
        if all(_folded(case, m, target) is not None for m in parts):
            break
    else:
        return None
    specs = []
    for m in parts:
        scale = case.shards.require(m.stored.tensors["block_scale"])
        tensor = case.shards.require(m.stored.tensors["tensor_scale"])
        specs += [TensorSpec(scale.name, scale.dtype, scale.shape), TensorSpec(tensor.name, tensor.dtype, tensor.shape)]

    def make() -> Tensors:
        made: Tensors = {}
        for m in parts:
            folded = _folded(case, m, target)
            assert folded is not None, f"{m.name} could be folded a moment ago"
            made[m.stored.tensors["block_scale"]] = folded
            made[m.stored.tensors["tensor_scale"]] = torch.full_like(stored[m.name], target)
        return made

    names = ", ".join(m.name.rpartition(".")[2] for m in group)
    changes = tuple(
        Change(
            "sibling-scales-differ", m.name, f"tensor scale {target:.6g} shared by {names}; block scales rescaled", True
        )
        for m in parts
    )
    return Treatment(tuple(specs), make, changes, tuple(m.name for m in parts))


def _folded(case: Case, layer: Measured, target: float) -> Tensor | None:
    """Block scales under the tensor scale `target` that dequantise to the same bits, or None where E4M3 lacks one."""
    if layer.codes is None or layer.stored.experts:
        return None
    scale = read_any(case.shards, layer.stored.tensors["block_scale"])
    own = read_any(case.shards, layer.stored.tensors["tensor_scale"]).reshape(-1)[0].to(torch.float32)
    new = torch.tensor(target, dtype=torch.float32)
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    if layer.stored.divides:
        moved, before = values.double() * new.double() / own.double(), values / own
    else:
        moved, before = values.double() * own.double() / new.double(), values * own
    coded = moved.to(torch.float32).to(torch.float8_e4m3fn)
    after = coded.to(torch.float32) / new if layer.stored.divides else coded.to(torch.float32) * new
    exact = after == before  # per byte; NaN is not equal to itself
    table = coded.view(torch.uint8)
    raw = scale.view(torch.uint8)
    used = torch.bincount(raw.reshape(-1), minlength=256) > 0
    if not bool(exact[used].all()):
        return None
    return table[raw.to(torch.int32)].view(torch.float8_e4m3fn)


def _fill_inputs(case: Case) -> Iterable[Treatment]:
    """Give a missing or broken input_scale the largest of those that serve the same input, or of the other experts."""
    done: set[str] = set()
    for members in case.experts.values():
        yield from _fill(case, members, "expert-uninitialised", "the largest of the layer's other experts", done)
    for group in case.siblings:
        if not all(inputs.wants_input(case, m) for m in group):
            continue
        rule = "that of its siblings, which read the same input"
        finding = "input-scale-invalid" if any(map(inputs.is_input_invalid, group)) else "input-scale-missing"
        yield from _fill(case, group, finding, rule, done)


def _fill(case: Case, members: Sequence[Measured], finding: str, rule: str, done: set[str]) -> Iterable[Treatment]:
    donors = [m for m in members if m.stored.format == "nvfp4" and inputs.usable_input(m) is not None]
    if not donors or not all(m.stored.format in ("nvfp4", "unknown") for m in members):
        return
    best = max(donors, key=lambda m: inputs.usable_input(m) or 0.0)
    source = case.shards.require(best.stored.tensors["input_scale"])
    for layer in members:
        needs = layer.input_scale is None or inputs.is_input_invalid(layer)
        if not needs or layer.name in done:
            continue
        done.add(layer.name)
        leaf = source.name.rpartition(".")[2]
        name = layer.stored.tensors.get("input_scale", f"{layer.name}.{leaf}")
        # the donor's own type and shape: one family of tensors stays uniform
        spec = TensorSpec(name, source.dtype, source.shape)
        what = f"{leaf} set to {best.input_scale.values[0] if best.input_scale else 0:.6g}, {rule}"
        yield Treatment((spec,), _copy_of(case, source.name, name), (Change(finding, layer.name, what, True),))


def _copy_of(case: Case, source: str, name: str) -> Callable[[], Tensors]:
    return lambda: {name: read_any(case.shards, source).clone()}
