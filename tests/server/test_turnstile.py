"""A burst of requests begins a few per turn of the event loop; nothing is lost, and probes pass."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from server.turnstile import BEGUN_PER_TURN, Turnstile


class Burst:
    """An app behind a turnstile that notes in which turn of the loop each request began."""

    def __init__(self) -> None:
        self.turn = 0
        self.begun: list[tuple[str, int]] = []
        self.gate = Turnstile(self._app)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append((scope["path"], self.turn))

    def start(self, path: str, method: str = "POST") -> asyncio.Task[None]:
        unused: Any = None
        return asyncio.create_task(self.gate({"type": "http", "method": method, "path": path}, unused, unused))

    async def run_turns(self, count: int) -> None:
        for _ in range(count):
            self.turn += 1
            await asyncio.sleep(0)


async def test_a_burst_begins_a_few_per_turn_in_its_order() -> None:
    burst = Burst()
    tasks = [burst.start(str(i)) for i in range(5 * BEGUN_PER_TURN + 1)]
    await burst.run_turns(20)
    assert [path for path, _ in burst.begun] == [str(i) for i in range(len(tasks))]
    turns = [turn for _, turn in burst.begun]
    assert max(turns.count(turn) for turn in turns) == BEGUN_PER_TURN
    assert all(task.done() for task in tasks)


async def test_who_comes_during_a_burst_waits_behind_it_but_not_a_probe() -> None:
    burst = Burst()
    for i in range(3 * BEGUN_PER_TURN):
        burst.start(str(i))
    await burst.run_turns(1)
    late = burst.start("late")
    probe = burst.start("/health", "GET")
    await burst.run_turns(20)
    paths = [path for path, _ in burst.begun]
    assert paths[-1] == "late"
    assert paths.index("/health") < len(paths) - 2
    assert late.done()
    assert probe.done()


async def test_one_that_is_cancelled_while_it_waits_takes_no_place() -> None:
    burst = Burst()
    tasks = [burst.start(str(i)) for i in range(3 * BEGUN_PER_TURN)]
    await burst.run_turns(1)
    tasks[-1].cancel()
    tasks[-2].cancel()
    await burst.run_turns(20)
    assert len(burst.begun) == len(tasks) - 2
    again = burst.start("again")
    await burst.run_turns(2)
    assert burst.begun[-1][0] == "again"
    assert again.done()
