"""How much of the machine others used while we measured: a figure taken beside a busy neighbour is no figure."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence, Set
from pathlib import Path

BUSY_CORES = 0.2  # above this, say so beside the figures


class Neighbours:
    """Counts from its making on. Linux; elsewhere `cores` is None.

    measured  processes that are no descendants of ours and are what is measured, so no neighbours
    """

    def __init__(self, measured: Sequence[int] = ()) -> None:
        self._roots = {os.getpid(), *measured}
        self._start = _snapshot(self._roots)

    def cores(self) -> float | None:
        """Mean number of cores that none of us used: we, our living descendants, and who is measured. The hypervisor's
        steal counts."""
        now = _snapshot(self._roots)
        if self._start is None or now is None:
            return None
        ticks = (now[0] - self._start[0]) - (now[1] - self._start[1])
        return max(0.0, ticks / os.sysconf("SC_CLK_TCK") / (now[2] - self._start[2]))


def _snapshot(roots: Set[int]) -> tuple[int, int, float] | None:
    """Ticks the machine was busy, ticks the trees under `roots` used, seconds."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in stat.read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal, _tree_ticks(roots), time.monotonic()


def _tree_ticks(roots: Set[int]) -> int:
    """CPU ticks of `roots`, their descendants, and those of them that ended and were waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(int(x) for x in fields[11:15])  # utime stime cutime cstime
    ours = set(roots)
    while grown := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= grown
    return sum(ticks.get(pid, 0) for pid in ours)
