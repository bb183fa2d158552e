"""A client that costs little: non-blocking sockets, one epoll, answers counted and not parsed.

It shares the cores with the server it measures, so every microsecond it spends is one the server may lack.
"""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass, field

DONE = b"data: [DONE]\n\n"
END_OF_HEAD = b"\r\n\r\n"
RECEIVE_BYTES = 1 << 16
QUIET_SECONDS = 60.0


@dataclass
class _Connection:
    sock: socket.socket
    tail: bytes = b""
    num_events: int = 0
    first_event: float | None = None
    requests_left: int = 0
    buffer: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class StreamRun:
    """What came back from N streams together.

    seconds      from the first byte sent to the last stream's end
    num_events   server-sent events with a choice, [DONE] excluded
    first_ms     from the start to each stream's first event, sorted
    """

    seconds: float
    num_events: int
    first_ms: list[float]


def request_bytes(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def run_streams(port: int, request: bytes, num_streams: int) -> StreamRun:
    """Send `request` on `num_streams` new connections at once and read every stream to its [DONE].

    Raises RuntimeError when the server answers with an error, closes early, or says nothing for a minute.
    """
    with selectors.DefaultSelector() as selector:
        connections = [_connect(port) for _ in range(num_streams)]
        started = time.perf_counter()
        for connection in connections:
            selector.register(connection.sock, selectors.EVENT_READ, connection)
            connection.sock.setblocking(True)
            connection.sock.sendall(request)
            connection.sock.setblocking(False)
        running = num_streams
        while running:
            ready = selector.select(QUIET_SECONDS)
            if not ready:
                raise RuntimeError(f"{running} of {num_streams} streams said nothing for {QUIET_SECONDS:.0f} s")
            for key, _ in ready:
                connection = key.data
                data = connection.sock.recv(RECEIVE_BYTES)
                if not data:
                    raise RuntimeError(f"a stream was closed before its end: ...{connection.tail[-300:]!r}")
                if connection.first_event is None:
                    _check_status(data)
                    if b"data: " in data:
                        connection.first_event = time.perf_counter() - started
                # events are counted by their frame; one cut in two by the read is found in the joined tail
                joined = connection.tail + data
                connection.num_events += joined.count(b"\n\n") - connection.tail.count(b"\n\n")
                connection.tail = joined[-64:]
                if DONE in connection.tail:
                    selector.unregister(connection.sock)
                    connection.sock.close()
                    running -= 1
        seconds = time.perf_counter() - started
    first = sorted(1000 * (c.first_event or 0.0) for c in connections)
    return StreamRun(seconds, sum(c.num_events for c in connections) - num_streams, first)


def run_requests(port: int, request: bytes, num_connections: int, num_requests: int) -> list[float]:
    """`num_requests` unstreamed requests over kept-alive connections, each sending its next when answered.

    Returns the seconds at which each answer was complete, from the start. Raises RuntimeError as `run_streams`.
    """
    finished: list[float] = []
    with selectors.DefaultSelector() as selector:
        connections = [_connect(port) for _ in range(num_connections)]
        started = time.perf_counter()
        left = num_requests
        for connection in connections[:num_requests]:
            selector.register(connection.sock, selectors.EVENT_READ, connection)
            connection.sock.sendall(request)
            left -= 1
        while len(finished) < num_requests:
            ready = selector.select(QUIET_SECONDS)
            if not ready:
                raise RuntimeError(f"{num_requests - len(finished)} requests were not answered")
            for key, _ in ready:
                connection = key.data
                data = connection.sock.recv(RECEIVE_BYTES)
                if not data:
                    raise RuntimeError("a connection was closed with a request unanswered")
                connection.buffer += data
                if not _is_whole(connection.buffer):
                    continue
                finished.append(time.perf_counter() - started)
                connection.buffer.clear()
                if left:
                    left -= 1
                    connection.sock.sendall(request)
        for connection in connections:
            connection.sock.close()
    return finished


def _connect(port: int) -> _Connection:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _Connection(sock)


def _check_status(data: bytes) -> None:
    if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(data[:500].decode(errors="replace"))


def _is_whole(answer: bytearray) -> bool:
    head, separator, body = answer.partition(END_OF_HEAD)
    if not separator:
        return False
    _check_status(bytes(answer[:500]))
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    raise RuntimeError(f"an answer without content-length: {bytes(head)!r}")
