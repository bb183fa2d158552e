"""Who connects while the model loads: probes are answered, everybody else waits until the server can answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvfp4_runtime.errors import EngineDeadError

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # connections; further ones stay in the kernel's queue
PEEK_BYTES = 4096  # a probe's whole head comes at once and is shorter
_LIVE = b"/health/live"
_NOT_READY = (b"/health", b"/health/ready", b"/ping")


class LoadingGate:
    """Takes connections on `socks`, which listen, until `hand_over` or `close`. Made and used within the event loop.

    A connection whose first bytes are a probe gets its answer: alive, and not ready. Of any other nothing is read.
    """

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socks = list(socks)
        self._new: set[socket.socket] = set()  # nothing came yet
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
        except OSError:  # it left before it was taken
            return
        sock.setblocking(False)
        self._new.add(sock)
        self._loop.add_reader(sock, self._look, sock)
        if len(self._new) + len(self._waiting) >= MAX_WAITING:
            for one in self._socks:
                self._loop.remove_reader(one)

    def _look(self, sock: socket.socket) -> None:
        """The first bytes have come: a probe is answered and its connection closed."""
        self._loop.remove_reader(sock)
        self._new.discard(sock)
        try:
            data = sock.recv(PEEK_BYTES, socket.MSG_PEEK)
            answer = _answer_to(data)
            if data and answer is None:
                self._waiting.append(sock)
                return
            if answer is not None:
                sock.recv(PEEK_BYTES)  # closing with bytes unread would reset the connection, and lose the answer
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
        from server.errors import describe  # the web stack is being imported in a thread

        _, body, _ = describe(EngineDeadError("the model is loading"))
        return _response(b"503 Service Unavailable", json.dumps(body).encode())
    return None


def _response(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(body))
    return head + b"connection: close\r\n\r\n" + body
