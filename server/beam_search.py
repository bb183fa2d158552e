"""use_beam_search: the n likeliest continuations, found over the engine's ordinary requests.

Every step asks the engine for one token after each beam, as a request of its own: the prefix cache holds what the beams
share, so a step computes one token per beam and at most a block of tokens besides. Nothing is sampled, so the answer
depends on the prompt alone.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from nvfp4_runtime.engine.messages import TokenLogprob
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidParameterError,
    NVFP4Error,
    QueueFullError,
)
from nvfp4_runtime.sampling.params import MAX_LOGPROBS, SamplingParams
from nvfp4_runtime.text.detokenizer import Detokenizer
from server.deadline import Deadline
from server.errors import GenerationError
from server.generation import ChoiceState, Generation, Job, Piece, chosen_adapter
from server.protocol.generation import GenerationRequest
from server.request_record import note
from server.state import Answer, ServerState

RETRY_SECONDS = 0.02


def start_generation(
    server: ServerState,
    request: GenerationRequest,
    answer: Answer,
    jobs: Sequence[Job],
    kept_special_ids: frozenset[int] = frozenset(),
) -> Generation | BeamGeneration:
    """The running choices of a request: by beam search if it asks for that, else sampled one by one."""
    if request.use_beam_search:
        if any(job.params.structured is not None for job in jobs):
            raise InvalidParameterError("use_beam_search cannot be had with structured output", "use_beam_search")
        if any(job.params.thinking is not None for job in jobs):
            raise InvalidParameterError("use_beam_search cannot be had with reasoning_effort none", "use_beam_search")
        return BeamGeneration(server, request, answer, jobs)
    engine, tokenizer, metrics = server.engine, server.text.tokenizer, server.metrics
    return Generation(engine, tokenizer, metrics, request, answer.engine_id, answer.terms, jobs, kept_special_ids)


@dataclass(frozen=True)
class Beam:
    """A continuation, the logprobs of its tokens one by one, and their sum."""

    entries: tuple[TokenLogprob, ...] = ()
    logprob: float = 0.0
    ended: bool = False

    @property
    def token_ids(self) -> list[int]:
        return [entry.token_id for entry in self.entries]

    def extended(self, entry: TokenLogprob, ended: bool) -> Beam:
        return Beam((*self.entries, entry), self.logprob + entry.logprob, ended)


def score(beam: Beam, num_prompt: int, length_penalty: float) -> float:
    """vLLM's: the sum of logprobs over the sequence's length (prompt included, EOS not) to the power of the penalty."""
    length = float(max(1, num_prompt + len(beam.entries) - beam.ended))
    return beam.logprob / math.pow(length, length_penalty)


def best_possible(beam: Beam, num_prompt: int, max_tokens: int, length_penalty: float) -> float:
    """What `beam` could at most score once it is longer: its sum can only fall, its length only grow."""
    longest = num_prompt + max_tokens if length_penalty > 0 else num_prompt + len(beam.entries)
    return beam.logprob / math.pow(max(1, longest), length_penalty)


class BeamGeneration:
    """As Generation: `choices`, `pieces`, `close`. A choice comes as one piece, when the search is over.

    Raises at construction what the engine's admission raises; later a full queue is waited for.
    """

    def __init__(self, server: ServerState, request: GenerationRequest, answer: Answer, jobs: Sequence[Job]) -> None:
        self._engine = server.engine
        self._metrics = server.metrics
        self._tokenizer = server.text.tokenizer
        self._request = request
        self._request_id = answer.engine_id
        self._terms = answer.terms
        self._eos = frozenset(() if request.ignore_eos else server.engine.info.eos_token_ids)
        self._num_submitted = 0
        self._running: dict[str, TokenStream] = {}
        self._expired: DeadlineExceededError | None = None
        self._deadline = Deadline(answer.terms.timeout_seconds, self._expire)
        self.choices = [ChoiceState(job) for job in jobs]
        self._groups = [self.choices[i : i + request.n] for i in range(0, len(jobs), request.n)]
        try:
            self._first = [self._submit(group[0].job.prompt_token_ids) for group in self._groups]
        except BaseException:  # whatever it was: none of them may run without somebody to take its tokens
            self.close()
            raise
        self._metrics.accepted(request.n)
        note(self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """One piece per choice, best beam first."""
        searches = [
            asyncio.create_task(self._search(group, first))
            for group, first in zip(self._groups, self._first, strict=True)
        ]
        try:
            for search, group in zip(searches, self._groups, strict=True):
                for choice, beam in zip(group, await search, strict=True):
                    choice.took(beam.token_ids)
                    choice.finished, choice.finish_reason = True, "stop" if beam.ended else "length"
                    yield self._piece(choice.job, beam)
        finally:
            for search in searches:
                search.cancel()
            await asyncio.gather(*searches, return_exceptions=True)

    def close(self) -> None:
        """Abort whatever has not finished. Safe to call twice."""
        self._deadline.cancel()
        for request_id in list(self._running):
            del self._running[request_id]
            self._metrics.released(request_id)
            self._engine.abort(request_id)

    def _expire(self, error: DeadlineExceededError) -> None:
        self._expired = error
        for request_id, stream in self._running.items():
            stream.fail(error)
            self._engine.abort(request_id)

    async def _search(self, group: list[ChoiceState], first: TokenStream) -> list[Beam]:
        """The best beams, as many as the group has choices."""
        job, width, penalty = group[0].job, len(group), self._request.length_penalty
        num_prompt, max_tokens = len(job.prompt_token_ids), job.params.max_tokens or 1
        beams, finished = [Beam()], list[Beam]()
        answers = [await self._next_token(first, group)]
        for step in range(max_tokens):
            if step > 0:
                streams = [await self._resubmit(job.prompt_token_ids + beam.token_ids) for beam in beams]
                answers = await asyncio.gather(*map(self._next_token, streams))
            longer: list[Beam] = []
            for beam, answer in zip(beams, answers, strict=True):
                for rank, (token_id, logprob) in enumerate(answer.top[: 2 * width], start=1):
                    entry = TokenLogprob(token_id, logprob, rank, answer.top)
                    ended = token_id in self._eos
                    (finished if ended else longer).append(beam.extended(entry, ended))
            beams = sorted(longer, key=lambda beam: -beam.logprob)[:width]  # all of one length
            finished = sorted(finished, key=lambda beam: -score(beam, num_prompt, penalty))[:width]
            hope = max((best_possible(beam, num_prompt, max_tokens, penalty) for beam in beams), default=None)
            if hope is None:
                break
            if len(finished) == width and hope <= score(finished[-1], num_prompt, penalty):
                break
        ranked = sorted(finished + beams, key=lambda beam: -score(beam, num_prompt, penalty))
        return ranked[:width]

    def _piece(self, job: Job, beam: Beam) -> Piece:
        request = self._request
        detokenizer = Detokenizer(
            self._tokenizer,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
            prompt_ids=job.prompt_token_ids,
        )
        shown = beam.token_ids[:-1] if beam.ended and not request.include_stop_str_in_output else beam.token_ids
        text = "".join(map(detokenizer.push, shown)) + detokenizer.flush()
        entries = [] if request.num_logprobs is None else list(beam.entries)
        return Piece(job.index, text, beam.token_ids, entries, "stop" if beam.ended else "length")

    # -- the engine -------------------------------------------------------------------------------------------------

    def _submit(self, token_ids: list[int]) -> TokenStream:
        """One more token after `token_ids`."""
        if self._expired is not None:
            raise self._expired
        request_id = f"{self._request_id}-beam-{self._num_submitted}"
        num_logprobs = min(MAX_LOGPROBS, max(2 * self._request.n, self._request.num_logprobs or 0))
        stream = self._engine.submit(
            token_ids,
            SamplingParams(temperature=0.0, max_tokens=1, logprobs=num_logprobs, ignore_eos=True),
            request_id=request_id,
            cache_salt=self._terms.salted(self._request.cache_salt),
            priority=self._request.priority,
            tenant=self._terms.tenant,
            adapter=chosen_adapter(self._engine, self._request.model),
        )
        self._num_submitted += 1
        self._running[request_id] = stream
        self._metrics.start(request_id, len(token_ids), 1, self._terms.tenant)
        return stream

    async def _resubmit(self, token_ids: list[int]) -> TokenStream:
        while True:
            try:
                return self._submit(token_ids)
            except QueueFullError:  # the search was admitted: it goes on when there is room
                await asyncio.sleep(RETRY_SECONDS)

    async def _next_token(self, stream: TokenStream, group: Sequence[ChoiceState] = ()) -> TokenLogprob:
        try:
            async for output in stream:
                if output.finish_reason == "error":
                    raise GenerationError(
                        output.error or "the engine could not complete this request", output.error_code
                    )
                if output.logprobs:
                    for choice in group:
                        choice.num_cached_tokens = output.num_cached_tokens
                        choice.times = output.times
                    self._running.pop(stream.request_id, None)
                    self._metrics.released(stream.request_id)
                    return output.logprobs[0]
            raise EngineDeadError("the engine ended a request without saying why")
        except NVFP4Error:  # not when cancelled: then it still runs, and `close` aborts it
            self._running.pop(stream.request_id, None)
            self._metrics.failed(stream.request_id)
            raise
