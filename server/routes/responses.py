"""/v1/responses: create, stream, get, cancel, delete. A response is a chat that may be kept and gone on with."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime.errors import InvalidParameterError, NVFP4Error, QueueFullError
from server.errors import json_response, renamed_params
from server.generation import until_disconnect
from server.openapi import RESPONSES_RESPONSES, json_responses
from server.output_items import OutputItems
from server.protocol.response_items import check_results
from server.protocol.responses import ResponsesRequest
from server.response_store import StoredResponse
from server.routes.chat import Chat, begin_chat
from server.state import Answer, ServerState
from server.streaming import EventStream, named_event
from server.terms import tenant_of

logger = logging.getLogger(__name__)
router = APIRouter()
_PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
_KEPT = ("role", "reasoning", "tool_calls")  # of an answer, beside its content


class _Response:
    """A running response. `events` runs it; `body` is the response as it stands."""

    def __init__(self, chat: Chat, asked: ResponsesRequest, messages: list[dict[str, Any]]) -> None:
        self.chat = chat
        self.asked = asked
        self.id = f"resp_{secrets.token_hex(24)}"  # whoever knows it may read what is kept
        self.messages = messages
        self.failure: NVFP4Error | None = None
        self._output = OutputItems()
        self.body = self._body("in_progress")

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Generate, telling every step. A failure of the engine is the last event, and `failure`."""
        yield {"type": "response.created", "response": self.body}
        yield {"type": "response.in_progress", "response": self.body}
        finish_reason = None
        try:
            async with aclosing(self.chat.news()) as news:
                async for piece, deltas in news:
                    shown = self.chat.logprobs(piece.logprobs)
                    finish_reason = piece.finish_reason
                    for event in self._output.push(deltas, shown["content"] if shown else []):
                        yield event
        except NVFP4Error as error:
            self.failure = error
            self.body = self._body("failed", error={"code": "server_error", "message": str(error)})
            yield {"type": "response.failed", "response": self.body}
            return
        status = {"stop": "completed", "length": "incomplete"}.get(finish_reason or "", "cancelled")
        for event in self.finish(status):
            yield event
        yield {"type": f"response.{status}", "response": self.body}

    def finish(self, status: str) -> list[dict[str, Any]]:
        """Set `body` to what it is now that nothing more comes; the events of the last item."""
        events: list[dict[str, Any]] = self._output.finish("completed" if status == "completed" else "incomplete")
        self.body = self._body(status, output=self._output.items, usage=self._usage())
        return events

    def keep(self, task: asyncio.Task[None] | None = None) -> StoredResponse:
        """Put the response as it stands into the store, with the turns that a next one goes on from."""
        said = []
        if self.body["output"]:
            message = self.chat.writers[0].message("assistant", "")
            said = [
                {name: message[name] for name in _KEPT if message.get(name)} | {"content": message["content"] or ""}
            ]
        stored = StoredResponse(self.body, self.messages + said, self.chat.answer.terms.tenant, task)
        self.chat.server.responses.put(stored)
        return stored

    def _usage(self) -> dict[str, Any]:
        (choice,) = self.chat.generation.choices
        num_prompt = len(self.chat.prompt_token_ids)
        cached = choice.num_cached_tokens if self.chat.server.config.enable_prompt_tokens_details else 0
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": choice.num_tokens,
            "output_tokens_details": {"reasoning_tokens": choice.num_reasoning_tokens or 0},
            "total_tokens": num_prompt + choice.num_tokens,
        }

    def _body(
        self,
        status: str,
        *,
        output: list[dict[str, Any]] | None = None,
        usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        asked, (choice,) = self.asked, self.chat.generation.choices
        params = choice.job.params
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.chat.answer.created,
            "status": status,
            "background": asked.background,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata,
            "model": self.chat.answer.model,
            "output": output or [],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "prompt": None,
            "reasoning": {"effort": asked.effort, "summary": None},
            "service_tier": "default",
            "store": asked.store,
            "temperature": params.temperature,
            "text": {"format": asked.text_format},
            "tool_choice": asked.tool_choice_written,
            "tools": [tool.written() for tool in asked.tools],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": asked.user,
        }

    # -- three ways to run it -----------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        if self.failure is not None:
            raise self.failure
        if self.asked.store:
            self.keep()
        return self.body

    async def stream(self) -> AsyncGenerator[bytes, None]:
        number = 0
        async with aclosing(self.events()) as events:
            async for event in events:
                if self.asked.store and event["type"] in ("response.completed", "response.incomplete"):
                    self.keep()  # before the client is told, who may go on from it at once
                yield named_event(event | {"sequence_number": number})
                number += 1

    async def in_background(self) -> StoredResponse:
        """Start generating; the store has the response from now on."""
        task = asyncio.create_task(self._run())
        try:
            stored = self.keep(task)
        except QueueFullError:
            task.cancel()
            self.chat.generation.close()
            raise
        await asyncio.sleep(0)  # it runs: a task cancelled before that would never get to its `finally`
        return stored

    async def _run(self) -> None:
        store = self.chat.server.responses
        try:
            async with aclosing(self.events()) as events:
                async for _ in events:
                    pass
        except asyncio.CancelledError:  # by POST .../cancel, DELETE, or the end of the server
            self.finish("cancelled")
        except Exception:
            logger.exception("response %s failed in the background", self.id)
            self.body = self._body("failed", error={"code": "server_error", "message": "Internal server error"})
        finally:
            self.chat.generation.close()
            if self.id in store:  # not deleted meanwhile
                self.keep(asyncio.current_task())


def _error_event(body: dict[str, Any]) -> bytes:
    error = body["error"]
    return named_event({"type": "error", "code": "server_error", "message": error["message"], "param": error["param"]})


@router.post("/v1/responses", responses=RESPONSES_RESPONSES, response_class=Response)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation; the response is kept unless store is false."""
    server = ServerState.of(request)
    answer = Answer.begin("resp", server, request, body)
    body.check()
    before = (
        []
        if body.previous_response_id is None
        else _finished(server, body.previous_response_id, answer.terms.tenant).messages
    )
    messages = before + body.new_messages()
    check_results(messages)
    with renamed_params(_PARAMS):
        chat = await begin_chat(server, body.as_chat(messages), answer)
    response = _Response(chat, body, messages)
    if body.background:
        return json_response((await response.in_background()).body)
    if body.stream:
        seconds = server.config.slow_client_seconds
        return EventStream(response.stream(), chat.generation.close, seconds, b"", _error_event)
    try:
        return json_response(await until_disconnect(request.receive, response.whole()))
    finally:
        chat.generation.close()


def _finished(server: ServerState, response_id: str, owner: str) -> StoredResponse:
    stored = server.responses.get(response_id, owner)
    if stored.running:
        raise InvalidParameterError(f"response {response_id} is still running; wait for it", "previous_response_id")
    return stored


@router.get("/v1/responses/{response_id}", responses=json_responses("The response."), response_class=Response)
async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
    """A response that is kept here."""
    if stream:
        raise InvalidParameterError("a kept response is not streamed again; leave stream out", "stream")
    return json_response(ServerState.of(request).responses.get(response_id, tenant_of(request.scope)).body)


@router.delete("/v1/responses/{response_id}", responses=json_responses("It is gone."), response_class=Response)
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a response; one that runs is stopped."""
    ServerState.of(request).responses.delete(response_id, tenant_of(request.scope))
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", responses=json_responses("The response."), response_class=Response)
async def cancel_response(response_id: str, request: Request) -> Response:
    """Stop a response that runs in the background; one that has ended is answered as it is."""
    store = ServerState.of(request).responses
    owner = tenant_of(request.scope)
    stored = store.get(response_id, owner)
    if not stored.body["background"]:
        raise InvalidParameterError("Cannot cancel a synchronous response.", "response_id")
    if stored.task is not None and stored.running:
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
    return json_response(store.get(response_id, owner).body)
