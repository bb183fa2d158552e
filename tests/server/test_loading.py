"""Connections that come while the model loads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
import pytest
import uvicorn

from server.loading import LoadingGate


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, listener: socket.socket, data: bytes) -> Client:
        client = cls(*await asyncio.open_connection(*listener.getsockname()))
        client.writer.write(data)
        await client.writer.drain()
        return client

    async def rest(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.read()

    async def is_silent(self) -> bool:
        try:
            async with asyncio.timeout(0.1):
                return not await self.reader.read(1)
        except TimeoutError:
            return True


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()


async def echo_path(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await send({"type": "http.response.body", "body": scope["path"][:6].encode()})


@contextlib.asynccontextmanager
async def server_on(listener: socket.socket) -> AsyncIterator[uvicorn.Server]:
    server = uvicorn.Server(uvicorn.Config(echo_path, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    yield server
    server.should_exit = True
    await serving


async def test_probes_are_answered_and_others_wait_until_they_can_be(listener: socket.socket) -> None:
    gate = LoadingGate([listener])
    silent, early = await Client.of(listener, b""), await Client.of(listener, get("/early"))
    live = await (await Client.of(listener, get("/health/live"))).rest()
    assert live.startswith(b"HTTP/1.1 200 OK\r\n")
    for path in ("/health", "/health/ready?verbose", "/ping"):
        head, _, body = (await (await Client.of(listener, get(path))).rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert orjson.loads(body)["error"]["message"] == "the model is loading"
    assert await early.is_silent()
    gate.stop()
    late = await Client.of(listener, get("/later"))
    async with server_on(listener) as server:
        await gate.hand_over(server)
        assert (await early.rest()).endswith(b"\r\n\r\n/early")
        assert (await late.rest()).endswith(b"\r\n\r\n/later")
        silent.writer.write(get("/quiet"))
        assert (await silent.rest()).endswith(b"\r\n\r\n/quiet")


async def test_a_probe_in_pieces_waits_as_anybody_does(listener: socket.socket) -> None:
    gate = LoadingGate([listener])
    client = await Client.of(listener, get("/health/live")[:9])
    assert await client.is_silent()
    client.writer.write(get("/health/live")[9:])
    assert await client.is_silent()
    gate.stop()
    async with server_on(listener) as server:
        await gate.hand_over(server)
        assert (await client.rest()).endswith(b"\r\n\r\n/healt")


async def test_connections_that_nobody_will_serve_are_closed(listener: socket.socket) -> None:
    gate = LoadingGate([listener])
    waiting, gone = await Client.of(listener, get("/early")), await Client.of(listener, b"")
    gone.writer.close()
    assert await waiting.is_silent()
    gate.close()
    with pytest.raises(ConnectionResetError):  # what it sent was not read
        await waiting.rest()


async def test_no_more_connections_are_taken_than_may_wait(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.loading.MAX_WAITING", 2)
    gate = LoadingGate([listener])
    for _ in range(2):
        assert await (await Client.of(listener, get("/early"))).is_silent()
    beyond = await Client.of(listener, get("/health/live"))
    assert await beyond.is_silent()
    gate.stop()
    async with server_on(listener) as server:
        await gate.hand_over(server)
        assert (await beyond.rest()).startswith(b"HTTP/1.1 200")
