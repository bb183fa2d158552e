"""The machine's limits beside which a step's work is shown: configured, or measured once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from nvfp4_runtime.engine.device import describe
from nvfp4_runtime.engine.messages import MachineLimits
from nvfp4_runtime.errors import ConfigError, KernelError

logger = logging.getLogger(__name__)

FLAG = "--machine-limits"
_GPU_BYTES, _GPU_GEMM = 1 << 30, 4096


def machine_limits(asked: str, device: torch.device, threads: int, numerics: str) -> MachineLimits | None:
    """What `--machine-limits` asks for, which is not "off": "measure", or "GB/s,GFLOP/s" such as "40,900".

    Measuring takes one to two seconds the first time; a machine that cannot be measured has no limits and says why in
    the log. ConfigError for anything else.
    """
    if asked != "measure":
        return _configured(asked)
    try:
        if device.type == "cuda":
            return _cached(f"{describe(device)} torch {torch.__version__}", lambda: _measure_gpu(device))
        return _cached(f"{_cpu_name()} {threads} threads {numerics}", lambda: _measure_cpu(threads, numerics))
    except (KernelError, RuntimeError) as error:
        logger.warning("%s measure: %s; steps are shown without the machine's limits", FLAG, error)
        return None


def _configured(text: str) -> MachineLimits:
    try:
        gigabytes, gigaflops = (float(part) for part in text.split(","))
    except ValueError:
        gigabytes = gigaflops = math.nan
    if not (0 < gigabytes < math.inf and 0 < gigaflops < math.inf):
        raise ConfigError(f"{FLAG} expects off, measure, or GB/s,GFLOP/s such as 40,900; found {text!r:.64}", FLAG)
    return MachineLimits(gigabytes * 1e9, gigaflops * 1e9, "configured")


def _measure_cpu(threads: int, numerics: str) -> MachineLimits:
    from nvfp4_runtime.kernels.cpu.limits import measure_peak, measure_read_bandwidth, peak_kinds

    wanted = ("vnni", "fma") if numerics in ("w4a4", "w4a8") else ("bf16", "fma")
    kind = next(kind for kind in wanted if kind in peak_kinds())
    read, peak = measure_read_bandwidth(threads), measure_peak(kind, threads)
    return MachineLimits(read.median, peak.median, f"measured: {read.how}; {peak.how}, {threads} threads")


def _measure_gpu(device: torch.device) -> MachineLimits:
    source = torch.zeros(_GPU_BYTES // 4, device=device)
    a = torch.ones(_GPU_GEMM, _GPU_GEMM, device=device, dtype=torch.bfloat16)
    read = _GPU_BYTES / _best_seconds(lambda: source.sum(), device)
    flops = 2 * _GPU_GEMM**3 / _best_seconds(lambda: torch.mm(a, a), device)
    return MachineLimits(read, flops, f"measured: torch sum of 1 GiB; torch bf16 matmul of {_GPU_GEMM}^3")


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(6):  # the first ones warm up; the best is kept
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _cached(machine: str, measure: Callable[[], MachineLimits]) -> MachineLimits:
    """What was measured on a machine of this description, now or before. A cache that cannot be written is said."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = base / "nvfp4" / f"limits-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["machine"] == machine:
            return msgspec.convert(kept["limits"], MachineLimits)
    except FileNotFoundError:
        pass  # the first start here
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used and is made anew: %s", file.name, error)
    limits = measure()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"machine": machine, "limits": msgspec.to_builtins(limits)}), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        logger.warning("the machine's limits could not be kept: %s; they are measured at each start", error)
    return limits


def _cpu_name() -> str:
    """The processor's model as Linux names it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {named or platform.processor()} {os.cpu_count()} cores"
