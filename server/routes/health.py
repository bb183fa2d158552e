"""/health, /ping, /load, /requests, /metrics, /version: for probes and operators."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime import __version__
from nvfp4_runtime.errors import EngineDeadError
from server.errors import error_response, json_response
from server.metrics_port import metrics_response
from server.openapi import HEALTH_RESPONSES, TEXT_RESPONSES, json_responses
from server.state import ServerState

router = APIRouter()


@router.get("/health", responses=HEALTH_RESPONSES, response_class=Response)
@router.get("/ping", responses=HEALTH_RESPONSES, response_class=Response)
@router.post("/ping", responses=HEALTH_RESPONSES, response_class=Response)
async def health(request: Request) -> Response:
    """200 and empty while the engine runs, else 503 with the reason."""
    server = ServerState.of(request)
    if server.draining:
        return error_response(EngineDeadError("the server is shutting down"))
    if not server.engine.alive:
        return error_response(EngineDeadError(server.engine.death_reason or "the engine is not running"))
    return Response(status_code=200)


@router.get("/metrics", responses=TEXT_RESPONSES, response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return metrics_response(ServerState.of(request).metrics.render())


@router.get("/load", responses=json_responses("How many."), response_class=Response)
async def load(request: Request) -> Response:
    """Requests in the engine, running or waiting, as of its last step."""
    stats = ServerState.of(request).engine.stats
    return json_response({"server_load": stats.num_running + stats.num_waiting})


@router.get("/requests", responses=json_responses("The last requests."), response_class=Response)
async def requests(request: Request) -> Response:
    """The last 100 choices that ended, newest first: tokens and times, in seconds, without text."""
    return json_response({"object": "list", "data": ServerState.of(request).metrics.recent_requests.newest_first()})


@router.get("/version", responses=json_responses("The version."), response_class=Response)
async def version(request: Request) -> Response:
    """The server's version, and the device its model runs on."""
    return json_response({"version": __version__, "device": ServerState.of(request).engine.info.device})
