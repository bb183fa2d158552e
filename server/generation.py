"""From a parsed request to pieces of text: admission, detokenising, stop strings. Shared by every endpoint,
streamed or not, so that both give the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import msgspec
from starlette.types import Receive

from nvfp4_runtime.engine.client import AsyncEngine
from nvfp4_runtime.engine.messages import RequestTimes, TokenLogprob, TokenOutput
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import DeadlineExceededError, EngineDeadError, InvalidParameterError, NVFP4Error
from nvfp4_runtime.sampling.params import MAX_SEED, SamplingParams
from nvfp4_runtime.structured.thinking import ThinkingSpan, ThinkingState
from nvfp4_runtime.text.detokenizer import Detokenizer
from nvfp4_runtime.text.tokenizer import LONG_TEXT_CHARS, Tokenizer
from server.deadline import Deadline
from server.errors import GenerationError
from server.metrics import Metrics
from server.protocol.generation import GenerationRequest
from server.request_record import note
from server.terms import Terms

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client is gone; there is nobody to answer."""


@dataclass(frozen=True)
class Job:
    """One choice to generate: what the engine is told, the position in the answer, and where its reasoning may be."""

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    span: ThinkingSpan | None = None


@dataclass(slots=True)
class Piece:
    """News of one choice. The last of a choice carries `finish_reason`; each token id is in exactly one piece.

    A piece may have tokens and no text (half a character, or text that may become a stop string).
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def joined(self, later: Piece) -> Piece:
        """This piece and the next one of the same choice, as one."""
        return Piece(
            self.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop_reason,
        )


@dataclass
class ChoiceState:
    """What is known of one choice so far; complete once its last piece has come. `times`: from its first token on."""

    job: Job
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finished: bool = False
    finish_reason: str | None = None
    times: RequestTimes | None = None
    _thinking: ThinkingState | None = None

    def __post_init__(self) -> None:
        self._thinking = None if self.job.span is None else ThinkingState(self.job.span)

    @property
    def num_reasoning_tokens(self) -> int | None:
        """None where nothing is known of reasoning."""
        return None if self._thinking is None else self._thinking.num_tokens

    def took(self, token_ids: Sequence[int]) -> None:
        """Count tokens of the answer."""
        self.num_tokens += len(token_ids)
        if self._thinking is not None:
            for token_id in token_ids:
                self._thinking.push(token_id)


def chosen_adapter(engine: AsyncEngine, model: str | None) -> str:
    """The LoRA adapter that a request's `model` names, "" for none."""
    return model if model and engine.info.has_adapter(model) else ""


class Generation:
    """The running choices of one HTTP request. Submits all or none; `close` aborts what still runs.

    Raises at construction what the engine's admission raises (RequestError, QueueFullError, EngineDeadError).
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        request: GenerationRequest,
        request_id: str,
        terms: Terms,
        jobs: Sequence[Job],
        kept_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._request = request
        self._kept_special_ids = kept_special_ids  # shown even where special tokens are skipped: parsers need them
        self.choices = [ChoiceState(job) for job in jobs]
        self._streams: list[TokenStream] = []
        self._deadline = Deadline(terms.timeout_seconds, self._expire)
        try:
            for job in jobs:
                stream = engine.submit(
                    job.prompt_token_ids,
                    job.params,
                    request_id=f"{request_id}-{job.index}",
                    cache_salt=terms.salted(request.cache_salt),
                    priority=request.priority,
                    tenant=terms.tenant,
                    adapter=chosen_adapter(engine, request.model),
                )
                self._streams.append(stream)
                if request.stream:
                    stream.bound(terms.max_unread_bytes, partial(engine.abort, stream.request_id))
                metrics.start(stream.request_id, len(job.prompt_token_ids), job.params.max_tokens or 0, terms.tenant)
        except BaseException:  # whatever it was: none of them may run without somebody to take its tokens
            self.close()
            raise
        metrics.accepted(request.n)
        note(self.choices)

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come, in order within each choice. Close the generator to stop early.

        With stream_interval k, a choice's first and last piece come at once, those between for k tokens together.
        """
        interval = self._request.stream_interval if self._request.stream else 1
        return self._pieces() if interval == 1 else self._joined_pieces(interval)

    def _pieces(self) -> AsyncGenerator[Piece, None]:
        # One generator less between the engine and the event of every token, where there is nothing to merge.
        if len(self.choices) == 1:
            return self._choice(self.choices[0], self._streams[0])
        return self._merged_pieces()

    async def _joined_pieces(self, interval: int) -> AsyncGenerator[Piece, None]:
        held: dict[int, Piece] = {}
        begun: set[int] = set()
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if piece.index in held:
                    piece = held.pop(piece.index).joined(piece)
                if piece.index in begun and piece.finish_reason is None and len(piece.token_ids) < interval:
                    held[piece.index] = piece
                    continue
                begun.add(piece.index)
                yield piece

    async def _merged_pieces(self) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=2 * len(self.choices))

        async def pump(choice: ChoiceState, stream: TokenStream) -> None:
            try:
                async for piece in self._choice(choice, stream):
                    await queue.put(piece)
                await queue.put(None)
            except Exception as error:  # noqa: BLE001 - raised again below, where the answer is written
                await queue.put(error)

        tasks = [
            asyncio.create_task(pump(choice, stream))
            for choice, stream in zip(self.choices, self._streams, strict=True)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Abort whatever has not finished. Safe to call twice."""
        self._deadline.cancel()
        for stream, choice in zip(self._streams, self.choices, strict=False):
            if not choice.finished:
                choice.finished = True
                self._metrics.released(stream.request_id)
                self._engine.abort(stream.request_id)

    def _expire(self, error: DeadlineExceededError) -> None:
        """Time is up: what still runs ends in the engine now, and with `error` for whoever reads it."""
        for stream, choice in zip(self._streams, self.choices, strict=False):
            if not choice.finished:
                stream.fail(error)
                self._engine.abort(stream.request_id)

    async def _choice(self, choice: ChoiceState, stream: TokenStream) -> AsyncGenerator[Piece, None]:
        request = self._request
        detokenizer = Detokenizer(
            self._tokenizer,
            stop=request.stop_strings,
            include_stop_str_in_output=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
            min_tokens=request.min_tokens,
            prompt_ids=choice.job.prompt_token_ids,
            kept_special_ids=self._kept_special_ids,
        )
        try:
            async for output in stream:
                if output.times is not None:
                    choice.times = output.times
                if output.finish_reason == "error":
                    choice.finished, choice.finish_reason = True, "error"
                    if output.param is not None:
                        raise InvalidParameterError(output.error or "the request cannot be served", output.param)
                    message = output.error or "the engine could not complete this request"
                    raise GenerationError(message, output.error_code)
                if output.prompt_logprobs:
                    choice.prompt_logprobs += output.prompt_logprobs
                if output.num_cached_tokens > choice.num_cached_tokens:
                    choice.num_cached_tokens = output.num_cached_tokens
                piece = self._piece(choice.job.index, output, detokenizer)
                choice.took(piece.token_ids)
                if piece.finish_reason is not None:
                    choice.finished, choice.finish_reason = True, piece.finish_reason
                    if detokenizer.stopped_by is not None:
                        self._metrics.stopped(stream.request_id, choice.num_tokens)
                    else:
                        self._metrics.released(stream.request_id)
                    if output.finish_reason is None:
                        self._engine.abort(stream.request_id)
                if piece.token_ids or piece.finish_reason is not None:
                    yield piece
                if piece.finish_reason is not None:
                    return
            raise EngineDeadError("the engine ended a request without saying why")
        except NVFP4Error:
            choice.finish_reason = "error"
            self._metrics.failed(stream.request_id)
            raise

    def _piece(self, index: int, output: TokenOutput, detokenizer: Detokenizer) -> Piece:
        """An output with its text. Up to the token that completes a stop string, if one does."""
        token_ids, logprobs, ends = output.token_ids, output.logprobs or [], output.finish_reason is not None
        skips = output.finish_reason == "stop" and not output.ends_whole
        if skips and not self._request.include_stop_str_in_output:
            text, num_taken = detokenizer.push_all(token_ids[:-1])
            if detokenizer.stopped_by is None and token_ids:
                detokenizer.skip()
                num_taken += 1
        else:
            text, num_taken = detokenizer.push_all(token_ids)
        if ends and detokenizer.stopped_by is None:
            text += detokenizer.flush()
        if detokenizer.stopped_by is None:
            return Piece(index, text, token_ids, logprobs, output.finish_reason, output.stop_reason)
        return Piece(index, text, token_ids[:num_taken], logprobs[:num_taken], "stop", detokenizer.stopped_by)


def make_jobs(
    prompts: Sequence[list[int]], params: Sequence[SamplingParams], n: int, span: ThinkingSpan | None = None
) -> list[Job]:
    """Prompt-major: choice prompt x n + i, with seed + i when a seed is given."""
    return [
        Job(p * n + i, ids, one if one.seed is None else _with_seed(one, one.seed + i), span)
        for p, (ids, one) in enumerate(zip(prompts, params, strict=True))
        for i in range(n)
    ]


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    wrapped = seed if seed <= MAX_SEED else seed - 2 * (MAX_SEED + 1)
    return msgspec.structs.replace(params, seed=wrapped)


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Run `work` here when `size` characters are few, else in a thread."""
    return work() if size < LONG_TEXT_CHARS else await asyncio.to_thread(work)


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientDisconnected raised."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(client_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def client_gone(receive: Receive) -> None:
    """Return when the client has disconnected; the request's body has been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass
