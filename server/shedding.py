"""Requests for which there is no room are refused before their bodies are read: under overload that is most of them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from nvfp4_runtime.engine.client import AsyncEngine
from nvfp4_runtime.errors import QueueFullError
from server.errors import ANTHROPIC_PATH, error_response
from server.terms import tenant_of

GENERATING = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/invocations", ANTHROPIC_PATH}
)


class ShedLoad:
    """429 for POST on what the engine computes while it takes no request, however short."""

    def __init__(self, app: ASGIApp, engine: AsyncEngine) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING:
            try:
                self._engine.admission.check_room(tenant_of(scope))
            except QueueFullError as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
