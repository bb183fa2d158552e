"""/metrics on a port of its own, for a Prometheus without a key."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import status_response


class MetricsPort:
    """Answers /metrics on the port for metrics, past the key; nothing else is there.

    The port is the listening socket's own, whatever the Host header says.
    """

    def __init__(self, app: ASGIApp, render: Callable[[], bytes], port: int) -> None:
        self._app = app
        self._render = render
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] != "http" or server is None or server[1] != self._port:
            await self._app(scope, receive, send)
        elif scope["path"] == "/metrics" and scope["method"] == "GET":
            await metrics_response(self._render())(scope, receive, send)
        else:
            await status_response(404, "only GET /metrics is answered on this port")(scope, receive, send)


def metrics_response(text: bytes) -> Response:
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
