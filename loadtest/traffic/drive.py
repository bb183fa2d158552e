"""Open and closed loops: when conversations begin, and everything that came of them."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from loadtest.traffic.call import Conversation, Outcome
from loadtest.traffic.pacer import Pacer
from loadtest.traffic.watch import Condition, Watch
from loadtest.traffic.wire import Client, Endpoint

T = TypeVar("T")
LEAD_SECONDS = 0.05  # before the first request is due
Progress = Callable[[int, int], None]  # calls ended, calls in all


@dataclass(frozen=True)
class Traffic:
    """All that came of one run, and how the client fared."""

    outcomes: list[Outcome]
    condition: Condition


def run(main: Coroutine[Any, Any, T]) -> T:
    """In uvloop's event loop where that is installed: less of the cores that client and server often share."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def open_loop(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    progress: Progress | None = None,
    timeout_seconds: float = 600.0,
) -> Traffic:
    """Each conversation begins when it is due, whatever became of the others."""
    ordered = sorted(conversations, key=lambda conversation: conversation.at)
    async with _Session(endpoint, ordered, progress, timeout_seconds) as session:
        pacer = Pacer([session.started + conversation.at for conversation in ordered])
        tasks = []
        try:
            for conversation in ordered:
                await pacer.next()
                tasks.append(asyncio.create_task(session.converse(conversation, conversation.at)))
            await asyncio.gather(*tasks)
        finally:
            pacer.stop()
            for task in tasks:
                task.cancel()
    return session.traffic


async def closed_loop(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    concurrency: int,
    progress: Progress | None = None,
    timeout_seconds: float = 600.0,
) -> Traffic:
    """`concurrency` users, each taking the next conversation when its last one has ended."""
    queue = iter(conversations)
    async with _Session(endpoint, conversations, progress, timeout_seconds) as session:
        await asyncio.sleep(session.started - time.perf_counter())

        async def user() -> None:
            for conversation in queue:
                await session.converse(conversation, time.perf_counter() - session.started)

        await asyncio.gather(*(user() for _ in range(concurrency)))
    return session.traffic


class _Session:
    """A client and its watch for the time of one run."""

    def __init__(
        self, endpoint: Endpoint, conversations: Sequence[Conversation], progress: Progress | None, timeout: float
    ) -> None:
        self.started = time.perf_counter() + LEAD_SECONDS
        self.traffic: Traffic
        self._client = Client(endpoint, self.started, timeout)
        self._watch = Watch()
        self._outcomes: list[Outcome] = []
        self._lates: list[float] = []
        self._total = sum(len(conversation.calls) for conversation in conversations)
        self._progress = progress or (lambda ended, total: None)
        self._quiet = _no_garbage_collection()

    async def __aenter__(self) -> _Session:
        self._quiet.__enter__()
        self._watch.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        condition = await self._watch.stop(self._lates)
        self._client.close()
        self._quiet.__exit__(None, None, None)
        self.traffic = Traffic(self._outcomes, condition)

    async def converse(self, conversation: Conversation, due: float) -> None:
        """The calls of a conversation in turn; one that fails ends it, and those after it fail with it."""
        for i, call in enumerate(conversation.calls):
            outcome = await self._client.send(call, due)
            if outcome.sent:
                self._lates.append(outcome.late)
            self._note(outcome)
            if outcome.failure is not None:
                for left in conversation.calls[i + 1 :]:
                    self._note(Outcome(due, left.max_tokens, failure="an earlier turn failed", ended=outcome.ended))
                return
            if i + 1 < len(conversation.calls):
                due = time.perf_counter() - self.started + conversation.think_seconds
                await asyncio.sleep(conversation.think_seconds)

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._progress(len(self._outcomes), self._total)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection pauses the client, and that would be measured. Runs are bounded, and so is what is left lying."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
