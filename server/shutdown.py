"""From a signal to the end: not ready, still accepting, refusing, finishing, cutting off. A second signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from nvfp4_runtime.errors import EngineDeadError
from server.errors import error_response
from server.state import ServerState

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
LAST_EVENTS_SECONDS = 2  # for what is written when streams are cut off
_RETRY_SECONDS = 5.0
_SHUTTING_DOWN = "the server is shutting down"
_CUT_OFF = "the server is shutting down and the time for running requests is over"
# Probes and scrapes are answered to the end.
_ALWAYS = ("/health", "/ping", "/metrics")


class Shutdown:
    """One server's end. `begin` may be called from a signal handler of the event loop, as often as signals come."""

    def __init__(self, server: uvicorn.Server, state: ServerState) -> None:
        self._server = server
        self._state = state
        self._task: asyncio.Task[None] | None = None

    def begin(self, drain_delay: float) -> None:
        """Not ready from now on; the second call ends everything at once."""
        self._state.draining = True
        if self._task is not None:
            logger.info("told to stop again: at once")
            self._task.cancel()
            self._server.force_exit = self._server.should_exit = True
            return
        logger.info("told to stop; running requests may finish")
        self._task = asyncio.create_task(self._drain(drain_delay))

    async def _drain(self, drain_delay: float) -> None:
        from server.http_protocol import BoundedProtocol  # brings uvicorn, for which no start waits

        await asyncio.sleep(drain_delay)
        self._state.refusing = True
        for connection in list(self._server.server_state.connections):
            if isinstance(connection, BoundedProtocol):  # its client had the delay to send the rest
                connection.refuse_unfinished(_SHUTTING_DOWN)
        if not await self._idle(self._state.config.shutdown_timeout_seconds):
            logger.warning("requests still run after the shutdown timeout; their streams end with an error")
            await self._state.engine.close(_CUT_OFF)
            await self._idle(LAST_EVENTS_SECONDS)
        self._server.config.timeout_graceful_shutdown = LAST_EVENTS_SECONDS
        self._server.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        """Wait until no request runs, at most so long; whether none does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._is_busy():
                    await asyncio.sleep(_POLL_SECONDS)
        return not self._is_busy()

    def _is_busy(self) -> bool:
        """Somebody waits for an answer, or the engine works on one that will be asked for later (background)."""
        engine = self._state.engine
        working = engine.alive and engine.stats.num_running + engine.stats.num_waiting > 0
        return working or bool(self._server.server_state.tasks)


class RefuseNew:
    """503 with Retry-After and Connection: close for what comes once the server refuses; probes are answered."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._state.refusing or scope["path"].startswith(_ALWAYS):
            await self._app(scope, receive, send)
            return
        response = error_response(EngineDeadError(_SHUTTING_DOWN, _RETRY_SECONDS), scope["path"])
        response.headers["connection"] = "close"
        await response(scope, receive, send)
