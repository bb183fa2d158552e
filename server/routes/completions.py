"""POST /v1/completions: parse, submit, format."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from nvfp4_runtime.engine.messages import TokenLogprob
from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.thinking import ThinkingBudget
from server.beam_search import start_generation
from server.errors import json_response
from server.formatting import CompletionLogprobs, TokenNames, usage_of
from server.generation import ChoiceState, Piece, make_jobs, off_loop, until_disconnect
from server.openapi import GENERATION_RESPONSES
from server.prompts import EncodedPrompt, bad_words_token_ids, encode_prompts, fit, num_chars, output_budget
from server.protocol.completions import CompletionRequest
from server.reasoning.tokens import thinking_of
from server.state import Answer, ServerState
from server.streaming import ChunkWriter, EventStream

router = APIRouter()
DEFAULT_MAX_TOKENS = 16
PROMPT_END = 16  # tokens that are looked at for an opened reasoning


@dataclass
class _Choice:
    """One choice of the answer while it grows."""

    prompt: EncodedPrompt
    state: ChoiceState
    logprobs: CompletionLogprobs | None
    begun: bool = False
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Completion:
    """A running completion request: knows how its pieces are written."""

    def __init__(self, server: ServerState, body: CompletionRequest, answer: Answer, prompts: list[EncodedPrompt]):
        self.server = server
        self.body = body
        self.answer = answer
        self.names = TokenNames(server.text.tokenizer, body.return_tokens_as_token_ids)
        self.echo_only = body.echo and body.max_tokens == 0
        limit = server.engine.info.max_model_len
        if len(prompts) * body.n > server.config.max_choices:
            raise InvalidParameterError(
                f"{len(prompts)} prompts with n={body.n} ask for {len(prompts) * body.n} choices; "
                f"at most {server.config.max_choices} are allowed",
                "prompt",
            )
        fitted, params = [], []
        bad_words = bad_words_token_ids(body.bad_words, server.text.tokenizer)
        for prompt in prompts:
            ids = fit(body, prompt.token_ids, body.max_tokens, limit)
            asked = 1 if self.echo_only else body.max_tokens
            default = int(server.config.default_sampling.get("max_tokens", DEFAULT_MAX_TOKENS))
            budget = output_budget(asked, default, len(ids), limit, "max_tokens")
            defaults = server.config.default_sampling
            one = body.sampling_params(budget, defaults, self._prompt_logprobs(), bad_words)
            thinking = self._thinking(ids)
            params.append(msgspec.structs.replace(one, structured=body.structured_spec(), thinking=thinking))
            fitted.append(prompt if ids is prompt.token_ids and prompt.text else EncodedPrompt("", ids))
        jobs = make_jobs([prompt.token_ids for prompt in fitted], params, body.n)
        self.generation = start_generation(server, body, answer, jobs)
        self.choices = [
            _Choice(fitted[i // body.n], state, None if body.logprobs is None else self._writer(body.logprobs))
            for i, state in enumerate(self.generation.choices)
        ]

    def _writer(self, num_top: int) -> CompletionLogprobs:
        return CompletionLogprobs(self.names, None if self.body.logprob_token_ids is not None else num_top)

    def _prompt_logprobs(self) -> int | None:
        """What the engine computes: for prompt_logprobs, and for the prompt's part of echoed logprobs."""
        wanted = [self.body.prompt_logprobs, self.body.logprobs if self.body.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def _thinking(self, prompt_token_ids: list[int]) -> ThinkingBudget | None:
        """The bound of the reasoning that the prompt leads into, if the request sets one."""
        if self.body.thinking_token_budget is None:
            return None
        end = self.server.text.tokenizer.decode(prompt_token_ids[-PROMPT_END:], skip_special_tokens=False)
        return thinking_of(self.server.styles.reasoning_tokens, end, self.body.thinking_token_budget)[1]

    def echo_text(self, choice: _Choice) -> str:
        if not self.body.echo:
            return ""
        return choice.prompt.text or self.server.text.tokenizer.decode(
            choice.prompt.token_ids, skip_special_tokens=self.body.skip_special_tokens
        )

    def echo_logprobs(self, choice: _Choice) -> list[TokenLogprob | None]:
        return list(choice.state.prompt_logprobs) if self.body.echo else []

    def take(self, piece: Piece) -> _Choice:
        """Account for a piece; with echo and max_tokens 0 what was generated does not exist."""
        if self.echo_only:
            piece.text, piece.token_ids, piece.logprobs, piece.stop_reason = "", [], [], None
            piece.finish_reason = "length" if piece.finish_reason else None
            self.generation.choices[piece.index].num_tokens = 0
        return self.choices[piece.index]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        body, answer = self.body, self.answer
        options = body.stream_options
        with_usage = options is not None and options.include_usage
        details = self.server.config.enable_prompt_tokens_details
        chunks = ChunkWriter(answer.id, "text_completion", answer.created, answer.model, self.server.fingerprint)
        always = body.logprobs is not None or body.return_token_ids
        continuous = with_usage and options is not None and options.continuous_usage_stats
        only_text = not (always or body.echo or continuous)
        writers = [chunks.text_chunk(partial(self.text_choice, i)) for i in range(len(self.choices))]
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                if only_text and piece.finish_reason is None:
                    if piece.text:
                        yield writers[piece.index](piece.text)
                    continue
                choice = self.take(piece)
                text, entries = piece.text, list[TokenLogprob | None](piece.logprobs)
                begins = not choice.begun and (body.echo or body.return_token_ids)
                if begins:
                    text = self.echo_text(choice) + text
                    entries = self.echo_logprobs(choice) + entries
                if not text and not always and not begins and piece.finish_reason is None:
                    continue
                choice.begun = True
                written = self.write_choice(choice, piece, text, entries)
                if begins and body.return_token_ids:
                    written["prompt_token_ids"] = choice.prompt.token_ids
                extra = {}
                if continuous:
                    extra["usage"] = usage_of(self.generation.choices, body.n, details)
                yield chunks.choice(written, extra, last=piece.finish_reason is not None)
        if with_usage:
            yield chunks.usage(usage_of(self.generation.choices, body.n, details))

    def write_choice(
        self, choice: _Choice, piece: Piece, text: str, entries: list[TokenLogprob | None]
    ) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            logprobs = choice.logprobs.of(entries, choice.prompt.token_ids[0])
        written = self.text_choice(piece.index, text)
        written |= {"logprobs": logprobs, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if self.body.return_token_ids:
            written["token_ids"] = piece.token_ids
        return written

    @staticmethod
    def text_choice(index: int, text: str) -> dict[str, Any]:
        """A choice's text as it goes on, with nothing else to say of it."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer: all fields, nulls included."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                choice = self.take(piece)
                choice.text.append(piece.text)
                choice.token_ids += piece.token_ids
                choice.entries += piece.logprobs
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        details = self.server.config.enable_prompt_tokens_details
        return {
            "id": self.answer.id,
            "object": "text_completion",
            "created": self.answer.created,
            "model": self.answer.model,
            "choices": [self.whole_choice(choice) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": self.server.fingerprint,
            "usage": usage_of(self.generation.choices, self.body.n, details),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def whole_choice(self, choice: _Choice) -> dict[str, Any]:
        body = self.body
        entries = self.echo_logprobs(choice) + choice.entries
        shown = choice.state.prompt_logprobs if body.prompt_logprobs is not None else None
        return {
            "index": choice.state.job.index,
            "text": self.echo_text(choice) + "".join(choice.text),
            "logprobs": choice.logprobs.of(entries, choice.prompt.token_ids[0]) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if body.return_token_ids else None,
            "prompt_logprobs": None if shown is None else self.names.prompt_logprobs(shown, body.prompt_logprobs or 0),
            "prompt_token_ids": choice.prompt.token_ids if body.return_token_ids else None,
            "routed_experts": None,
        }


@router.post("/v1/completions", responses=GENERATION_RESPONSES, response_class=Response)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete one or several prompts."""
    server = ServerState.of(request)
    answer = Answer.begin("cmpl", server, request, body)
    body.check(server.config.max_n)
    prompts = await off_loop(
        num_chars(body.prompt),
        lambda: encode_prompts(body.prompt, server.text.tokenizer, add_special_tokens=body.add_special_tokens),
    )
    completion = _Completion(server, body, answer, prompts)
    if body.stream:
        return EventStream(completion.stream(), completion.generation.close, server.config.slow_client_seconds)
    try:
        return json_response(await until_disconnect(request.receive, completion.whole()))
    finally:
        completion.generation.close()
