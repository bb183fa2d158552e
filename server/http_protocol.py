"""uvicorn's HTTP protocol with bounds on what a connection may send and how long it may take.

uvicorn bounds neither a request's headers (with httptools) nor the time they take, so a client could fill the memory
with one header, or hold connections open for ever with a byte now and then. The middleware bounds bodies that somebody
reads (413, 408); those that nobody reads end here, with their connection.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, ClassVar, cast

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.config import ServerConfig
from server.errors import status_body
from server.request_record import Observer, RequestRecord

BODY_GRACE_SECONDS = 5.0  # for the middleware's 408 to come first
LINGER_SECONDS = 1.0  # a connection closed while its client still writes is reset, and the answer lost with it
_VERSIONS = ("1.0", "1.1")  # the parser also takes 0.9 and 2.0, whose answers look otherwise
ARRIVED = "nvfp4.arrived"  # in the scope: time.monotonic() at the request's first byte
_FIELD_OVERHEAD = 4  # ": " and the line's end


class Phase(Enum):
    IDLE = auto()  # no byte of a request has come
    HEAD = auto()
    BODY = auto()


class BoundedProtocol(HttpToolsProtocol):
    """431 for too long a head, 408 for too slow a one, an OpenAI error object for what is no HTTP."""

    max_header_bytes: ClassVar[int]
    max_body_bytes: ClassVar[int]
    header_seconds: ClassVar[float]
    body_seconds: ClassVar[float]
    observers: ClassVar[Sequence[Observer]]

    @classmethod
    def within(cls, config: ServerConfig, observers: Sequence[Observer] = ()) -> type[BoundedProtocol]:
        """The protocol with the bounds of `config`; its refusals are told to `observers`, as the middleware's are."""
        names = ("max_header_bytes", "max_body_bytes", "header_seconds", "body_seconds")
        bounds = {name: getattr(config, name) for name in names}
        return type("BoundedProtocol", (cls,), {**bounds, "observers": tuple(observers)})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase = Phase.IDLE
        self._head_bytes = 0  # of this request, trailers included
        self._body_bytes = 0
        self._unparsed_bytes = 0  # since the parser last made something of them
        self._parsed = False
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None

    # -- what comes in -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._arm(self.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._timer is None:
            self._arm(self.header_seconds)
        self._parsed = False
        super().data_received(data)
        # A field or trailer without an end grows inside the parser, which says nothing of it until it ends.
        self._unparsed_bytes = 0 if self._parsed else self._unparsed_bytes + len(data)
        if self._unparsed_bytes > self.max_header_bytes:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[ARRIVED] = time.monotonic()
        self._phase, self._parsed = Phase.HEAD, True
        self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _FIELD_OVERHEAD)
        if self._phase is Phase.HEAD:  # a trailer is no header: whoever checked those did not see it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        if (version := self.parser.get_http_version()) not in _VERSIONS:
            self._refuse(400, f"HTTP/{version} is not spoken here; send HTTP/1.1")
            return
        self._phase, self._parsed = Phase.BODY, True
        self._arm(self.body_seconds + BODY_GRACE_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._parsed = True
        self._body_bytes += len(body)
        if self._body_bytes > 2 * self.max_body_bytes:  # refused at once its limit; what is sent after that is dropped
            self._close()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._phase, self._parsed = Phase.IDLE, True
        self._disarm()
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._parsed = True
        self._head_bytes += size
        if self._head_bytes > self.max_header_bytes:
            self._refuse_head()

    # -- time ----------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._out_of_time)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _out_of_time(self) -> None:
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._phase is Phase.BODY:
            self._close()
        elif answering:  # an earlier request: what came after it waits for its end
            self._arm(self.header_seconds)
        elif self._phase is Phase.HEAD:
            self._refuse(408, f"the request's headers did not arrive within {self.header_seconds:g} seconds")
        else:
            self._close()

    # -- what goes out -------------------------------------------------------------------------------------------

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's line and headers are larger than {self.max_header_bytes} bytes")

    def refuse_unfinished(self, message: str) -> None:
        """503 to a request whose body has not all come: nothing of it was accepted."""
        if self._phase is Phase.BODY:
            self._refuse(503, message)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """End the connection: with an answer, except in the midst of another."""
        if self._refused:
            return
        cycle = self.cycle
        own = self._phase is Phase.BODY  # the cycle is this request's, else that of the one before
        if cycle is not None and (cycle.response_started if own else not cycle.response_complete):
            self._close()
            return
        body = orjson.dumps(status_body(status, message))
        now = time.monotonic()
        scope = cast(dict[str, Any] | None, self.scope)  # None before a connection's first request
        arrived = now if scope is None else scope.get(ARRIVED, now)
        record = RequestRecord(secrets.token_hex(16), "", "", arrived, status=status, seconds=now - arrived)
        head = (
            b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
            % (len(body), record.request_id.encode())
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        for observer in self.observers:
            observer.ended(record)
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._disarm()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _close(self) -> None:
        self._refused = True
        self._disarm()
        self.transport.close()
