"""Metrics of the engine's steps and of what it holds, read from its own totals whenever /metrics is asked for.

A step costs one assignment, one histogram entry and one row of the window here; the rest waits for the scrape.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nvfp4_runtime.engine.messages import EngineInfo, StepStats
from server.lean_histogram import LeanHistogram

WINDOW_SECONDS = 10.0
_STEP = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
# name, attribute of StepStats, text
TOTALS = (
    ("nvfp4_engine_steps", "num_steps", "Engine steps."),
    ("vllm:estimated_flops_per_gpu", "flops", "Floating-point operations of all steps, estimated from their shapes."),
    ("vllm:estimated_read_bytes_per_gpu", "bytes_read", "Bytes of weights and KV that all steps read, estimated."),
    ("vllm:estimated_write_bytes_per_gpu", "bytes_written", "Bytes of KV that all steps wrote, estimated."),
)


class EngineMetrics(Collector):
    """One engine's, under the labels of `Metrics`. `oldest_in_engine`: when the request that has been in the engine
    longest came, time.monotonic(), or None."""

    def __init__(
        self,
        labels: tuple[str, str],
        info: EngineInfo,
        registry: CollectorRegistry,
        oldest_in_engine: Callable[[], float | None],
    ) -> None:
        self._labels = labels
        self._info = info
        self._oldest_in_engine = oldest_in_engine
        self._stats = StepStats(0, 0, 0, 0, 0)  # of the last step
        self._oldest_waiting = 0.0
        self._last_step = time.monotonic()
        self._window: deque[tuple[float, StepStats]] = deque()
        names = dict(zip(("model_name", "engine"), labels, strict=True))
        self._durations = LeanHistogram(
            "nvfp4_step_duration_seconds", "Time of an engine step.", names, _STEP, registry
        )
        registry.register(self)
        ProcessCollector(registry=registry)
        ProcessCollector(namespace="nvfp4_engine", pid=lambda: self._info.pid or "self", registry=registry)

    def on_step(self, stats: StepStats) -> None:
        """After each engine step, and after aborts between steps, which carry no totals of steps."""
        self._oldest_waiting = stats.oldest_waiting
        if stats.num_steps == 0:
            return
        self._stats, self._last_step = stats, time.monotonic()
        self._durations.observe(stats.step_seconds)
        self._window.append((self._last_step, stats))
        self._forget()

    def describe(self) -> Iterator[Metric]:
        return iter(())  # names are checked by the scrape's own test; nothing is computed before the first

    def collect(self) -> Iterator[Metric]:
        """All families, from the totals of the last step."""
        for name, attribute, text in TOTALS:
            yield self._counter(name, text, {(): getattr(self._stats, attribute)})
        phases = {(phase,): seconds for phase, seconds in self._stats.phase_seconds.items()}
        yield self._counter("nvfp4_step_seconds", "Time of engine steps by phase.", phases, ("phase",))
        now = time.monotonic()
        age = now - self._oldest_waiting if self._oldest_waiting else 0.0
        yield self._gauge("nvfp4_queue_age_seconds", "How long the oldest waiting request has waited.", {(): age})
        yield self._gauge(
            "nvfp4_stall_seconds", "How long requests have been in the engine without a step.", {(): self._stall(now)}
        )
        scratch = {(purpose,): float(size) for purpose, size in self._info.scratch_bytes.items()}
        yield self._gauge(
            "nvfp4_scratch_bytes", "Bytes that steps hold beside weights and KV, as measured.", scratch, ("purpose",)
        )
        yield from self._kernels()
        yield from self._limits()

    def _kernels(self) -> Iterator[Metric]:
        sizes = {
            (group.name, group.stored, str(i)): float(group.num_bytes)
            for i, group in enumerate(self._info.layers)
            if group.num_bytes
        }
        yield self._gauge(
            "nvfp4_layer_weight_bytes",
            "Bytes of weights by line of the precision report.",
            sizes,
            ("layer", "stored", "line"),
        )
        backends = {
            (name, facts.get("isa", ""), facts.get("threads", ""), facts.get("status", "")): 1.0
            for name, facts in self._info.backends.items()
        }
        yield self._gauge(
            "nvfp4_backend_info",
            "Kernel backends and whether they can run.",
            backends,
            ("backend", "isa", "threads", "status"),
        )

    def _limits(self) -> Iterator[Metric]:
        """Only where --machine-limits gave any: there is nothing to compare with otherwise."""
        limits = self._info.limits
        if limits is None:
            return
        yield self._gauge(
            "nvfp4_machine_read_bytes_per_second",
            "What the machine's memory gives at best.",
            {(limits.how,): limits.read_bytes_per_second},
            ("how",),
        )
        yield self._gauge(
            "nvfp4_machine_flops_per_second",
            "What the machine computes at best.",
            {(limits.how,): limits.flops_per_second},
            ("how",),
        )
        busy, flops, num_bytes = self._recent()
        shares = {
            ("memory_bandwidth",): num_bytes / busy / limits.read_bytes_per_second if busy else 0.0,
            ("compute",): flops / busy / limits.flops_per_second if busy else 0.0,
        }
        yield self._gauge(
            "nvfp4_machine_utilization",
            f"Share of a machine limit that steps of the last {WINDOW_SECONDS:.0f} s reached while they ran.",
            shares,
            ("limit",),
        )

    def _recent(self) -> tuple[float, float, float]:
        """Seconds, operations and bytes of the window's steps."""
        self._forget()
        if len(self._window) < 2:
            return 0.0, 0.0, 0.0
        (_, first), (_, last) = self._window[0], self._window[-1]
        busy = sum(stats.step_seconds for _, stats in self._window) - first.step_seconds
        read = last.bytes_read + last.bytes_written - first.bytes_read - first.bytes_written
        return busy, max(0.0, last.flops - first.flops), max(0.0, read)

    def _forget(self) -> None:
        limit = time.monotonic() - WINDOW_SECONDS
        while self._window and self._window[0][0] < limit:
            self._window.popleft()

    def _stall(self, now: float) -> float:
        oldest = self._oldest_in_engine()
        return 0.0 if oldest is None else max(0.0, now - max(oldest, self._last_step))

    def _gauge(self, name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
        """`values` by the values of `labels`, as a tuple."""
        family = GaugeMetricFamily(name, text, labels=("model_name", "engine", *labels))
        for key, value in values.items():
            family.add_metric([*self._labels, *key], value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name", "engine", *labels))
        for key, value in values.items():
            family.add_metric([*self._labels, *key], value)
        return family
