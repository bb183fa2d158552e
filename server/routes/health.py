"""/health, /ping, /load, /requests, /metrics, /version: for probes and operators."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime import __version__
from nvfp4_runtime.errors import EngineDeadError
from server.errors import error_response, json_response
from server.health import why_not_healthy, why_not_live, why_not_ready
from server.metrics_port import metrics_response
from server.openapi import HEALTH_RESPONSES, TEXT_RESPONSES, json_responses
from server.state import ServerState
from server.terms import tenant_of

router = APIRouter()


@router.get("/health", responses=HEALTH_RESPONSES, response_class=Response)
@router.get("/ping", responses=HEALTH_RESPONSES, response_class=Response)
@router.post("/ping", responses=HEALTH_RESPONSES, response_class=Response)
async def health(request: Request) -> Response:
    """200 and empty while the engine runs and progresses, else 503 with the reason. A full queue is no reason."""
    reason = why_not_healthy(ServerState.of(request))
    return Response(status_code=200) if reason is None else error_response(EngineDeadError(reason))


@router.get("/health/live", responses=HEALTH_RESPONSES, response_class=Response)
async def live(request: Request) -> Response:
    """200 while this process turns, unless an engine that hangs could not be replaced for twice the stall timeout."""
    return _answer("live", why_not_live(ServerState.of(request)))


@router.get("/health/ready", responses=HEALTH_RESPONSES, response_class=Response)
async def ready(request: Request) -> Response:
    """200 while a new request would be served: /health, and room in the queue. Else 503 with the reason."""
    return _answer("ready", why_not_ready(ServerState.of(request)))


def _answer(status: str, reason: str | None) -> Response:
    return json_response({"status": status}) if reason is None else error_response(EngineDeadError(reason))


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
    """The last 100 choices of this API key that ended, newest first: tokens and times, in seconds, without text."""
    recent = ServerState.of(request).metrics.recent_requests
    return json_response({"object": "list", "data": recent.newest_first(tenant_of(request.scope))})


@router.get("/version", responses=json_responses("The version."), response_class=Response)
async def version(request: Request) -> Response:
    """The server's version, and the device its model runs on."""
    return json_response({"version": __version__, "device": ServerState.of(request).engine.info.device})
