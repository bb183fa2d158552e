"""OpenTelemetry traces, off unless asked for: a span per request, with queue, prefill and decode below it.

Attributes follow the semantic conventions for HTTP servers and generative AI, and vLLM's names for latencies; they are
never a prompt, an answer or a key. The packages (the extra `otel`) are imported only where traces are on. They read the
standard OTEL_ variables themselves: service name, resource, sampler, headers, batching, propagators.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nvfp4_runtime import __version__
from nvfp4_runtime.errors import ConfigError
from server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

FLAG = "--otlp-traces-endpoint"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def otlp_exporter(endpoint: str | None) -> SpanExporter:
    """Spans as OTLP over HTTP, protobuf: to `endpoint`, or where OTEL_EXPORTER_OTLP_ variables say.

    Raises ConfigError without the packages, and for an endpoint that is no HTTP URL.
    """
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"{FLAG} expects a URL such as http://127.0.0.1:4318/v1/traces, found {endpoint[:200]!r}", FLAG
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"traces need OpenTelemetry's SDK and OTLP exporter ({error}): pip install 'nvfp4-runtime[otel]'", FLAG
        ) from error
    return OTLPSpanExporter(endpoint=endpoint)


class Tracer:
    """Opens a span for each request and sends it when the request is over.

    at_once  each span leaves as it ends instead of in batches from a thread: for tests
    """

    def __init__(self, exporter: SpanExporter, at_once: bool = False) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        ours = Resource({SERVICE_NAME: "nvfp4", SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=Resource.create().merge(ours).merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nvfp4", __version__)
        self._extract = propagate.extract  # by OTEL_PROPAGATORS; W3C's where it is not set
        self._kind = trace.SpanKind.SERVER

    def begin(self, record: RequestRecord, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """A span below the client's, if its headers carry one (W3C traceparent and tracestate)."""
        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers}
        offset = time.time_ns() - int(record.started * 1e9)
        span = self._tracer.start_span(
            f"{record.method} {record.path}"[:200],
            context=self._extract(carrier),
            kind=self._kind,
            start_time=offset + int(record.started * 1e9),
        )
        return RequestSpan(self._tracer, span, offset)

    def close(self) -> None:
        """Send what is left. May take as long as OTEL_BSP_EXPORT_TIMEOUT."""
        self._provider.shutdown()


class RequestSpan:
    """A request's span while it runs. `offset`: from time.monotonic() in ns to Unix time in ns."""

    def __init__(self, tracer: Any, span: Span, offset: int) -> None:
        self._tracer = tracer
        self._span = span
        self._offset = offset

    @property
    def traceresponse(self) -> str:
        """The span's identity as W3C's response header has it: version-trace-span-flags."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def ended(self, record: RequestRecord) -> None:
        """The request is over: say what is known of it, and when its parts were."""
        from opentelemetry.trace import Status, StatusCode

        operation = _OPERATIONS.get(record.handler)
        if operation is not None and record.model:
            self._span.update_name(f"{operation} {record.model}")
        elif record.handler:
            self._span.update_name(f"{record.method} {record.handler}")
        self._span.set_attributes(_http(record) | (_gen_ai(record, operation) if operation is not None else {}))
        if record.status >= 500 or record.status == 0 or "error" in record.finish_reasons:
            self._span.set_status(Status(StatusCode.ERROR))
        self._parts(record)
        self._span.end(self._at(record.started + record.seconds))

    def _parts(self, record: RequestRecord) -> None:
        times = record.times
        if times is None:
            return
        last = times.finished or record.started + record.seconds  # a stop string ended it, or its client left
        parts = (
            ("queue", times.arrival, times.scheduled),
            ("prefill", times.scheduled, times.first_token),
            ("decode", times.first_token, last),
        )
        for name, start, stop in parts:
            part = self._tracer.start_span(name, context=_below(self._span), start_time=self._at(start))
            part.end(self._at(max(start, stop)))

    def _at(self, seconds: float) -> int:
        return self._offset + int(seconds * 1e9)


def _below(span: Span) -> Any:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


def _http(record: RequestRecord) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "url.path": record.path[:200],
        "nvfp4.request_id": record.request_id,
    }
    if record.handler:
        found["http.route"] = record.handler
    if record.status:
        found["http.response.status_code"] = record.status
    if record.outcome:
        found["error.type"] = record.outcome.replace(" ", "_")
    return found


def _gen_ai(record: RequestRecord, operation: str) -> dict[str, Any]:
    found: dict[str, Any] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "nvfp4"}
    if record.model:
        found |= {"gen_ai.request.model": record.model, "gen_ai.response.model": record.model}
        found["gen_ai.response.id"] = record.answer_id
    if not record.choices:
        return found
    params = record.choices[0].job.params
    found |= {
        "gen_ai.request.choice.count": len(record.choices),
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.response.finish_reasons": record.finish_reasons,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if (times := record.times) is not None:
        found["gen_ai.latency.time_in_queue"] = times.scheduled - times.arrival
        found["gen_ai.latency.time_in_model_prefill"] = times.first_token - times.scheduled
        found["gen_ai.latency.time_to_first_token"] = times.first_token - times.arrival
        found["gen_ai.latency.e2e"] = record.seconds
    return found
