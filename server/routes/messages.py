"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same chats."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.content_blocks import ContentBlocks
from server.errors import ANTHROPIC_PATH, in_dialect, json_response, renamed_params
from server.generation import Piece, until_disconnect
from server.openapi import MESSAGES_RESPONSES, anthropic_responses
from server.prompts import fit
from server.protocol.chat import ChatCompletionRequest
from server.protocol.messages import CountTokensRequest, MessagesRequest
from server.routes.chat import Chat, begin_chat, encode
from server.state import Answer, ServerState
from server.streaming import EventStream, named_event

router = APIRouter()
_PARAMS = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking",
    "reasoning_effort": "output_config",
    "response_format": "output_config",
}


class _Message:
    """A running message: knows how its pieces are written."""

    def __init__(self, chat: Chat, message_id: str) -> None:
        self.chat = chat
        self.id = message_id
        self.blocks = ContentBlocks()

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.answer.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage(0),
        }

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """Anthropic counts what the prefix cache gave apart from input_tokens (--enable-prompt-tokens-details)."""
        (choice,) = self.chat.generation.choices
        cached = choice.num_cached_tokens if self.chat.server.config.enable_prompt_tokens_details else 0
        return {
            "input_tokens": len(self.chat.prompt_token_ids) - cached,
            "output_tokens": output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }

    async def whole(self) -> dict[str, Any]:
        last = Piece(0)
        async with aclosing(self.chat.news()) as news:
            async for piece, deltas in news:
                self.blocks.push(deltas)
                last = piece
        self.blocks.finish()
        num_tokens = self.chat.generation.choices[0].num_tokens
        content = self.blocks.content
        return self.head() | self.stop(last) | {"content": content, "usage": self.usage(num_tokens)}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        begun, last = False, Piece(0)
        async with aclosing(self.chat.news()) as news:
            async for piece, deltas in news:
                last = piece
                if not begun:
                    begun = True
                    yield named_event({"type": "message_start", "message": self.head()})
                for event in self.blocks.push(deltas):
                    yield named_event(event)
        for event in self.blocks.finish():
            yield named_event(event)
        num_tokens = self.chat.generation.choices[0].num_tokens
        yield named_event({"type": "message_delta", "delta": self.stop(last), "usage": self.usage(num_tokens)})
        yield named_event({"type": "message_stop"})

    def stop(self, last: Piece) -> dict[str, Any]:
        """How the message ended."""
        reason, sequence = "end_turn", None
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif isinstance(last.stop_reason, str):
            reason, sequence = "stop_sequence", last.stop_reason
        elif self.chat.writers[0].calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _error_event(body: dict[str, Any]) -> bytes:
    return named_event(in_dialect(body, ANTHROPIC_PATH))


@router.post(ANTHROPIC_PATH, responses=MESSAGES_RESPONSES, response_class=Response)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, in Anthropic's API."""
    server = ServerState.of(request)
    answer = Answer.begin("msg", server, request, body)
    body.check()
    with renamed_params(_PARAMS):
        chat = await begin_chat(server, body.as_chat(), answer)
    message = _Message(chat, f"msg_{secrets.token_hex(12)}")
    if body.stream:
        seconds = server.config.slow_client_seconds
        return EventStream(message.stream(), chat.generation.close, seconds, b"", _error_event)
    try:
        return json_response(await until_disconnect(request.receive, message.whole()))
    finally:
        chat.generation.close()


@router.post(f"{ANTHROPIC_PATH}/count_tokens", responses=anthropic_responses("The count."), response_class=Response)
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """How many input tokens a message would have; nothing is generated."""
    server = ServerState.of(request)
    server.resolve_model(body.model)
    body.check()
    with renamed_params(_PARAMS):
        chat: ChatCompletionRequest = body.as_chat()
        chat.check(server.config.max_n)
        prompt = await encode(server, chat)
        token_ids = fit(chat, prompt.token_ids, 1, server.engine.info.max_model_len)
    return json_response({"input_tokens": len(token_ids)})
