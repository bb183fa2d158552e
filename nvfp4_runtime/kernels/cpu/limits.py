"""What this CPU can do at best, measured: read bandwidth and multiply-add peaks. Figures are ratios to these.

    python -m nvfp4_runtime.kernels.cpu.limits [--threads N]     prints them once
    python -m nvfp4_runtime.kernels.cpu.limits --pipe            measures anew per line {"threads": n, ...} on stdin

Without torch, so that a benchmark can keep one of these beside what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from nvfp4_runtime.errors import KernelError

READ_BYTES = 512 << 20  # beyond any cache of today's server parts that one guest gets to itself
READ_SECONDS = 0.6
PEAK_SECONDS = 0.1


@dataclass(frozen=True)
class Limit:
    """Bytes or operations per second over windows of 5 ms: their median, 10th and 90th percentile; and what gave it."""

    median: float
    low: float
    high: float
    how: str


def measure_read_bandwidth(threads: int, num_bytes: int = READ_BYTES, seconds: float = READ_SECONDS) -> Limit:
    """Bytes per second that `threads` threads read from a huge-page buffer of `num_bytes`, sequentially.

    Raises KernelError without the extension or for numbers that cannot be measured with.
    """
    return _limit(lambda native: native.measure_read_bandwidth(threads, num_bytes, seconds))


def measure_peak(kind: str, threads: int, seconds: float = PEAK_SECONDS) -> Limit:
    """Operations per second (a multiply-add is two) of "vnni" (int8), "bf16" (pairs) or "fma" (FP32), on registers.

    Raises KernelError without the extension, and where the CPU lacks the instruction.
    """
    return _limit(lambda native: native.measure_peak(kind, threads, seconds))


def peak_kinds() -> list[str]:
    """The kinds `measure_peak` can measure on this CPU."""
    return list(_native().peak_kinds())


def measure_all(threads: int, num_bytes: int = READ_BYTES) -> dict[str, Limit]:
    """Every limit this CPU has: "read" in bytes per second, the peaks in operations per second. About a second."""
    limits = {"read": measure_read_bandwidth(threads, num_bytes)}
    return limits | {kind: measure_peak(kind, threads) for kind in peak_kinds()}


def _native() -> Any:
    try:
        from nvfp4_runtime.kernels.cpu import _native as native  # type: ignore[attr-defined]  # compiled, has no stub
    except ImportError as error:
        raise KernelError(
            f"the machine's limits are measured by the native extension, which is not built ({error}): "
            "install a C++17 compiler and run `pip install .` again"
        ) from error
    return native


def _limit(measure: Any) -> Limit:
    try:
        rate = measure(_native())
    except (ValueError, MemoryError) as error:
        raise KernelError(str(error) or "not enough memory for the buffer that is read") from error
    return Limit(rate.median, rate.low, rate.high, rate.how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pipe", action="store_true", help="answer commands on stdin until it closes")
    args = parser.parse_args()
    if args.pipe:
        for line in sys.stdin:
            command = json.loads(line)
            limits = measure_all(command["threads"], command.get("bytes", READ_BYTES))
            print(json.dumps({name: asdict(limit) for name, limit in limits.items()}), flush=True)
        return
    for name, limit in measure_all(args.threads).items():
        unit = "GB/s" if name == "read" else "GOP/s"
        spread = f"{limit.low / 1e9:.1f} to {limit.high / 1e9:.1f}"
        print(f"{name:5} {limit.median / 1e9:9.1f} {unit:5} ({spread})  {limit.how}, {args.threads} threads")


if __name__ == "__main__":
    main()
