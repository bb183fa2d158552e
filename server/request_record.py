"""What is known of one HTTP request: filled in by whoever knows, read at its end by log, metrics and traces."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from nvfp4_runtime.engine.messages import RequestTimes
from nvfp4_runtime.sampling.params import SamplingParams


class Job(Protocol):
    @property
    def prompt_token_ids(self) -> list[int]: ...

    @property
    def params(self) -> SamplingParams: ...


class Choice(Protocol):
    """What of a generation's choice is told; see server/generation.py."""

    num_tokens: int
    num_cached_tokens: int
    finish_reason: str | None
    times: RequestTimes | None

    @property
    def job(self) -> Job: ...


class Observer(Protocol):
    """Told of every request when it is over."""

    def ended(self, record: RequestRecord) -> None: ...


@dataclass
class RequestRecord:
    """One request, from its first byte on.

    started      time.monotonic(), as first_byte
    first_byte   when the answer's first byte after its head had been handed to the system; 0 before
    handler      the route's path with its parameters' names; "" while unknown and where nothing answers
    status       0 until an answer begins
    seconds      until the last byte, once it is over
    model        as served
    answer_id    as in the answer's body
    outcome      "client gone" where the client left first
    choices      one by one, prompts x n
    """

    request_id: str
    method: str
    path: str
    started: float
    handler: str = ""
    status: int = 0
    first_byte: float = 0.0
    seconds: float = 0.0
    model: str = ""
    answer_id: str = ""
    outcome: str = ""
    choices: list[Choice] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all choices' prompts, each counted once."""
        return sum(len(ids) for ids in {id(ids): ids for ids in self._prompts()}.values())

    def _prompts(self) -> list[list[int]]:
        return [choice.job.prompt_token_ids for choice in self.choices]

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        return max((choice.num_cached_tokens for choice in self.choices), default=0)

    @property
    def finish_reasons(self) -> list[str]:
        return [choice.finish_reason or "abort" for choice in self.choices]

    @property
    def times(self) -> RequestTimes | None:
        """The choice's that gave the first token; None before one did."""
        found = [choice.times for choice in self.choices if choice.times is not None and choice.times.first_token]
        return min(found, key=lambda times: times.first_token, default=None)


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def begin(record: RequestRecord) -> None:
    """`record` is the request's that this task, and those it starts, work for."""
    _current.set(record)


def note(choices: Sequence[Choice], model: str = "", answer_id: str = "") -> None:
    """Tell the request's record, where there is one, what is being generated for it."""
    record = _current.get()
    if record is None:
        return
    record.choices += choices
    record.model, record.answer_id = model or record.model, answer_id or record.answer_id
