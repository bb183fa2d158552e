"""Prometheus metrics of several engines behind one server: which are in service, what each has to do, how well requests
find the engine that has their prefix. Absent where there is one engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nvfp4_runtime.engine.client import AsyncEngine


class _Router(Protocol):
    num_matched: int
    num_tokens: int


class _Replicas(Protocol):
    @property
    def engines(self) -> Sequence[AsyncEngine]: ...

    @property
    def router(self) -> _Router: ...


class ReplicaMetrics(Collector):
    """Reads at each scrape."""

    def __init__(self, registry: CollectorRegistry, model: str, replicas: _Replicas) -> None:
        self._model, self._replicas = model, replicas
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engines = self._replicas.engines
        for name, text, values in (
            ("nvfp4_replica_up", "1 while the engine takes requests.", [float(e.alive) for e in engines]),
            (
                "nvfp4_replica_requests",
                "Requests running or waiting in the engine.",
                [float(e.admission.num_requests) for e in engines],
            ),
            (
                "nvfp4_replica_kv_cache_usage",
                "Share of the engine's KV blocks that requests hold.",
                [e.stats.num_used_blocks / max(1, e.stats.num_total_blocks) for e in engines],
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("model_name", "replica"))
            for i, value in enumerate(values):
                gauge.add_metric((self._model, str(i)), value)
            yield gauge
        router = self._replicas.router
        for name, text, count in (
            ("nvfp4_routed_prompt_tokens", "Prompt tokens sent to engines.", router.num_tokens),
            (
                "nvfp4_routed_prefix_tokens",
                "Those of them that were sent to an engine that has had them before.",
                router.num_matched,
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=("model_name",))
            counter.add_metric((self._model,), count)
            yield counter
