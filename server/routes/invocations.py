"""POST /invocations, as SageMaker calls it: the endpoint is told by the fields of the body."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from nvfp4_runtime.errors import InvalidParameterError
from server.openapi import GENERATION_RESPONSES
from server.protocol.chat import ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.embeddings import EmbeddingRequest
from server.routes.chat import create_chat_completion
from server.routes.completions import create_completion
from server.routes.embeddings import create_embeddings

router = APIRouter()
Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], body: dict[str, Any]) -> Model:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


@router.post("/invocations", responses=GENERATION_RESPONSES, response_class=Response)
async def invoke(body: dict[str, Any], request: Request) -> Response:
    """messages: /v1/chat/completions; prompt: /v1/completions; input: /v1/embeddings."""
    if "messages" in body:
        return await create_chat_completion(_parse(ChatCompletionRequest, body), request)
    if "prompt" in body:
        return await create_completion(_parse(CompletionRequest, body), request)
    if "input" in body:
        return await create_embeddings(_parse(EmbeddingRequest, body), request)
    raise InvalidParameterError("expected messages, prompt or input", "messages")
