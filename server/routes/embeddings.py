"""POST /v1/embeddings: a decoder's final hidden states as vectors of unit length, pooled over each prompt."""

from __future__ import annotations

import asyncio
import base64
from array import array
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import DeadlineExceededError, EngineDeadError, InvalidParameterError, NVFP4Error
from nvfp4_runtime.sampling.params import SamplingParams
from server.deadline import Deadline
from server.errors import GenerationError, json_response, renamed_params
from server.generation import ChoiceState, Job, chosen_adapter, off_loop, until_disconnect
from server.openapi import json_responses
from server.prompts import encode_prompts, fit, num_chars
from server.protocol.embeddings import EmbeddingRequest
from server.request_record import note
from server.state import Answer, ServerState

router = APIRouter()


class _Embedding:
    """The running prompts of one request. Submits all or none; `close` aborts what still runs."""

    def __init__(self, server: ServerState, body: EmbeddingRequest, answer: Answer, prompts: list[list[int]]) -> None:
        self.server = server
        self.body = body
        self.answer = answer
        self.num_tokens = sum(map(len, prompts))
        self.num_cached_tokens = 0
        self._streams: list[TokenStream] = []
        self._choices = [ChoiceState(Job(i, ids, SamplingParams(max_tokens=1))) for i, ids in enumerate(prompts)]
        self._running: set[str] = set()
        self._deadline = Deadline(answer.terms.timeout_seconds, self._expire)
        try:
            for i, token_ids in enumerate(prompts):
                stream = server.engine.submit(
                    token_ids,
                    self._choices[i].job.params,
                    request_id=f"{answer.engine_id}-{i}",
                    cache_salt=answer.terms.salted(body.cache_salt),
                    priority=body.priority,
                    tenant=answer.terms.tenant,
                    pooling=body.pooling or server.config.pooling,
                    adapter=chosen_adapter(server.engine, body.model),
                )
                self._streams.append(stream)
                self._running.add(stream.request_id)
                server.metrics.start(stream.request_id, len(token_ids), 0, answer.terms.tenant)
        except BaseException:  # whatever it was: none of them may run without somebody to take its vector
            self.close()
            raise
        note(self._choices)

    def close(self) -> None:
        """Abort whatever has not finished. Safe to call twice."""
        self._deadline.cancel()
        for request_id in list(self._running):
            self._running.discard(request_id)
            self.server.metrics.released(request_id)
            self.server.engine.abort(request_id)

    def _expire(self, error: DeadlineExceededError) -> None:
        for stream in self._streams:
            if stream.request_id in self._running:
                stream.fail(error)
                self.server.engine.abort(stream.request_id)

    async def whole(self) -> dict[str, Any]:
        vectors = await asyncio.gather(*map(self._vector, self._streams, self._choices))
        with_details = self.server.config.enable_prompt_tokens_details
        return {
            "id": self.answer.id,
            "object": "list",
            "created": self.answer.created,
            "model": self.answer.model,
            "data": [{"index": i, "object": "embedding", "embedding": self._write(v)} for i, v in enumerate(vectors)],
            "usage": {
                "prompt_tokens": self.num_tokens,
                "total_tokens": self.num_tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens} if with_details else None,
            },
        }

    async def _vector(self, stream: TokenStream, choice: ChoiceState) -> bytes:
        try:
            async for output in stream:
                if output.finish_reason == "error":
                    raise GenerationError(
                        output.error or "the engine could not complete this request", output.error_code
                    )
                if output.embedding is not None:
                    self._running.discard(stream.request_id)
                    self.server.metrics.released(stream.request_id)
                    self.num_cached_tokens += output.num_cached_tokens
                    choice.num_cached_tokens, choice.times = output.num_cached_tokens, output.times
                    choice.finish_reason = output.finish_reason
                    return output.embedding
            raise EngineDeadError("the engine ended a request without saying why")
        except NVFP4Error:
            self._running.discard(stream.request_id)
            self.server.metrics.failed(stream.request_id)
            choice.finish_reason = "error"
            raise

    def _write(self, vector: bytes) -> str | list[float]:
        if self.body.encoding_format == "base64":
            return base64.b64encode(vector).decode()
        return array("f", vector).tolist()


@router.post("/v1/embeddings", responses=json_responses("One vector per input."), response_class=Response)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector per input."""
    server = ServerState.of(request)
    answer = Answer.begin("embd", server, request, body)
    body.check()
    tokenizer, special = server.text.tokenizer, body.add_special_tokens
    prompts = await off_loop(
        num_chars(body.input), lambda: encode_prompts(body.input, tokenizer, add_special_tokens=special, param="input")
    )
    if len(prompts) > server.config.max_choices:
        raise InvalidParameterError(
            f"input holds {len(prompts)} texts; at most {server.config.max_choices} are allowed", "input"
        )
    limit = server.engine.info.max_model_len
    with renamed_params({"prompt": "input"}):
        embedding = _Embedding(server, body, answer, [fit(body, prompt.token_ids, 1, limit) for prompt in prompts])
    try:
        return json_response(await until_disconnect(request.receive, embedding.whole()))
    finally:
        embedding.close()
