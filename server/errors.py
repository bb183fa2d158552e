"""The one table from runtime errors to (HTTP status, OpenAI error body). Always 400, never 422."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

from nvfp4_runtime.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    ModelNotFoundError,
    NVFP4Error,
    RequestError,
    SlowReaderError,
)

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ResponseNotFoundError(RequestError):
    """No response with this id is kept here."""

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id:.64}' not found.", "response_id")


class GenerationError(NVFP4Error):
    """The engine ended one request with an error; the server itself goes on. `kind`: the error's type in the body."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


# First match wins. What is not listed is our bug: 500, without its message.
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (ModelNotFoundError, 404, "NotFoundError"),
    (ResponseNotFoundError, 404, "NotFoundError"),
    (RequestError, 400, "BadRequestError"),
    (CapacityError, 429, "TooManyRequestsError"),
    (DeadlineExceededError, 504, "GatewayTimeoutError"),
    (SlowReaderError, 408, "RequestTimeoutError"),
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
            if (seconds := getattr(error, "retry_after_seconds", None)) is not None:
                headers["retry-after"] = str(max(1, math.ceil(seconds)))
            kind = getattr(error, "kind", None) or kind
            return status, error_body(str(error), kind, status, getattr(error, "param", None)), headers
    return 500, error_body("Internal server error", "InternalServerError", 500), {}


@contextmanager
def renamed_params(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a chat's fields name the fields of the API that made a chat of them: chat's name -> theirs."""
    try:
        yield
    except RequestError as error:
        if error.param is not None and error.param in names:
            error.args = (str(error).replace(error.param, names[error.param]), *error.args[1:])
            error.param = names[error.param]
        raise


def in_dialect(body: dict[str, Any], path: str) -> dict[str, Any]:
    """An OpenAI error body as clients of `path` expect it: in Anthropic's envelope below /v1/messages."""
    if path != ANTHROPIC_PATH and not path.startswith(ANTHROPIC_PATH + "/"):
        return body
    error = body["error"]
    kind = _ANTHROPIC_TYPES.get(error["code"], "api_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def error_response(error: Exception, path: str = "") -> Response:
    status, body, headers = describe(error)
    return json_response(in_dialect(body, path), status, headers)


def status_response(
    status: int, message: str | None = None, headers: Mapping[str, str] | None = None, path: str = ""
) -> Response:
    """For errors of the HTTP layer (404 on a path, 405, 413): the type is the status's phrase, but for a 400."""
    return json_response(in_dialect(status_body(status, message), path), status, headers)


def status_body(status: int, message: str | None = None) -> dict[str, Any]:
    phrase = HTTPStatus(status).phrase
    kind = "BadRequestError" if status == 400 else phrase
    return error_body(message or phrase, kind, status)


def validation_response(errors: Sequence[Mapping[str, Any]], path: str = "") -> Response:
    """A request body that does not have the declared shape: 400, `param` the field, the first error described."""
    first = errors[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        message, param = f"the body is not valid JSON: {first['ctx']['error']}", None
    elif not where:
        message, param = "the body must be a JSON object, sent with content-type: application/json", None
    else:
        message, param = f"{'.'.join(where)}: {first['msg']}", where[0]
    return json_response(in_dialect(error_body(message, "BadRequestError", 400, param), path), 400)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, dict(headers or {}), "application/json")
