"""Scales that are not numbers, not positive, or not plausible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.files import some
from nvfp4_runtime.checkpoint.doctor.measure import FloatCounts, Measured
from nvfp4_runtime.checkpoint.doctor.report import Finding

_AGAIN = "quantise the layers again, or let --repair do it with --parent"
# w = code * block scale * weight_scale_2 with codes to 6 and block scales to 448: a weight_scale_2 of 10 stands for
# weights of 27,000. Real ones lie between 1e-6 and 1e-1, their reciprocals between 1e1 and 1e6.
IMPLAUSIBLE_SCALE_2 = 10.0
LOST_SHARE = 0.01  # of blocks: more than rounding of the very smallest can explain
_TOP_SHARE, _CLIPPED_SHARE = 0.005, 0.25


def block_scale_nan(case: Case) -> Iterable[Finding]:
    yield from _counted(
        "block-scale-nan", case.layers, _nan_blocks, lambda m: _blocks(m), "NaN among their block scales", _AGAIN
    )


def block_scale_negative(case: Case) -> Iterable[Finding]:
    yield from _counted(
        "block-scale-negative",
        case.layers,
        lambda m: m.blocks.negative if m.blocks is not None else 0,
        lambda m: _blocks(m),
        "negative block scales (no tool writes them: the bytes are damaged)",
        _AGAIN,
    )


def block_scale_zero(case: Case) -> Iterable[Finding]:
    """Zero scales over nonzero codes: a few are tiny blocks rounded away, many are lost weights."""
    lost = [layer for layer in case.layers if layer.codes is not None and layer.codes.lost_blocks]
    many = [layer for layer in lost if lost_share(layer) > LOST_SHARE]
    few = [layer for layer in lost if lost_share(layer) <= LOST_SHARE]
    worst = max(map(lost_share, many), default=0.0)
    yield from about(
        "block-scale-zero",
        "error",
        many,
        f"have zero block scales over nonzero codes, in up to {worst:.1%} of their blocks, which read as zero",
        _AGAIN,
    )
    count = sum(layer.codes.lost_blocks for layer in few if layer.codes is not None)
    yield from about(
        "block-scale-zero",
        "warning",
        few,
        f"have zero block scales over nonzero codes ({count} blocks in all, which read as zero)",
        "usually blocks too small for E4M3, by a tool that did not clamp; --repair writes them as the zeros they are",
    )


def tensor_scale_invalid(case: Case) -> Iterable[Finding]:
    broken = [layer for layer in case.layers if is_tensor_scale_invalid(layer)]
    yield from about(
        "tensor-scale-invalid", "error", broken, "have a tensor scale that is NaN, infinite, negative or zero", _AGAIN
    )


def is_tensor_scale_invalid(layer: Measured) -> bool:
    """A zero scale over weights that are all zero is what `max` gives: sound, unless it is a divisor."""
    found = layer.tensor_scale
    if found is None:
        return False
    zero_matters = layer.stored.divides or not layer.all_zero
    return bool(found.nonfinite or found.negative or (found.zero and zero_matters))


def tensor_scale_inverted(case: Case) -> Iterable[Finding]:
    """A multiplier stored where a divisor belongs, or the reverse."""
    inverted = [layer for layer in case.nvfp4 if is_inverted(layer)]
    values = [m.tensor_scale.most or 0.0 for m in inverted if m.tensor_scale is not None]
    yield from about(
        "tensor-scale-inverted",
        "error",
        inverted,
        f"have a tensor scale that is the reciprocal of one (up to {max(values, default=0.0):g}; ModelOpt multiplies "
        "by weight_scale_2, 1e-6 to 1e-1; compressed-tensors divides by weight_global_scale, 1e1 to 1e6)",
        "export again, or --repair, which stores the reciprocal",
    )


def is_inverted(layer: Measured) -> bool:
    """Whether every tensor scale is implausible as it stands and plausible the other way; or the parent says so."""
    if layer.comparison is not None and layer.comparison.misread == "inverted":
        return True
    if layer.stored.format != "nvfp4" or layer.tensor_scale is None or layer.comparison is not None:
        return False
    values = [value for value in layer.tensor_scale.values if value > 0 and math.isfinite(value)]
    if not values or (layer.all_zero and layer.stored.divides):  # of zeros, compressed-tensors makes 1.0
        return False
    limit = 1.0 if layer.stored.divides else IMPLAUSIBLE_SCALE_2
    return all(layer.multiplier(value) > limit for value in values)


def fp8_invalid(case: Case) -> Iterable[Finding]:
    yield from _counted(
        "fp8-nan",
        case.layers,
        lambda m: m.fp8.nan if m.fp8 is not None else 0,
        lambda m: m.fp8.total if m.fp8 is not None else 0,
        "NaN among their FP8 weights",
        _AGAIN,
    )
    broken = [m for m in case.layers if m.scale is not None and _is_broken(m.scale) and not m.all_zero]
    yield from about(
        "fp8-scale-invalid", "error", broken, "have FP8 scales that are NaN, infinite, negative or zero", _AGAIN
    )


def plain_nonfinite(case: Case) -> Iterable[Finding]:
    yield from _counted(
        "plain-nonfinite",
        case.layers,
        lambda m: m.plain.nonfinite if m.plain is not None else 0,
        lambda m: m.plain.total if m.plain is not None else 0,
        "NaN or infinity among their plain weights",
        "fetch the file again; the model itself may be broken",
    )


def blocks_saturated(case: Case) -> Iterable[Finding]:
    """By `max` one block of a tensor reaches scale 448, with one code 6. Many full of sixes are clipped."""
    clipped = [layer for layer in case.layers if is_saturated(layer)]
    worst = max((layer.codes.top_blocks / layer.codes.blocks for layer in clipped if layer.codes), default=0.0)
    yield from about(
        "blocks-saturated",
        "warning",
        clipped,
        f"are clipped: up to {worst:.1%} of their blocks have the largest block scale, 448, and many codes of 6",
        "their tensor scale is too small for their weights; quantise them again with one from their own maximum",
    )


def is_saturated(layer: Measured) -> bool:
    codes = layer.codes
    if codes is None or not codes.blocks or not codes.top_blocks:
        return False
    share = codes.top_blocks / codes.blocks
    return share > _TOP_SHARE and codes.top_blocks > 1 and codes.clipped_blocks / codes.top_blocks > _CLIPPED_SHARE


def all_zero(case: Case) -> Iterable[Finding]:
    zero = [m for m in case.layers if m.all_zero and m.stored.block is not None and ".experts." not in m.name]
    yield from about(
        "weights-zero",
        "warning",
        zero,
        "are quantised and hold nothing but zeros",
        "compare with the parent: unless its layer is zero as well, the export failed",
    )


def lost_share(layer: Measured) -> float:
    """The share of blocks whose zero scale hides nonzero codes."""
    return layer.codes.lost_blocks / layer.codes.blocks if layer.codes is not None and layer.codes.blocks else 0.0


def _nan_blocks(layer: Measured) -> int:
    if layer.blocks is not None:
        return layer.blocks.nan
    return layer.exponents[2] if layer.exponents is not None else 0


def _blocks(layer: Measured) -> int:
    return layer.blocks.total if layer.blocks is not None else 0


def _is_broken(scale: FloatCounts) -> bool:
    return bool(scale.nonfinite or scale.negative or scale.zero)


def _counted(
    id: str,
    layers: Iterable[Measured],
    count: Callable[[Measured], int],
    total: Callable[[Measured], int],
    what: str,
    remedy: str,
) -> Iterable[Finding]:
    """One error over the layers where `count` is not zero, with the sum and the worst layer's share."""
    found = sorted((layer for layer in layers if count(layer)), key=lambda m: -count(m))
    if not found:
        return
    worst = found[0]
    of = f" of {total(worst):,}" if total(worst) else ""
    yield Finding(
        id,
        "error",
        f"{len(found)} layer(s) have {what}: {sum(map(count, found)):,} in all, most ({count(worst):,}{of}) in "
        f"{worst.name}" + (f"; then {some([m.name for m in found[1:]])}" if len(found) > 1 else ""),
        remedy,
        tuple(layer.name for layer in found),
    )
