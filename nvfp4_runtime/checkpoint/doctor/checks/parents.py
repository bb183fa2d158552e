"""What the parent says of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.parent import POOR_DB
from nvfp4_runtime.checkpoint.doctor.report import Finding


def nonfinite(case: Case) -> Iterable[Finding]:
    yield from about(
        "parent-nonfinite",
        "warning",
        [m for m in case.layers if m.comparison is not None and not math.isfinite(m.comparison.signal)],
        "cannot be measured: their parent holds NaN, infinities or values whose squares overflow",
        "check the parent's files. If they are as published, what was quantised of these layers is not to be trusted",
    )


def far_from_parent(case: Case) -> Iterable[Finding]:
    far = [
        m
        for m in case.layers
        if m.comparison is not None
        and m.comparison.sqnr_db < POOR_DB
        and m.comparison.misread is None
        and math.isfinite(m.comparison.signal)
        and not math.isnan(m.comparison.noise)  # NaN is a finding of its own
    ]
    folded = any(word in (case.quant.algo or "") for word in ("AWQ", "SVD"))
    worst = min((m.comparison.sqnr_db for m in far if m.comparison), default=0.0)
    yield from about(
        "far-from-parent",
        "info" if folded else "warning",
        far,
        f"are less than {POOR_DB:g} dB from their parent (down to {worst:.1f} dB; NVFP4 by `max` gives about 20)",
        "check that this is the parent; rotations and strong AWQ factors look the same. Otherwise quantise them again",
    )


def factors_folded(case: Case) -> Iterable[Finding]:
    """AWQ moves factors between a weight and what comes before it: other numbers, the same function."""
    folded = [m for m in case.layers if m.comparison is not None and m.comparison.misread == "folded"]
    worst = min((m.comparison.best_db or 0.0 for m in folded if m.comparison is not None), default=0.0)
    yield from about(
        "factors-folded",
        "info",
        folded,
        f"fit their parent only up to factors per row and column (as AWQ folds into norms and neighbours); with these "
        f"taken out at least {worst:.1f} dB",
        "none needed if the norms and neighbours hold the reciprocal factors, which is not checked",
    )


def not_in_parent(case: Case) -> Iterable[Finding]:
    if not case.has_parent:
        return
    compared = any(m.comparison is not None for m in case.layers)
    yield from about(
        "parent-lacks-layer",
        "info" if compared else "warning",
        [m for m in case.layers if m.stored.block is not None and m.stored.problem is None and m.comparison is None],
        "could not be compared: the parent lacks a plain matrix of that name and shape, or they lie [in, out]"
        + ("" if compared else "; none could, so the parent says nothing: it is quantised itself, or another model"),
        "check that this is the parent" + ("" if compared else ", the BF16, FP16 or FP32 model it was made of"),
    )
