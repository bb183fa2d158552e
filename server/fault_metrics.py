"""Prometheus metrics of what goes wrong: faults inside steps, answers that degenerate, engines that are replaced, and
how near the queue is to refusing."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nvfp4_runtime.engine.client import AsyncEngine

_LABELS = ("model_name", "engine")


class FaultMetrics(Collector):
    """Reads at each scrape what the engine has counted; see StepStats."""

    def __init__(self, registry: CollectorRegistry, labels: tuple[str, str], engine: AsyncEngine) -> None:
        self._labels = labels
        self._engine = engine
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine, stats = self._engine, self._engine.stats
        for name, text, count in (
            ("nvfp4_invalid_outputs", "Requests ended because logits were not numbers.", stats.num_invalid_outputs),
            ("nvfp4_step_faults", "Exceptions in steps; each ended a request or started over.", stats.num_faults),
            ("nvfp4_step_memory_faults", "Steps that did not get the memory they wanted.", stats.num_memory_faults),
            ("nvfp4_degenerate_outputs", "Requests whose answer went in circles.", stats.num_degenerate_outputs),
            ("nvfp4_engine_restarts", "Engine processes started after the first.", engine.num_restarts),
            ("nvfp4_engine_stalls", "Engine processes killed because they hung.", engine.num_stalls),
        ):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, count)
            yield counter
        queued = engine.admission.num_queued_tokens
        for name, text, value in (
            ("nvfp4_engine_up", "1 while the engine takes requests.", float(engine.alive)),
            ("nvfp4_queued_prompt_tokens", "Prompt tokens of requests that have not begun to answer.", queued),
            ("nvfp4_max_queued_prompt_tokens", "The bound of these.", engine.info.max_queued_tokens),
        ):
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
