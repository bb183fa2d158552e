"""Seconds per call. On a GPU all calls are captured into one CUDA graph, as a decode step is, and it is replayed.

A call's time therefore includes the gap between launches inside a graph and excludes Python. Calls should walk distinct
memory (Setting.copies): what fits into the L2 cache would be timed there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from nvfp4_runtime.kernels.gpu_bench.setting import Setting

Call = Callable[[], object]


def seconds_per_call(calls: Sequence[Call], setting: Setting) -> float:
    """Median over rounds of the time of all `calls`, one after the other, divided by their number."""
    run = _replayed(calls, setting) if setting.device == "cuda" else _plain(calls)
    times = [run()]
    rounds = 1 if setting.tiny else max(3, min(200, int(setting.seconds / max(times[0], 1e-6))))
    times = [run() for _ in range(rounds)]
    return statistics.median(times) / len(calls)


def _plain(calls: Sequence[Call]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    return run


def _replayed(calls: Sequence[Call], setting: Setting) -> Callable[[], float]:
    stream = torch.cuda.Stream(setting.place)  # type: ignore[no-untyped-call]  # PyTorch's
    stream.wait_stream(torch.cuda.current_stream(setting.place))  # what the calls read was made there
    with torch.cuda.stream(stream):  # kernels are compiled and buffers exist before the capture
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # PyTorch's

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    run()
    return run
