"""The one table from runtime errors to (HTTP status, OpenAI error body). Always 400, never 422."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

from nvfp4_runtime.errors import (
    CapacityError,
    EngineDeadError,
    ModelNotFoundError,
    NVFP4Error,
    RequestError,
)


class GenerationError(NVFP4Error):
    """The engine ended one request with an error; the server itself goes on."""


# First match wins. What is not listed is our bug: 500, without its message.
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (ModelNotFoundError, 404, "NotFoundError"),
    (RequestError, 400, "BadRequestError"),
    (CapacityError, 429, "TooManyRequestsError"),
    (EngineDeadError, 503, "ServiceUnavailableError"),
    (GenerationError, 500, "InternalServerError"),
)


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    # Messages may repeat what a client sent, and JSON strings can hold lone surrogates, which UTF-8 cannot.
    clean = message.encode("utf-8", "replace").decode()
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, OpenAI error body and extra headers of an error."""
    for cls, status, kind in _TABLE:
        if isinstance(error, cls):
            headers = {}
            if isinstance(error, CapacityError):
                headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
            return status, error_body(str(error), kind, status, getattr(error, "param", None)), headers
    return 500, error_body("Internal server error", "InternalServerError", 500), {}


def error_response(error: Exception) -> Response:
    status, body, headers = describe(error)
    return json_response(body, status, headers)


def status_response(status: int, message: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """For errors of the HTTP layer (404 on a path, 405, 413): the type is the status's phrase."""
    phrase = HTTPStatus(status).phrase
    return json_response(error_body(message or phrase, phrase, status), status, headers)


def validation_response(errors: Sequence[Mapping[str, Any]]) -> Response:
    """A request body that does not have the declared shape: 400, `param` the field, the first error described."""
    first = errors[0]
    path = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        message, param = f"the body is not valid JSON: {first['ctx']['error']}", None
    elif not path:
        message, param = "the body must be a JSON object, sent with content-type: application/json", None
    else:
        message, param = f"{'.'.join(path)}: {first['msg']}", path[0]
    return json_response(error_body(message, "BadRequestError", 400, param), 400)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, dict(headers or {}), "application/json")
