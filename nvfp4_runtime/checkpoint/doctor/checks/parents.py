"""What the parent says of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.parent import POOR_DB
from nvfp4_runtime.checkpoint.doctor.report import Finding


def far_from_parent(case: Case) -> Iterable[Finding]:
    far = [
        m
        for m in case.layers
        if m.comparison is not None
        and m.comparison.sqnr_db < POOR_DB
        and m.comparison.misread is None
        and math.isfinite(m.comparison.noise)  # NaN is a finding of its own
    ]
    folded = any(word in (case.quant.algo or "") for word in ("AWQ", "SVD"))
    worst = min((m.comparison.sqnr_db for m in far if m.comparison), default=0.0)
    yield from about(
        "far-from-parent",
        "info" if folded else "warning",
        far,
        f"are less than {POOR_DB:g} dB from their parent (down to {worst:.1f} dB; NVFP4 by `max` gives about 20)",
        "check that this is the parent; AWQ and rotations fold factors into weights, which looks the same. Otherwise "
        "quantise these layers again",
    )


def not_in_parent(case: Case) -> Iterable[Finding]:
    if not case.has_parent:
        return
    yield from about(
        "parent-lacks-layer",
        "info",
        [m for m in case.layers if m.stored.block is not None and m.stored.problem is None and m.comparison is None],
        "could not be compared: the parent lacks a plain matrix of that name and shape, or they lie [in, out]",
        "check that this is the parent",
    )
