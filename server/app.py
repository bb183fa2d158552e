"""create_app: routes, middleware, exception handlers and life of one server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import lru_cache

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nvfp4_runtime import __version__
from nvfp4_runtime.engine.client import AsyncEngine
from nvfp4_runtime.errors import InvalidParameterError, NVFP4Error
from nvfp4_runtime.text.processor import TextProcessor
from server.config import ServerConfig
from server.errors import error_response, status_response, validation_response
from server.fault_metrics import FaultMetrics
from server.loop_lag import watch_loop_lag
from server.metrics import ENGINE, Metrics
from server.metrics_port import MetricsPort
from server.middleware import LimitBody, RequestContext, RequireKey
from server.openapi import document
from server.request_log import RequestLog
from server.request_record import Observer
from server.response_store import ResponseStore
from server.routes import (
    chat,
    completions,
    embeddings,
    health,
    invocations,
    messages,
    models,
    precision,
    responses,
    tokenize,
    ui,
)
from server.shedding import ShedLoad
from server.shutdown import RefuseNew
from server.state import ServerState
from server.tracing import Tracer
from server.turnstile import Turnstile


def create_app(engine: AsyncEngine, text: TextProcessor, config: ServerConfig, tracer: Tracer | None = None) -> FastAPI:
    """The ASGI application over a running engine, which it closes when it ends.

    Reads no environment, and no files but those of the page.
    `tracer`: where requests are traced.
    """
    metrics = Metrics(config.served_model_names[0], engine.info, engine.stats)
    engine.on_step(metrics.on_step)
    engine.on_step(metrics.engine.on_step)
    engine.on_output(metrics.on_output)
    engine.on_finish(metrics.on_finish)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        lag = asyncio.create_task(watch_loop_lag(metrics.loop_lag.observe))
        yield
        lag.cancel()
        await store.close()
        await engine.close()

    keyed = bool(config.api_key_hashes)
    app = FastAPI(
        title="nvfp4",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the Host header
        docs_url=None if keyed else "/docs",
        redoc_url=None,
    )
    store = ResponseStore(config.stored_responses_bytes, config.stored_responses_seconds)
    state = app.state.server = ServerState(engine, text, config, metrics, int(time.time()), store)
    FaultMetrics(metrics.registry, (config.served_model_names[0], ENGINE), engine)
    for routes in (
        completions,
        chat,
        responses,
        messages,
        embeddings,
        tokenize,
        invocations,
        models,
        precision,
        health,
    ):
        app.include_router(routes.router)
    page = ui.static_files() if config.ui else {}
    app.include_router(ui.ui_router(page))
    app.openapi = lru_cache(lambda: document(app))  # type: ignore[method-assign]  # the way FastAPI documents
    app.add_exception_handler(NVFP4Error, _runtime_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost: every answer, a 413 or 401 too, gets its request id.
    app.add_middleware(Turnstile)
    app.add_middleware(LimitBody, max_bytes=config.max_body_bytes, seconds=config.body_seconds)
    app.add_middleware(ShedLoad, engine=engine)
    if keyed:
        app.add_middleware(RequireKey, key_hashes=config.api_key_hashes, open_paths=page)
    app.add_middleware(RefuseNew, state=state)
    if config.metrics_port is not None:
        app.add_middleware(MetricsPort, render=metrics.render, port=config.metrics_port)
    observers: list[Observer] = [metrics.http]
    if config.log_requests:
        observers.append(RequestLog(text.tokenizer.decode if config.log_prompts else None))
    app.add_middleware(RequestContext, observers=observers, tracer=tracer)
    app.state.observers = observers  # the port's own refusals are told to them too
    return app


async def _runtime_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.scope["path"])  # request.url is made of the Host header


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_response(error.errors(), request.scope["path"])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RecursionError):
        error = InvalidParameterError("the body is not readable: its JSON is nested too deep")
        return error_response(error, request.scope["path"])
    return status_response(error.status_code, error.detail, error.headers, request.scope["path"])
