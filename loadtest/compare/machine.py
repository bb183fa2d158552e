"""What it ran on, and the energy it took, where the system lets us read that."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def describe(repository: Path) -> dict[str, str]:
    """Processor, system, versions. What cannot be found is left out."""
    found = {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": _first_line(
            ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        ),
        "commit": _first_line(["git", "-C", str(repository), "rev-parse", "--short", "HEAD"]),
    }
    return {name: value for name, value in found.items() if value}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = found.get("model name", platform.machine())
    if "cpu family" in found and "model" in found:  # clouds hide the name
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return ""
    return f"{pages * size / 2**30:.0f} GiB"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # there is no such program here, so there is nothing that it could tell
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


class Energy:
    """Joules since its making, of GPUs (nvidia-smi's NVML library) or processor packages (RAPL)."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.source, self.why_not = "", ""
        self._packages: list[Path] = []
        self._gpus = _nvml_gpus()
        if self._gpus:
            self.source = "NVML"
        else:
            zones = sorted(powercap.glob("intel-rapl:[0-9]*"))
            self._packages = [zone for zone in zones if zone.name.count(":") == 1 and _readable(zone / "energy_uj")]
            self.source = "RAPL" if self._packages else ""
            if not self._packages:
                reason = "not readable for this user" if zones else "this machine has no powercap zones"
                self.why_not = f"energy is not readable: no NVIDIA GPU by NVML, and {reason}"
        self._start = self._read()

    def joules(self) -> float | None:
        """None where it is not readable. A counter that wrapped is put right."""
        if not self.source:
            return None
        used = 0.0
        for (before, wrap), (after, _) in zip(self._start, self._read(), strict=True):
            used += after - before + (wrap if after < before else 0.0)
        return used

    def _read(self) -> list[tuple[float, float]]:
        """(joules, what the counter wraps at) of each."""
        if self._gpus:
            return [(joules, 0.0) for joules in _nvml_joules(self._gpus)]
        return [
            (float((zone / "energy_uj").read_text()) / 1e6, float((zone / "max_energy_range_uj").read_text()) / 1e6)
            for zone in self._packages
        ]


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True


def _nvml_gpus() -> list[object]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _nvml_joules(gpus: list[object]) -> list[float]:
    import pynvml

    return [pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000 for gpu in gpus]
