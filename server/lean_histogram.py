"""A Prometheus histogram for what is observed once per token: a bisection and two additions, no locks.

prometheus_client's own takes several microseconds an observation, for threads that we do not have: everything here is
observed and read on the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class LeanHistogram(Collector):
    """One series. `labels` are its label names and values; `bounds` rise, and +Inf is added."""

    def __init__(
        self, name: str, text: str, labels: Mapping[str, str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, dict(labels)
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """`value`, as often as `times` says."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._text, labels=list(self._labels))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        cumulative, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            cumulative += count
            bound_text = floatToGoString(bound)  # type: ignore[no-untyped-call]  # prometheus_client did not annotate it
            buckets.append((bound_text, float(cumulative)))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
