"""How many threads kernels get unless told otherwise. Imports no torch: `nvfp4 version` asks too."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Physical cores this process may use: hyperthreads of a core count once, a cgroup CPU quota is a ceiling."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:  # not Linux, or a sandbox that hides the topology: every CPU is a core
            cores.add(str(cpu))
    return max(1, min(len(cores), _cpu_quota() or len(cores)))


def _cpu_quota() -> int | None:
    """CPUs allowed by cgroup v2's cpu.max, rounded up; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here
        return None
    return None if quota == "max" else -(-int(quota) // int(period))
