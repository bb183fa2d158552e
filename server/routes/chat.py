"""POST /v1/chat/completions: parse, submit, format."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime.engine.messages import TokenLogprob
from nvfp4_runtime.errors import InvalidParameterError
from server.beam_search import start_generation
from server.errors import json_response
from server.form import AnswerForm
from server.formatting import TokenNames, usage_of
from server.generation import Piece, make_jobs, off_loop, until_disconnect
from server.message import Delta
from server.openapi import GENERATION_RESPONSES
from server.prompts import EncodedPrompt, bad_words_token_ids, encode_chat, fit, output_budget
from server.protocol.chat import ChatCompletionRequest
from server.state import Answer, ServerState
from server.streaming import ChunkWriter, EventStream

router = APIRouter()
ROLE = "assistant"
_ONLY_CONTENT = {"content"}


class Chat:
    """A running chat request: knows how its pieces are written."""

    def __init__(self, server: ServerState, body: ChatCompletionRequest, answer: Answer, prompt: EncodedPrompt) -> None:
        self.server = server
        self.body = body
        self.answer = answer
        self.names = TokenNames(server.text.tokenizer, body.return_tokens_as_token_ids)
        limit = server.engine.info.max_model_len
        asked, param = body.max_completion_tokens, "max_completion_tokens"
        if asked is None:
            asked, param = body.max_tokens, "max_tokens"
        self.prompt_text = prompt.text
        self.prompt_token_ids = fit(body, prompt.token_ids, asked, limit)
        default = server.config.default_sampling.get("max_tokens")
        budget = output_budget(
            asked, None if default is None else int(default), len(self.prompt_token_ids), limit, param
        )
        self.form = AnswerForm(body, server.styles, prompt.text)
        bad_words = bad_words_token_ids(body.bad_words, server.text.tokenizer)
        params = body.sampling_params(budget, server.config.default_sampling, body.prompt_logprobs, bad_words)
        params = msgspec.structs.replace(params, structured=self.form.structured, thinking=self.form.thinking)
        jobs = make_jobs([self.prompt_token_ids], [params], body.n, self.form.span)
        kept = self.form.kept_special_ids(server.text.tokenizer)
        self.generation = start_generation(server, body, answer, jobs, kept)
        self.writers = [self.form.writer() for _ in range(body.n)]

    async def news(self) -> AsyncGenerator[tuple[Piece, list[Delta]], None]:
        """The generation's pieces, each with what is new of its choice's message."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                yield piece, self.writers[piece.index].push(piece.text, piece.finish_reason is not None)

    def echo_text(self) -> str:
        """echo: the last message's text, if it is the assistant's own, comes before the new text."""
        last = self.body.messages[-1]
        return last.content if self.body.echo and last.role == ROLE and isinstance(last.content, str) else ""

    def logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        body = self.body
        listed = body.logprob_token_ids is not None
        return self.names.chat_logprobs(entries, body.top_logprobs or 0, listed) if body.logprobs else None

    async def stream(self) -> AsyncGenerator[bytes, None]:
        body, answer = self.body, self.answer
        options = body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = with_usage and options is not None and options.continuous_usage_stats
        details = self.server.config.enable_prompt_tokens_details
        chunks = ChunkWriter(answer.id, "chat.completion.chunk", answer.created, answer.model, self.server.fingerprint)
        always = body.logprobs or body.return_token_ids
        echo = self.echo_text()
        begun: set[int] = set()
        only_text = not (always or continuous)
        writers = [chunks.text_chunk(partial(_content, i)) for i in range(body.n)]
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                extra = {"usage": usage_of(self.generation.choices, body.n, details)} if continuous else {}
                if piece.index not in begun:
                    begun.add(piece.index)
                    first: dict[str, Any] = {"prompt_token_ids": self.prompt_token_ids} if body.return_token_ids else {}
                    first |= {"prompt_text": self.prompt_text} if body.return_prompt_text else {}
                    yield chunks.choice(_delta(piece.index, {"role": ROLE, "content": ""}), first | extra)
                    if echo:
                        yield chunks.choice(_delta(piece.index, {"content": echo}), extra)
                ends = piece.finish_reason is not None
                deltas = self.writers[piece.index].push(piece.text, ends)
                if only_text and not ends and all(delta.keys() == _ONLY_CONTENT for delta in deltas):
                    for delta in deltas:
                        yield writers[piece.index](delta["content"])
                    continue
                if not deltas and (always or ends):
                    deltas = [{} if self.writers[piece.index].calls else {"content": ""}]
                for i, delta in enumerate(deltas):
                    last = ends and i == len(deltas) - 1
                    yield chunks.choice(self.write_piece(piece, delta, i == 0, last), extra, last=last)
        if with_usage:
            yield chunks.usage(usage_of(self.generation.choices, body.n, details))

    def write_piece(self, piece: Piece, delta: dict[str, Any], first: bool, last: bool) -> dict[str, Any]:
        """One delta of a piece: its tokens and logprobs go with the `first`, how it ended with the `last`."""
        written = _delta(piece.index, delta, self.logprobs(piece.logprobs) if first else None)
        if self.body.return_token_ids:
            written["token_ids"] = piece.token_ids if first else []
        if last:
            reason = self.writers[piece.index].finish_reason(piece.finish_reason, self.form.named)
            written |= {"finish_reason": reason, "stop_reason": piece.stop_reason}
        return written

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer: all fields, nulls included."""
        merged = [Piece(i) for i in range(self.body.n)]
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                into = merged[piece.index]
                self.writers[piece.index].push(piece.text, piece.finish_reason is not None)
                into.token_ids += piece.token_ids
                into.logprobs += piece.logprobs
                into.finish_reason, into.stop_reason = piece.finish_reason, piece.stop_reason
        body = self.body
        shown = self.generation.choices[0].prompt_logprobs if body.prompt_logprobs is not None else None
        return {
            "id": self.answer.id,
            "object": "chat.completion",
            "created": self.answer.created,
            "model": self.answer.model,
            "choices": [self.whole_choice(choice) for choice in merged],
            "service_tier": None,
            "system_fingerprint": self.server.fingerprint,
            "usage": usage_of(self.generation.choices, body.n, self.server.config.enable_prompt_tokens_details),
            "prompt_logprobs": None if shown is None else self.names.prompt_logprobs(shown, body.prompt_logprobs or 0),
            "prompt_token_ids": self.prompt_token_ids if body.return_token_ids else None,
            "prompt_text": self.prompt_text if body.return_prompt_text else None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def whole_choice(self, choice: Piece) -> dict[str, Any]:
        writer = self.writers[choice.index]
        return {
            "index": choice.index,
            "message": writer.message(ROLE, self.echo_text()),
            "logprobs": self.logprobs(choice.logprobs),
            "finish_reason": writer.finish_reason(choice.finish_reason, self.form.named),
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self.body.return_token_ids else None,
            "routed_experts": None,
        }


def _content(index: int, text: str) -> dict[str, Any]:
    return _delta(index, {"content": text})


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


async def begin_chat(server: ServerState, body: ChatCompletionRequest, answer: Answer) -> Chat:
    """Check, encode and submit. Whoever calls it closes `.generation`."""
    body.check(server.config.max_n)
    return Chat(server, body, answer, await encode(server, body))


async def encode(server: ServerState, body: ChatCompletionRequest) -> EncodedPrompt:
    """The prompt, rendered and encoded off the event loop where it is long."""
    if body.chat_template is not None and not server.config.trust_request_chat_template:
        raise InvalidParameterError(
            "this server does not run templates that come with a request; leave chat_template out, or start the server "
            "with --trust-request-chat-template",
            "chat_template",
        )
    if body.chat_template is not None:
        return await asyncio.to_thread(encode_chat, body, server.text)
    size = sum(len(str(message.content)) for message in body.messages)
    return await off_loop(size, lambda: encode_chat(body, server.text))


@router.post("/v1/chat/completions", responses=GENERATION_RESPONSES, response_class=Response)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    server = ServerState.of(request)
    chat = await begin_chat(server, body, Answer.begin("chatcmpl", server, request, body))
    if body.stream:
        return EventStream(chat.stream(), chat.generation.close, server.config.slow_client_seconds)
    try:
        return json_response(await until_disconnect(request.receive, chat.whole()))
    finally:
        chat.generation.close()
