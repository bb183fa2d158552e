"""Clients that leave: their requests end in the engine, whatever state they are in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.conftest import Serve, Served


class Client:
    """One request, spoken in ASGI, that can leave and can stop reading."""

    def __init__(self, server: Served, path: str, body: dict[str, Any]) -> None:
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.sent: list[dict[str, Any]] = []
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "scheme": "http", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 2),
        }  # fmt: skip
        self.task = asyncio.create_task(server.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.sent.append(message)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):  # to end a test that hangs; a loaded machine takes its time
        while not condition():
            await asyncio.sleep(0.001)


BODIES = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 200},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200},
}


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}])
async def test_leaving_while_tokens_flow_aborts_every_choice(serve: Serve, path: str, options: dict[str, Any]) -> None:
    server = await serve(FakeEngine(step_seconds=0.002))
    client = Client(server, path, BODIES[path] | options)
    choices = options.get("n", 1)
    await until(lambda: server.engine.stats.num_steps > 20)
    client.left.set()
    await until(lambda: server.engine.running == 0)
    assert len(server.engine.aborted) == choices
    await asyncio.wait_for(client.task, 30)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_aborts(serve: Serve, stream: bool) -> None:
    server = await serve()
    server.engine.gate.clear()
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": stream, "n": 2})
    await until(lambda: server.engine.running == 2)
    client.left.set()
    await until(lambda: server.engine.running == 0)
    await asyncio.wait_for(client.task, 30)
    assert client.sent == [], "there is nobody to answer"


async def test_client_that_stops_reading_is_aborted_and_does_not_hold_up_others(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.001), slow_client_seconds=0.2)
    slow = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True})
    await until(lambda: len(slow.sent) > 3)
    slow.reading.clear()
    other = await server.complete(max_tokens=5)
    assert other.status_code == 200
    await asyncio.wait_for(asyncio.gather(slow.task, return_exceptions=True), 30)
    assert server.engine.running == 0


async def test_cancelled_server_task_aborts_too(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.002))
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True})
    await until(lambda: len(client.sent) > 3)
    client.task.cancel()
    await until(lambda: server.engine.running == 0)


async def test_request_that_finished_is_not_aborted(serve: Serve) -> None:
    server = await serve()
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"max_tokens": 3, "stream": True})
    await asyncio.wait_for(client.task, 30)
    assert server.engine.aborted == []
    assert client.sent[-1]["body"].endswith(b"data: [DONE]\n\n")
