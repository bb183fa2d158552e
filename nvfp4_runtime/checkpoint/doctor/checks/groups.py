"""Layers seen beside their siblings: q, k and v; gate and up; the experts of one layer."""

from __future__ import annotations

from collections.abc import Iterable

from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.checks.inputs import is_input_invalid
from nvfp4_runtime.checkpoint.doctor.checks.scales import is_tensor_scale_invalid
from nvfp4_runtime.checkpoint.doctor.files import some
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.errors import MissingTensorError


def sibling_scales(case: Case) -> Iterable[Finding]:
    """Engines that fuse such layers take one tensor scale for all, and change the weights of the others."""
    groups = differing_scales(case)
    if not groups:
        return
    ratios = [max(scales) / min(scales) for scales in map(_scales, groups)]
    worst = groups[ratios.index(max(ratios))]
    names = [layer.name for group in groups for layer in group]
    yield Finding(
        "sibling-scales-differ",
        "warning",
        f"{len(groups)} group(s) that share an input differ in their tensor scale, by up to a factor of "
        f"{max(ratios):.4g} ({some([layer.name for layer in worst])})",
        "this server keeps a scale per part; vLLM takes one for all, which changes the others' weights. --repair folds "
        "them where E4M3 holds the result exactly (ratios that are powers of two); else quantise them together",
        tuple(names),
    )


def differing_scales(case: Case) -> list[tuple[Measured, ...]]:
    """Sibling groups of NVFP4 layers with valid tensor scales that are not all equal."""
    found = []
    for group in case.siblings:
        usable = all(
            m.stored.format == "nvfp4" and m.tensor_scale is not None and not is_tensor_scale_invalid(m) for m in group
        )
        if usable and all(_scales(group)) and len(set(_scales(group))) > 1:
            found.append(group)
    return found


def _scales(group: tuple[Measured, ...]) -> list[float]:
    return [layer.tensor_scale.values[0] for layer in group if layer.tensor_scale is not None]


def sibling_formats(case: Case) -> Iterable[Finding]:
    mixed = [group for group in case.siblings if len({layer.stored.format for layer in group}) > 1]
    yield from about(
        "sibling-formats-differ",
        "info",
        [layer for group in mixed for layer in group],
        "share an input and are stored in different formats, so engines cannot fuse them; some refuse",
        "none needed here; quantise or exclude such layers together for vLLM",
    )


def sibling_inputs(case: Case) -> Iterable[Finding]:
    differing = []
    for group in case.siblings:
        scales = {layer.input_scale.values for layer in group if layer.input_scale is not None}
        if len(scales) > 1 and not any(map(is_input_invalid, group)):
            differing.append(group)
    yield from about(
        "sibling-inputs-differ",
        "info",
        [layer for group in differing for layer in group],
        "share an input and differ in input_scale; the largest serves them all",
        "none needed",
    )


def experts_uninitialised(case: Case) -> Iterable[Finding]:
    """Experts that calibration never reached: what engines read in their place is anybody's guess."""
    broken: dict[str, list[str]] = {}
    for group in case.experts.values():
        for layer, why in odd_experts(case, group):
            broken.setdefault(layer.name, []).append(why)
    if not broken:
        return
    first = next(iter(broken))
    yield Finding(
        "expert-uninitialised",
        "error",
        f"{len(broken)} expert layer(s) were never initialised, e.g. {first}: {' and '.join(broken[first])}",
        "calibrate with text that reaches every expert; --repair gives a missing input_scale the largest of the "
        "layer's other experts, and quantises broken weights again with --parent",
        tuple(broken),
    )


def odd_experts(case: Case, group: list[Measured]) -> Iterable[tuple[Measured, str]]:
    """Experts of one layer and projection with something missing or broken that the others have."""
    calibrated = any(m.input_scale is not None for m in group)
    some_nonzero = any(not m.all_zero for m in group if m.stored.problem is None)
    for layer in group:
        if isinstance(layer.stored.problem, MissingTensorError):
            yield layer, f"{layer.stored.problem.tensor.rpartition('.')[2]} is missing"
            continue
        if layer.stored.format != "nvfp4":
            continue
        if is_input_invalid(layer):
            yield layer, "its input_scale is zero, negative or not finite"
        elif layer.input_scale is None and calibrated:
            yield layer, "it has no input_scale and other experts have"
        if is_tensor_scale_invalid(layer):
            yield layer, "its tensor scale is zero, negative or not finite"
        elif layer.all_zero and some_nonzero:
            yield layer, "all its weights are zero"


def experts_missing(case: Case) -> Iterable[Finding]:
    """Fewer experts than config.json says, or than other layers have."""
    counts = {container: len(group) for (container, _), group in case.experts.items()}
    fields = ("num_experts", "n_routed_experts", "num_local_experts")
    declared = next((v for f in fields if type(v := case.model_config.get(f)) is int), None)
    wanted = declared or max(counts.values(), default=0)
    short = [f"{c}.*.{p}" for (c, p), group in case.experts.items() if len(group) != wanted]
    yield from about(
        "expert-missing",
        "error",
        short,
        f"do not have one of each of {wanted} experts",
        "fetch the shards again, or check num_experts in config.json",
    )
