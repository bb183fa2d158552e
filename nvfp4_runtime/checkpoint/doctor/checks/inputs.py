"""Scales of activations and of the KV cache: missing, impossible, or never calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvfp4_runtime.checkpoint.detect import WEIGHT_ONLY
from nvfp4_runtime.checkpoint.doctor.case import Case, about, expert_group
from nvfp4_runtime.checkpoint.doctor.decode import read_any
from nvfp4_runtime.checkpoint.doctor.measure import Measured, count_floats
from nvfp4_runtime.checkpoint.doctor.report import Finding

_CALIBRATE = "calibrate again (`nvfp4 quantize --calib TEXT`), or serve with --numerics w4a16, which needs none"
# input_scale = amax / 2688: 100 stands for activations of 270,000, beyond what BF16 models produce.
IMPLAUSIBLE_INPUT = 100.0
_ENOUGH = 4  # layers with an input_scale before their being equal means anything


def input_scale_missing(case: Case) -> Iterable[Finding]:
    """Where W4A4 is declared. Single experts are another finding."""
    missing = [m for m in case.nvfp4 if m.input_scale is None and wants_input(case, m) and not _is_odd_expert(case, m)]
    yield from about(
        "input-scale-missing",
        "warning",
        missing,
        "have no input_scale although NVFP4 with 4-bit activations is declared",
        f"{_CALIBRATE}; --repair fills one from a sibling that reads the same input",
    )


def wants_input(case: Case, layer: Measured) -> bool:
    """Whether 4-bit activations are declared for the layer."""
    return bool(case.algos(layer.name) & {"NVFP4", "NVFP4_AWQ"})


def input_scale_invalid(case: Case) -> Iterable[Finding]:
    broken = [m for m in _calibrated(case) if is_input_invalid(m) and expert_group(m.name) is None]
    yield from about(
        "input-scale-invalid",
        "error",
        broken,
        "have an input_scale that is NaN, infinite, negative or zero: 4-bit activations would be NaN",
        f"{_CALIBRATE}; --repair fills one from a sibling that reads the same input",
    )


def _calibrated(case: Case) -> list[Measured]:
    """Layers with an input_scale that somebody reads: where weight-only arithmetic is declared, nobody does."""
    return [m for m in case.nvfp4 if m.input_scale is not None and case.algos(m.name) != {WEIGHT_ONLY}]


def is_input_invalid(layer: Measured) -> bool:
    scale = layer.input_scale
    return scale is not None and bool(scale.nonfinite or scale.negative or scale.zero)


def input_scale_constant(case: Case) -> Iterable[Finding]:
    """Different layers see different activations; one value for all of them was never measured."""
    calibrated = [m for m in _calibrated(case) if not is_input_invalid(m)]
    values = {m.input_scale.values for m in calibrated if m.input_scale is not None}
    placeholders = [m for m in calibrated if m.input_scale is not None and set(m.input_scale.values) == {1.0}]
    if len(values) > 1:
        yield from about(
            "input-scale-constant",
            "warning",
            placeholders,
            "have an input_scale of exactly 1, which is a placeholder and no measurement",
            _CALIBRATE,
        )
    if len(calibrated) >= _ENOUGH and len(values) == 1:
        (value,) = values
        yield from about(
            "input-scale-constant",
            "warning",
            calibrated,
            f"all have the input_scale {value[0]:g}, which no calibration gives",
            _CALIBRATE,
        )


def input_scale_inverted(case: Case) -> Iterable[Finding]:
    odd = [layer for layer in _calibrated(case) if is_input_inverted(layer)]
    yield from about(
        "input-scale-inverted",
        "warning",
        odd,
        f"have an input_scale above {IMPLAUSIBLE_INPUT:g} as a multiplier: it is the reciprocal of one",
        f"{_CALIBRATE}; --repair inverts it where the weight's tensor scale is inverted as well",
    )


def is_input_inverted(layer: Measured) -> bool:
    if layer.input_scale is None or is_input_invalid(layer):
        return False
    return all(layer.multiplier(value) > IMPLAUSIBLE_INPUT for value in layer.input_scale.values)


def kv_scales(case: Case) -> Iterable[Finding]:
    names = [item.info.name for item in case.loose if item.kind == "kv_scale" and not item.info.name.endswith("bias")]
    broken = []
    for name in names:
        info = case.shards.require(name)
        if info.dtype in ("F32", "BF16", "F16"):
            found = count_floats(read_any(case.shards, name))
            if found.nonfinite or found.negative or found.zero:
                broken.append(name)
    yield from about(
        "kv-scale-invalid",
        "error",
        broken,
        "have a KV cache scale that is NaN, infinite, negative or zero",
        "calibrate the KV cache again, or serve with --kv-cache-dtype bf16",
    )
    lonely = [name for name in names if (other := _partner(name)) is not None and other not in case.shards]
    yield from about(
        "kv-scale-partial",
        "error",
        lonely,
        "have the scale of one of K and V and lack the other",
        "export again, or serve with --kv-cache-dtype bf16",
    )


def kv_undeclared(case: Case) -> Iterable[Finding]:
    names = [item.info.name for item in case.loose if item.kind == "kv_scale"]
    if names and case.quant.kv_algo is None:
        yield from about(
            "kv-scale-undeclared",
            "info",
            names,
            "have a KV cache scale, and no quantised KV cache is declared",
            "none needed; they are used with --kv-cache-dtype fp8",
        )


def _partner(name: str) -> str | None:
    """self_attn.k_proj.k_scale <-> self_attn.v_proj.v_scale, and the forms without a projection."""
    if name.endswith("k_scale"):
        return name[: -len("k_scale")].replace("k_proj", "v_proj") + "v_scale"
    if name.endswith("v_scale") and not name.endswith("kv_scale"):
        return name[: -len("v_scale")].replace("v_proj", "k_proj") + "k_scale"
    return None


def _is_odd_expert(case: Case, layer: Measured) -> bool:
    """An expert without input_scale among experts that have one."""
    group = expert_group(layer.name)
    return group is not None and any(m.input_scale is not None for m in case.experts[group])


def usable_input(layer: Measured) -> float | None:
    """The layer's one valid input_scale as a multiplier, or None."""
    if layer.input_scale is None or is_input_invalid(layer) or len(layer.input_scale.values) != 1:
        return None
    value = layer.multiplier(layer.input_scale.values[0])
    return value if math.isfinite(value) else None
