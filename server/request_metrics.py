"""Metrics of HTTP requests, from their records; http_ names as vLLM has them of prometheus-fastapi-instrumentator."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.request_log import is_probe
from server.request_record import RequestRecord

_SECONDS = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
# Any other is a stranger's word: a label for each would let strangers make series.
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})
NO_HANDLER = "none"  # what no route answered: paths are strangers' words and no labels


class RequestMetrics:
    """`labels` are the model's name and the engine's number; `token_buckets` bound token counts."""

    def __init__(self, labels: tuple[str, str], token_buckets: Sequence[int], registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests",
            "HTTP requests by route, method and class of status.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._responses = Counter(
            "nvfp4_http_responses",
            "HTTP answers by exact status; 499: the client left before there was one.",
            ("code",),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From an HTTP request's head to its answer's last byte.",
            ("handler", "method"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._max_tokens = Histogram(
            "vllm:request_max_num_generation_tokens",
            "Generated tokens of each HTTP request's longest choice.",
            ("model_name", "engine"),
            buckets=list(token_buckets),
            registry=registry,
        ).labels(*labels)

    def ended(self, record: RequestRecord) -> None:
        """A request is over. Probes and scrapes are not counted, as the instrumentator leaves them out."""
        if is_probe(record.path):
            return
        status = record.status or 499
        handler = record.handler or NO_HANDLER
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._responses.labels(str(status)).inc()
        self._seconds.labels(handler, method).observe(record.seconds)
        if counts := [choice.num_tokens for choice in record.choices]:
            self._max_tokens.observe(max(counts))
