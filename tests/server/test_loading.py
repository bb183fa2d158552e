"""Connections that come while the model loads."""

from __future__ import annotations

import asyncio
import contextlib
import resource
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


async def test_beyond_those_that_may_wait_others_are_told_to_come_back_and_probes_are_answered(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.loading.MAX_WAITING", 2)
    gate = LoadingGate([listener])
    waiting = [await Client.of(listener, get("/early")) for _ in range(2)]
    head, _, body = (await (await Client.of(listener, get("/late"))).rest()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 10" in head
    assert orjson.loads(body)["error"]["message"].startswith("the model is loading")
    live = await (await Client.of(listener, get("/health/live"))).rest()
    assert live.startswith(b"HTTP/1.1 200 ")
    waiting[0].writer.close()  # it had enough: its place is free
    await waiting[0].writer.wait_closed()
    next_one = await Client.of(listener, get("/next"))
    assert await next_one.is_silent()
    gate.stop()
    async with server_on(listener) as server:
        await gate.hand_over(server)
        assert (await waiting[1].rest()).endswith(b"\r\n\r\n/early")
        assert (await next_one.rest()).endswith(b"\r\n\r\n/next")


async def test_connections_that_send_nothing_make_room_for_those_that_do(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.loading.MAX_SILENT", 2)
    gate = LoadingGate([listener])
    silent = [await Client.of(listener, b"") for _ in range(5)]
    live = await (await Client.of(listener, get("/health/live"))).rest()
    assert live.startswith(b"HTTP/1.1 200 ")
    assert [await client.rest() for client in silent[:3]] == [b""] * 3
    assert all([await client.is_silent() for client in silent[4:]])
    gate.close()


async def test_probes_are_answered_when_no_more_files_may_be_open(listener: socket.socket) -> None:
    gate = LoadingGate([listener])
    waiting = [await Client.of(listener, get("/early")) for _ in range(5)]
    assert await waiting[-1].is_silent()
    sock = socket.socket()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, limits[1]))
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
        probe = get("/health/live")
        await asyncio.get_running_loop().sock_sendall(sock, probe)
        async with asyncio.timeout(5):
            assert (await asyncio.get_running_loop().sock_recv(sock, 100)).startswith(b"HTTP/1.1 200 ")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        sock.close()
    gate.close()
