"""/health, /ping, /metrics, /version: for probes and operators."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime import __version__
from nvfp4_runtime.errors import EngineDeadError
from server.errors import error_response, json_response
from server.state import ServerState

router = APIRouter()


@router.get("/health", response_class=Response)
@router.get("/ping", response_class=Response)
async def health(request: Request) -> Response:
    """200 and empty while the engine runs, else 503 with the reason."""
    server = ServerState.of(request)
    if server.draining:
        return error_response(EngineDeadError("the server is shutting down"))
    if not server.engine.alive:
        return error_response(EngineDeadError(server.engine.death_reason or "the engine is not running"))
    return Response(status_code=200)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(ServerState.of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version", response_class=Response)
async def version(request: Request) -> Response:
    """The server's version, and the device its model runs on."""
    return json_response({"version": __version__, "device": ServerState.of(request).engine.info.device})
