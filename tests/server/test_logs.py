"""The log: one record a request, its numbers and never its text; JSON objects where machines read it."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from nvfp4_runtime.engine.logs import TEXT, JsonFormatter, TextFormatter
from tests.fakes import FakeEngine
from tests.server.conftest import Serve
from tests.server.test_disconnect import BODIES, Client, until

SECRET = "xyzzy-secret"


def formatted(record: logging.LogRecord, **constant: str) -> dict[str, object]:
    text = JsonFormatter(**constant).format(record)
    assert "\n" not in text
    return json.loads(text)


def access(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "server.access"]


def test_a_record_is_one_object_on_one_line() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "", 0, "two\nlines %s", ("é",), None)
    record.fields = {"request_id": "r1", "size": 3}
    record.created, record.msecs = 1_700_000_000.25, 250.0
    assert formatted(record, process="engine") == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "a.b",
        "message": "two\nlines é",
        "process": "engine",
        "request_id": "r1",
        "size": 3,
    }


def test_an_exception_is_a_field_of_its_record() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    assert str(formatted(record)["exception"]).endswith("ValueError: broken")


async def test_one_record_a_request_tells_lengths_times_and_reasons(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await serve(FakeEngine(num_cached_tokens=2), api_key_hashes=())
    headers = {"x-request-id": "mine", "authorization": f"Bearer {SECRET}"}
    await server.http.post(
        "/v1/completions", json={"prompt": SECRET, "max_tokens": 3, "n": 2, "user": SECRET}, headers=headers
    )
    (record,) = access(caplog)
    found = formatted(record)
    assert found["request_id"] == "mine"
    assert (found["method"], found["path"], found["status"]) == ("POST", "/v1/completions", 200)
    assert (found["prompt_tokens"], found["cached_tokens"], found["output_tokens"]) == (len(SECRET), 2, 6)
    assert found["finish_reasons"] == ["length", "length"]
    assert found["id"] == "cmpl-mine"
    assert found["model"] == "tiny"
    assert found["queue_seconds"] == 0
    assert found["ttft_seconds"] == pytest.approx(0.001, abs=1e-4)
    assert 0 < found["first_byte_seconds"] <= found["duration_seconds"]
    line = TextFormatter(TEXT).format(record)
    for text in (line, json.dumps(found)):
        assert SECRET not in text
        assert "Hello" not in text, "nor the answer"
    assert "prompt_tokens=12" in line
    assert "prompt_tokens=12" not in str(found["message"]), "once is enough"


async def test_a_refused_request_has_its_record_and_a_client_that_left_too(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await serve(FakeEngine(step_seconds=0.002))
    await server.complete(max_tokens=-1)
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True})
    await until(lambda: len(client.sent) > 3)
    client.left.set()
    await asyncio.wait_for(client.task, 30)
    refused, left = map(formatted, access(caplog))
    assert refused["status"] == 400
    assert "prompt_tokens" not in refused
    assert (left["outcome"], left["finish_reasons"]) == ("client gone", ["abort"])
    assert left["output_tokens"] > 0


async def test_probes_are_told_at_debug_only(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = await serve()
    for path in ("/health", "/ping", "/metrics", "/load"):
        await server.http.get(path)
    assert access(caplog) == []


async def test_nothing_is_told_of_requests_where_that_is_turned_off(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await serve(log_requests=False)
    await server.complete(max_tokens=1)
    assert access(caplog) == []


async def test_prompts_are_told_where_that_was_asked_for(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = await serve(log_prompts=True)
    await server.complete(prompt=f"{SECRET}\nmore", max_tokens=1)
    (record,) = access(caplog)
    assert formatted(record)["prompt"] == f"{SECRET}\nmore"
    assert "\n" not in TextFormatter(TEXT).format(record), "a prompt forges no line"


async def test_a_path_forges_no_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = await serve()
    await server.http.get("/a%0aINFO%20forged")
    (record,) = access(caplog)
    assert "\n" not in record.getMessage()
