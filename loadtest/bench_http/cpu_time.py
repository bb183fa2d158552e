"""CPU time of one process, in nanoseconds, without its children."""

from __future__ import annotations

from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that all living threads of `pid` have used. Linux: /proc/<pid>/task/<tid>/schedstat."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            nanoseconds += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue  # a thread that ended between the listing and the reading
    return nanoseconds / 1e9
