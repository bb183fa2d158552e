"""Where a step's time goes: seconds by phase since start, taken in laps. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable


class StepClock:
    """Each lap is what passed since the lap before it, so phases never overlap and leave no gap.

    `Engine` laps "schedule", "model" and "commit"; a runner that knows the parts of its work laps them in between, and
    then "model" is what it left over. A GPU's engine laps "launch" and "wait" instead.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._last = now()

    def start(self) -> None:
        """What passed until now belongs to no phase."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """What passed since the last lap or start was `phase`."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
