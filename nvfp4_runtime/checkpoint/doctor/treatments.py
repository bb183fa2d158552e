"""What `--repair` does to layers: each treatment says what changes, and computes the new tensors when they are written.

A treatment is applied only where the evidence is certain; what it cannot cure it leaves as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.checks import complete, groups, inputs, layout, scales
from nvfp4_runtime.checkpoint.doctor.decode import read_any, swap_nibbles
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.report import Change
from nvfp4_runtime.checkpoint.doctor.requantise import lost, requantise, why_untrusted
from nvfp4_runtime.checkpoint.doctor.treatment import Plan, Tensors, Treatment
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.writer import TensorSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import unswizzle_scales

_UNIT_SCALE = 0x38  # 1.0 in E4M3: what ModelOpt gives a block of zeros


def plan(case: Case, parent: Shards | None) -> Plan:
    """Decide what to do about every finding that has a sure cure."""
    made = Plan()
    treated: set[str] = set()
    trusted = _trusted(case, parent, made)
    for layer in case.layers:
        treatment = requantise(case, layer, trusted) or _reorder(case, layer) or _zero_blocks(case, layer)
        if treatment is not None:
            made.treatments.append(treatment)
            treated.add(layer.name)
    for group in groups.differing_scales(case):
        if not treated & {layer.name for layer in group} and (folded := _fold(case, group)) is not None:
            made.treatments.append(folded)
    made.treatments += _fill_inputs(case)
    lost = set(complete.lost_weights(case))  # their scales stay: the weight may be found again
    for item in case.loose:
        if item.info.name.rpartition(".")[0] in lost:
            continue
        if item.kind == "orphan" and not item.info.name.endswith(("bias", "_double_scale")):
            made.dropped.add(item.info.name)
            made.changes.append(Change("orphan-tensor", item.info.name, "left out: it scales nothing", True))
    made.changes += [change for treatment in made.treatments for change in treatment.changes]
    return made


def _trusted(case: Case, parent: Shards | None, made: Plan) -> Shards | None:
    """The parent, if there is something to take from it and it is this model; else None, and `made` says why."""
    needy = [layer.name for layer in case.layers if lost(case, layer) is not None]
    if parent is None or not needy:
        return None
    why = why_untrusted(case, parent)
    if why is not None:
        made.refused += about(
            "parent-untrusted",
            "warning",
            needy,
            f"were not quantised again from the parent: {why}",
            "give the model this checkpoint was made of, or make the checkpoint again",
        )
    return parent if why is None else None


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
