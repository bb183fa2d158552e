"""A server that does nothing but keep time: `python -m loadtest.traffic.clockwork PORT FIRST_SECONDS GAP_SECONDS LOG`.

It answers every chat request with `max_tokens` events, the first FIRST_SECONDS after the request arrived and the others
GAP_SECONDS apart, and writes down for each answer when it arrived and when each event was really handed to the system,
by the clock that all processes of the machine share. What a client says of an answer can be held against that.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import IO, cast

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_END = b"0\r\n\r\n"


def _chunk(payload: bytes) -> bytes:
    data = b"data: " + payload + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


class Clockwork(asyncio.Protocol):
    """One connection: requests in turn."""

    count = 0

    def __init__(self, first_seconds: float, gap_seconds: float, log: IO[str]) -> None:
        self._first, self._gap, self._log = first_seconds, gap_seconds, log
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET "):
            self._write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            self._received = body
            return
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        if len(body) >= length:
            self._received = b""
            Clockwork.count += 1
            _Answer(self, f"clock-{Clockwork.count}", json.loads(body)["max_tokens"], now).start()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None


class _Answer:
    """The events of one answer, each when it is due."""

    def __init__(self, connection: Clockwork, answer_id: str, num_tokens: int, arrived: float) -> None:
        self._connection, self._id, self._left, self._arrived = connection, answer_id, num_tokens, arrived
        self._num_tokens = num_tokens
        self._stamps: list[float] = []
        event = {"id": answer_id, "choices": [{"index": 0, "delta": {"content": "x"}}]}
        self._event = _chunk(json.dumps(event).encode())

    def start(self) -> None:
        self._connection._write(_HEAD)
        self._at(self._arrived + self._connection._first)

    def _at(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(due - time.perf_counter(), self._send, due)

    def _send(self, due: float) -> None:
        connection = self._connection
        if connection._transport is None:
            return  # the client left
        self._stamps.append(time.perf_counter())
        connection._write(self._event)
        self._left -= 1
        if self._left:
            self._at(due + connection._gap)
            return
        usage = {"prompt_tokens": 1, "completion_tokens": self._num_tokens}
        last = {"id": self._id, "choices": [], "usage": usage}
        record = {"id": self._id, "arrived": self._arrived, "stamps": self._stamps}
        connection._log.write(json.dumps(record) + "\n")  # first: whoever has the last answer may end us
        connection._write(_chunk(json.dumps(last).encode()) + _chunk(b"[DONE]") + _END)


async def _serve(port: int, first_seconds: float, gap_seconds: float, log: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Clockwork(first_seconds, gap_seconds, log), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


def main() -> None:
    port, first, gap, file = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    with file.open("w", buffering=1, encoding="utf-8") as log:
        asyncio.run(_serve(port, first, gap, log))


if __name__ == "__main__":
    main()
