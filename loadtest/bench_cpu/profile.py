"""Where a decode step's time goes: kernels, and everything that is not a kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ALLOWED_OUTSIDE = 0.10
SKIPPED_STEPS = 8  # the first ones prefill and warm up


@dataclass(frozen=True)
class StepProfile:
    """Medians over steps of one token, in seconds. `parts` add up to `step`, up to medians not being additive.

    outside  share of the step that is not inside a native kernel call
    """

    step: float
    parts: dict[str, float]
    outside: float


def step_profile(steps: Sequence[dict[str, Any]], batch: int = 1) -> StepProfile:
    """From the engine's own record of its steps; only those that gave `batch` tokens count."""
    chosen = [step for step in steps if step["tokens"] == batch][SKIPPED_STEPS:]
    if not chosen:
        raise ValueError(f"no step of {batch} tokens after the first {SKIPPED_STEPS}; expected some")

    def median(part: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(part(step) for step in chosen)

    named = ("prepare batch", "sample", "schedule", "commit")
    parts = {
        "kernels": median(lambda s: s["parts"]["native"]),
        "Python and torch between kernels": median(lambda s: s["parts"]["forward"] - s["parts"]["native"]),
        **{name: statistics.median(step["parts"][name] for step in chosen) for name in named},
        "messages and the rest of the loop": median(
            lambda s: s["seconds"] - s["parts"]["forward"] - sum(s["parts"][name] for name in named)
        ),
    }
    return StepProfile(median(lambda s: s["seconds"]), parts, median(lambda s: 1 - s["parts"]["native"] / s["seconds"]))
