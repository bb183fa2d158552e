"""/metrics on a port of its own, for a Prometheus without a key."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import status_response


class MetricsPort:
    """Sends GET /metrics on the port for metrics to `metrics_app`, past the key; nothing else is there.

    The port is the listening socket's own, whatever the Host header says.
    """

    def __init__(self, app: ASGIApp, metrics_app: ASGIApp, port: int) -> None:
        self._app = app
        self._metrics_app = metrics_app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] != "http" or server is None or server[1] != self._port:
            await self._app(scope, receive, send)
        elif scope["path"] == "/metrics":
            await self._metrics_app(scope, receive, send)
        else:
            await status_response(404, "only /metrics is answered on this port")(scope, receive, send)
