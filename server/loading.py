"""Who connects while the model loads: probes are answered, everybody else waits until the server can answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import select
import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from nvfp4_runtime.errors import EngineDeadError

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # connections that have sent something
MAX_SILENT = 256  # and those that have not
RETRY_SECONDS = 10.0
PEEK_BYTES = 4096  # a probe's whole head comes at once and is shorter
_LIVE = b"/health/live"
_NOT_READY = (b"/health", b"/health/ready", b"/ping")


class LoadingGate:
    """Takes connections on `socks`, which listen, until `hand_over` or `close`. Made and used within the event loop.

    A connection whose first bytes are a probe gets its answer: alive, and not ready. Of any other nothing is read; it
    waits, and when MAX_WAITING do, those that came later are told to come back. Of those that send nothing the oldest
    makes room for the next. So there is always room for a probe, whoever else comes.
    """

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socks = list(socks)
        self._new: dict[socket.socket, None] = {}  # nothing came yet; in order of arrival
        self._waiting: list[socket.socket] = []
        for sock in self._socks:
            sock.setblocking(False)
            self._loop.add_reader(sock, self._accept, sock)

    def stop(self) -> None:
        """Take no more; the sockets can be given to the server."""
        for sock in (*self._socks, *self._new):
            self._loop.remove_reader(sock)
        self._waiting += self._new
        self._socks.clear()
        self._new.clear()

    async def hand_over(self, server: uvicorn.Server) -> None:
        """Let `server`, which has started, serve those that wait."""
        self.stop()
        config = server.config
        for sock in self._waiting:
            with contextlib.suppress(OSError):  # it is gone
                await self._loop.connect_accepted_socket(
                    lambda: config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn's own startup calls it
                        config=config, server_state=server.server_state, app_state=server.lifespan.state
                    ),
                    sock,
                )
        self._waiting.clear()

    def close(self) -> None:
        """Nobody will serve those that wait."""
        self.stop()
        for sock in self._waiting:
            sock.close()
        self._waiting.clear()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # else it left before it was taken
                self._make_room()
            return
        sock.setblocking(False)
        self._new[sock] = None
        self._loop.add_reader(sock, self._look, sock)
        if len(self._new) > MAX_SILENT:
            self._make_room()

    def _make_room(self) -> None:
        """End a connection, the one that is least of a loss."""
        if self._new:
            sock = next(iter(self._new))
            del self._new[sock]
            self._loop.remove_reader(sock)
            sock.close()
        elif self._waiting:
            self._refuse(self._waiting.pop())

    def _look(self, sock: socket.socket) -> None:
        """The first bytes have come: a probe is answered and its connection closed."""
        self._loop.remove_reader(sock)
        del self._new[sock]
        try:
            data = sock.recv(PEEK_BYTES, socket.MSG_PEEK)
        except OSError as error:
            logger.debug("a connection ended while the model loads: %s", error)
            data = b""
        if not data:
            sock.close()
        elif (answer := _answer_to(data)) is not None:
            _send_last(sock, answer)
        elif self._has_room():
            self._waiting.append(sock)
        else:
            self._refuse(sock)

    def _has_room(self) -> bool:
        """Whether one more may wait, those whose clients left not counted."""
        if len(self._waiting) >= MAX_WAITING:
            gone = _closed_by_client(self._waiting)
            self._waiting = [sock for sock in self._waiting if sock not in gone]
            for sock in gone:
                sock.close()
        return len(self._waiting) < MAX_WAITING

    def _refuse(self, sock: socket.socket) -> None:
        _send_last(sock, _unavailable("the model is loading, and many wait for it already", RETRY_SECONDS))


def _closed_by_client(socks: Sequence[socket.socket]) -> set[socket.socket]:
    """Those that nothing more will come from; what has come may still lie there, so reading would not tell."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLRDHUP)
    ended = {file for file, _ in poll.poll(0)}
    return {sock for sock in socks if sock.fileno() in ended}


def _send_last(sock: socket.socket, answer: bytes) -> None:
    """Answer and close. What is not read of a request would reset the connection, and lose the answer."""
    try:
        sock.recv(PEEK_BYTES)
        sock.send(answer)
    except OSError as error:
        logger.debug("a connection ended while the model loads: %s", error)
    sock.close()


def _answer_to(data: bytes) -> bytes | None:
    """What to answer to a connection that begins with `data`; None unless that is a probe's whole head."""
    head, end, _ = data.partition(b"\r\n\r\n")
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if not end or method != b"GET":
        return None
    if path == _LIVE:
        return _response(b"200 OK", b'{"status":"live"}')
    if path in _NOT_READY:
        return _unavailable("the model is loading")
    return None


def _unavailable(reason: str, retry_after_seconds: float | None = None) -> bytes:
    from server.errors import describe  # the web stack is being imported in a thread

    _, body, headers = describe(EngineDeadError(reason, retry_after_seconds))
    return _response(b"503 Service Unavailable", json.dumps(body).encode(), headers)


def _response(status: bytes, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    given = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, lines.encode(), body)
