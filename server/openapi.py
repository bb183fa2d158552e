"""What the OpenAPI document says of answers that are written without a pydantic model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"type": "integer"},
            },
        }
    },
}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: _json("The request cannot be honoured; param names the field.", _ERROR),
    401: _json("The API key is missing or wrong.", _ERROR),
    404: _json("The model or path does not exist.", _ERROR),
    408: _json("The body took too long to arrive.", _ERROR),
    413: _json("The body is too large.", _ERROR),
    429: _json("Too many requests are waiting; see Retry-After.", _ERROR),
    500: _json("Our fault.", _ERROR),
    503: _json("The engine is not running.", _ERROR),
    504: _json("The request did not end in its time.", _ERROR),
}


def json_responses(description: str) -> dict[int | str, dict[str, Any]]:
    """Of an endpoint that answers with a JSON object."""
    return {200: _json(description, {"type": "object"}), **ERROR_RESPONSES}


_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def anthropic_responses(description: str) -> dict[int | str, dict[str, Any]]:
    """The same of an endpoint whose errors come in Anthropic's envelope."""
    errors = {status: _json(each["description"], _ANTHROPIC_ERROR) for status, each in ERROR_RESPONSES.items()}
    return {200: _json(description, {"type": "object"}), **errors}


# One event, as its fields: how readers of OpenAPI take the schema of a stream.
_EVENT = {
    "schema": {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    }
}
GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true, server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": _EVENT},
    },
    **ERROR_RESPONSES,
}
_NAMED_EVENTS = {
    "description": "The answer; with stream: true, named server-sent events.",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": _EVENT,
    },
}
RESPONSES_RESPONSES: dict[int | str, dict[str, Any]] = {**ERROR_RESPONSES, 200: _NAMED_EVENTS}
MESSAGES_RESPONSES: dict[int | str, dict[str, Any]] = anthropic_responses("") | {200: _NAMED_EVENTS}
TEXT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
HEALTH_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"description": "It runs."}, 503: ERROR_RESPONSES[503]}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document without the 422s that FastAPI declares and this server never sends."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        found.get("components", {}).get("schemas", {}).pop(name, None)
    return found
