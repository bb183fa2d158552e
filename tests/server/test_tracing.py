"""Traces: what spans say, whose children they are, how they leave, and that nothing is imported without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from nvfp4_runtime.errors import ConfigError
from server.app import create_app
from server.config import ServerConfig, traces_wanted
from server.tracing import Tracer, otlp_exporter
from tests.fakes import FakeEngine
from tests.server.conftest import TEXT

export = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="the extra otel is not installed"
)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACES_ENDPOINT", "ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)


class Traced:
    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.exporter = export.InMemorySpanExporter()
        self.tracer = Tracer(self.exporter, at_once=True)
        app = create_app(engine or FakeEngine(), TEXT, ServerConfig(served_model_names=("tiny",)), self.tracer)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://test"
        )

    async def post(self, path: str, **options: object) -> httpx.Response:
        return await self.http.post(path, **options)  # type: ignore[arg-type]

    def spans(self) -> dict[str, object]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


BODY = {"prompt": "plugh secret", "max_tokens": 5, "temperature": 0.5}


async def test_a_request_is_a_span_with_queue_prefill_and_decode_below_it() -> None:
    traced = Traced()
    await traced.post("/v1/completions", json=BODY)
    spans = traced.spans()
    assert set(spans) == {"text_completion tiny", "queue", "prefill", "decode"}
    parent = spans["text_completion tiny"]
    assert parent.parent is None
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == parent.context.span_id
        assert parent.start_time <= spans[name].start_time + 10_000_000
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert spans["prefill"].end_time - spans["prefill"].start_time == pytest.approx(1e6, abs=1e3)  # the fake's 1 ms


async def test_attributes_are_the_conventions_and_never_text() -> None:
    traced = Traced()
    response = await traced.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
    span = traced.spans()["text_completion tiny"]
    found = dict(span.attributes)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == "tiny"
    assert found["gen_ai.response.id"] == response.json()["id"]
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (len(BODY["prompt"]), 5)
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (5, 0.5)
    assert found["gen_ai.latency.time_to_first_token"] == pytest.approx(0.001, abs=1e-4)
    assert (found["http.route"], found["http.response.status_code"]) == ("/v1/completions", 200)
    assert found["nvfp4.request_id"] == "mine"
    assert span.kind.name == "SERVER"
    assert "plugh" not in repr([each.to_json() for each in traced.exporter.get_finished_spans()])


async def test_the_clients_span_is_the_parent_and_ours_is_told_back() -> None:
    traced = Traced()
    response = await traced.post("/v1/completions", json=BODY, headers={"traceparent": PARENT, "tracestate": "a=b"})
    span = traced.spans()["text_completion tiny"]
    _, trace_id, span_id, flags = PARENT.split("-")
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == span_id
    assert span.context.trace_state.get("a") == "b"
    assert response.headers["traceresponse"] == f"00-{trace_id}-{span.context.span_id:016x}-{flags}"


@pytest.mark.parametrize("value", ["", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000])
async def test_a_broken_traceparent_starts_a_trace_of_its_own(value: str) -> None:
    traced = Traced()
    response = await traced.post("/v1/completions", json=BODY, headers={"traceparent": value})
    assert response.status_code == 200
    assert traced.spans()["text_completion tiny"].parent is None


async def test_a_client_that_does_not_sample_is_not_sampled() -> None:
    traced = Traced()
    response = await traced.post("/v1/completions", json=BODY, headers={"traceparent": PARENT[:-1] + "0"})
    assert traced.spans() == {}
    assert response.headers["traceresponse"].endswith("-00")


async def test_streams_and_stop_strings_have_all_parts_and_probes_have_no_span() -> None:
    traced = Traced()
    await traced.post("/v1/completions", json=BODY | {"max_tokens": 39, "stop": "world", "stream": True})
    await traced.http.get("/health")
    await traced.http.get("/metrics")
    assert sorted(traced.spans()) == ["decode", "prefill", "queue", "text_completion tiny"]
    assert len(traced.exporter.get_finished_spans()) == 4


async def test_an_error_is_marked() -> None:
    engine = FakeEngine()
    engine.die()
    traced = Traced(engine)
    assert (await traced.post("/v1/completions", json=BODY)).status_code == 503
    span = traced.spans()["text_completion tiny"]
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["http.response.status_code"] == 503


class Receiver(BaseHTTPRequestHandler):
    got: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.got.append((self.path, self.headers["content-type"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    got: list[tuple[str, str, bytes]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Receiver,), {"got": got}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


async def test_spans_reach_an_otlp_receiver_by_flag(receiver: tuple[str, list[tuple[str, str, bytes]]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, got = receiver
    traced = Traced()
    traced.tracer = Tracer(otlp_exporter(f"{url}/v1/traces"))
    app = create_app(FakeEngine(), TEXT, ServerConfig(served_model_names=("tiny",)), traced.tracer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
        await http.post("/v1/completions", json=BODY)
    traced.tracer.close()
    ((path, kind, body),) = got
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    facts = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert facts["service.name"] == "nvfp4"
    assert {span.name for span in resource.scope_spans[0].spans} >= {"text_completion tiny", "decode"}


def test_opentelemetrys_own_variables_are_followed(
    receiver: tuple[str, list[tuple[str, str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from server.request_record import RequestRecord

    url, got = receiver
    assert not traces_wanted()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    assert traces_wanted()
    tracer = Tracer(otlp_exporter(None))
    record = RequestRecord("r", "GET", "/v1/models", 1.0, handler="/v1/models", status=200)
    tracer.begin(record, []).ended(record)
    tracer.close()
    ((path, _, body),) = got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    facts = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert facts["service.name"] == "ours"
    assert resource.scope_spans[0].spans[0].name == "GET /v1/models"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not traces_wanted()


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'nvfp4-runtime\[otel\]'") as caught:
        otlp_exporter("http://127.0.0.1:4318/v1/traces")
    assert caught.value.flag == "--otlp-traces-endpoint"


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="expects a URL"):
        otlp_exporter("localhost:4317")
