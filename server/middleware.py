"""Round every request: its id, the access log, the API key, the bound on its body. Plain ASGI, path from the scope."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Collection, Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import hash_key
from server.errors import error_body, error_response, in_dialect, json_response, status_response
from server.generation import ClientDisconnected
from server.http_protocol import ARRIVED
from server.request_log import is_probe
from server.request_record import Observer, RequestRecord, begin
from server.state import sane_request_id
from server.terms import set_tenant
from server.tracing import Tracer

logger = logging.getLogger(__name__)


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return None


class RequestContext:
    """x-request-id on every answer, a record per request for the `observers`, and the last resort for errors.

    `tracer` opens a span per request; its context leaves as the header traceresponse.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Observer] = (), tracer: Tracer | None = None) -> None:
        self._app = app
        self._observers = tuple(observers)
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = sane_request_id(_header(scope, b"x-request-id")) or secrets.token_hex(16)
        arrived = scope.get(ARRIVED) or time.monotonic()  # another host's port does not say when
        record = RequestRecord(request_id, scope["method"], scope["path"], arrived)
        begin(record)
        added = [(b"x-request-id", request_id.encode())]
        observers = self._observers
        if self._tracer is not None and not is_probe(record.path):
            span = self._tracer.begin(record, scope["headers"])
            added.append((b"traceresponse", span.traceresponse.encode()))
            observers = (*observers, span)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)
            if not record.first_byte and message.get("body"):
                record.first_byte = time.monotonic()

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            record.outcome = "client gone"
        except Exception:
            logger.exception("request %s failed", request_id)
            if record.status:
                raise  # bytes have left; the server closes the connection
            await error_response(RuntimeError(), scope["path"])(scope, receive, send_with_id)
        finally:
            record.seconds = time.monotonic() - record.started
            record.handler = getattr(scope.get("route"), "path", "")
            for observer in observers:
                observer.ended(record)


class RequireKey:
    """401 for everything but /health* and `open_paths` without one of the accepted keys.

    Hashes are compared in constant time. Where there are several keys, whose request it is goes into the scope: see
    terms.py.
    """

    def __init__(self, app: ASGIApp, key_hashes: Sequence[bytes], open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._open_paths = frozenset(open_paths)
        self._key_hashes = tuple(key_hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._accept(scope):
            await self._app(scope, receive, send)
            return
        body = error_body("Unauthorized: this server needs an API key", "AuthenticationError", 401)
        await json_response(in_dialect(body, scope["path"]), 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path == "/health" or path.startswith("/health/") or path in self._open_paths

    def _accept(self, scope: Scope) -> bool:
        scheme, _, key = (_header(scope, b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            key = _header(scope, b"x-api-key") or ""  # how Anthropic's clients send it
        given = hash_key(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, known) for known in self._key_hashes]  # all of them: no early exit
        if True not in matches:
            return False
        if len(matches) > 1:
            set_tenant(scope, f"key-{matches.index(True)}")
        return True


class LimitBody:
    """413 for bodies over `max_bytes`, before they are in memory; 408 for those that take longer than `seconds`."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body is larger than {self._max_bytes} bytes"
        declared = _header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > self._max_bytes:
            await status_response(413, message, path=scope["path"])(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # the application waits for the client to leave
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    part = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {self._seconds:g} seconds"
                raise HTTPException(408, late, {"connection": "close"}) from None
            received += len(part.get("body", b""))
            complete = not part.get("more_body", False)
            if received > self._max_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, limited, send)
