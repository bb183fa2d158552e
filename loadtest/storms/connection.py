"""One HTTP/1.1 connection that can also behave badly: every byte sent is the caller's, and so is the way it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: close sends RST
GONE = (ConnectionError, asyncio.IncompleteReadError, TimeoutError)  # how an answer fails to come


@dataclass(frozen=True)
class Reply:
    """A whole answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        lines = self.body.decode().split("\n")
        return [line[len("data: ") :] for line in lines if line.startswith("data: ")]

    @property
    def ended_well(self) -> bool:
        """A stream with [DONE] and without an error event, or any other 200."""
        if self.status != 200 or "event-stream" not in self.headers.get("content-type", ""):
            return self.status == 200
        events = self.events
        return events[-1:] == ["[DONE]"] and not any(event.startswith('{"error"') for event in events)


def head(method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A request's line and headers, the empty line included."""
    fields = {"host": "storm"} | dict(headers or {})
    return "".join([f"{method} {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in fields.items()), "\r\n"]).encode()


def post(path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request with a body of JSON."""
    payload = json.dumps(body).encode()
    framed = {"content-type": "application/json", "content-length": str(len(payload))} | dict(headers or {})
    return head("POST", path, framed) + payload


class Connection:
    """To 127.0.0.1. `reply` raises ConnectionError or IncompleteReadError where no whole answer comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def end_of_input(self) -> None:
        """Half-close: nothing more will be sent, answers are still read."""
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()

    async def reply(self) -> Reply:
        """The next whole answer."""
        status, headers = await self.reply_head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return Reply(status, headers, body)

    async def reply_head(self) -> tuple[int, dict[str, str]]:
        """An answer's status and headers; its body is not read."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}


async def ask(port: int, request: bytes, seconds: float = 60.0) -> Reply:
    """Send `request` on a connection of its own and read its answer. TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        connection = await Connection.open(port)
        try:
            await connection.send(request)
            return await connection.reply()
        finally:
            connection.close()
