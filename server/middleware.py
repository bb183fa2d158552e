"""Round every request: its id, the access log, the API key, the bound on its body. Plain ASGI, path from the scope."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import hash_key
from server.errors import error_body, error_response, in_dialect, json_response, status_response
from server.generation import ClientDisconnected
from server.state import sane_request_id
from server.terms import set_tenant

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

# Probes come every second and say nothing about the load.
_QUIET_PATHS = frozenset({"/health", "/ping", "/metrics"})


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return None


class RequestContext:
    """x-request-id on every answer, one log line per request without its text, and the last resort for errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = sane_request_id(_header(scope, b"x-request-id")) or secrets.token_hex(16)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        outcome = ""
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            outcome = " client gone"
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # bytes have left; the server closes the connection
            await error_response(RuntimeError(), scope["path"])(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
            seconds = time.monotonic() - started
            access_logger.log(
                level, "%s %.200r %d %.3fs %s%s", scope["method"], scope["path"], status, seconds, request_id, outcome
            )


class RequireKey:
    """401 for everything but /health* without one of the accepted keys. Hashes are compared in constant time.

    Where there are several keys, whose request it is goes into the scope: see terms.py.
    """

    def __init__(self, app: ASGIApp, key_hashes: Sequence[bytes]) -> None:
        self._app = app
        self._key_hashes = tuple(key_hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._accept(scope):
            await self._app(scope, receive, send)
            return
        body = error_body("Unauthorized: this server needs an API key", "AuthenticationError", 401)
        await json_response(in_dialect(body, scope["path"]), 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    @staticmethod
    def _is_open(path: str) -> bool:
        return path == "/health" or path.startswith("/health/")

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
