"""How much of the machine others used while we measured: a figure taken beside a busy neighbour is no figure."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_CORES = 0.2  # above this, say so beside the figures


class Neighbours:
    """Counts from its making on. Linux; elsewhere `cores` is None."""

    def __init__(self) -> None:
        self._start = _snapshot()

    def cores(self) -> float | None:
        """Mean number of cores that neither we nor our living descendants used; the hypervisor's steal counts."""
        now = _snapshot()
        if self._start is None or now is None:
            return None
        ticks = (now[0] - self._start[0]) - (now[1] - self._start[1])
        return max(0.0, ticks / os.sysconf("SC_CLK_TCK") / (now[2] - self._start[2]))


def _snapshot() -> tuple[int, int, float] | None:
    """Ticks the machine was busy, ticks our process tree used, seconds."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in stat.read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal, _tree_ticks(os.getpid()), time.monotonic()


def _tree_ticks(root: int) -> int:
    """CPU ticks of `root`, its descendants, and those of them that ended and were waited for."""
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
    ours = {root}
    while grown := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= grown
    return sum(ticks.get(pid, 0) for pid in ours)
