"""Whether the client kept up: how late its event loop is, and how much of a core it uses.

Figures from a client that did not keep up say something about the client.
"""

from __future__ import annotations

import asyncio
import resource
import time
from dataclasses import dataclass

import numpy as np

INTERVAL_SECONDS = 0.01
MAX_LAG_MS = 20.0
MAX_LATE_MS = 20.0
MAX_CPU = 0.85


@dataclass(frozen=True)
class Condition:
    """Of the client over one run.

    lag_ms_p99, lag_ms_max   how late its timers fired; a stall counts as often as timers fell into it
    late_ms_p99              how late requests were sent
    cpu                      of one core, its whole process
    """

    lag_ms_p99: float
    lag_ms_max: float
    late_ms_p99: float
    cpu: float

    def complaints(self) -> list[str]:
        """Why the run is invalid; empty: it is valid."""
        found = []
        if self.lag_ms_p99 > MAX_LAG_MS:
            found.append(f"client stalled: event-loop lag p99 {self.lag_ms_p99:.0f} ms, limit {MAX_LAG_MS:.0f}")
        if self.late_ms_p99 > MAX_LATE_MS:
            found.append(f"client late: requests sent p99 {self.late_ms_p99:.0f} ms late, limit {MAX_LATE_MS:.0f}")
        if self.cpu > MAX_CPU:
            found.append(f"client busy: {100 * self.cpu:.0f} % of a core, limit {100 * MAX_CPU:.0f}")
        return found


class Watch:
    """Runs in the event loop beside the clients, from `start` to `stop`."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._began = time.perf_counter()
        self._cpu = _cpu_seconds()
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + INTERVAL_SECONDS
            await asyncio.sleep(INTERVAL_SECONDS)
            self._note(time.perf_counter() - due)

    def _note(self, lag: float) -> None:
        """One timer `lag` late, and those that should have fired meanwhile: without them a stall would count once."""
        while lag > 0:
            self._lags.append(lag)
            lag -= INTERVAL_SECONDS

    async def stop(self, lates: list[float]) -> Condition:
        assert self._task is not None
        await asyncio.sleep(0)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        seconds = time.perf_counter() - self._began
        lags = 1000 * np.array(self._lags or [0.0])
        late = 1000 * np.array(lates or [0.0])
        return Condition(
            float(np.percentile(lags, 99)),
            float(lags.max()),
            float(np.percentile(late, 99)),
            (_cpu_seconds() - self._cpu) / seconds,
        )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
