"""What keeps the event loop free, and choices apart."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.tokenizer import LONG_TEXT_CHARS
from server.generation import ClientDisconnected, make_jobs, off_loop, until_disconnect
from tests.server.conftest import Serve


async def test_long_texts_are_worked_on_in_a_thread_and_short_ones_here() -> None:
    here = threading.get_ident()
    assert await off_loop(LONG_TEXT_CHARS - 1, threading.get_ident) == here
    assert await off_loop(LONG_TEXT_CHARS, threading.get_ident) != here


def test_choices_are_prompt_major_with_consecutive_seeds() -> None:
    jobs = make_jobs([[1], [2]], [SamplingParams(seed=5), SamplingParams()], 2)
    assert [(job.index, job.prompt_token_ids, job.params.seed) for job in jobs] == [
        (0, [1], 5),
        (1, [1], 6),
        (2, [2], None),
        (3, [2], None),
    ]


def test_seeds_wrap_at_64_bits() -> None:
    jobs = make_jobs([[1]], [SamplingParams(seed=2**63 - 1)], 2)
    assert jobs[1].params.seed == -(2**63)
    jobs[1].params.validate()


async def test_whatever_fails_while_submitting_aborts_what_was_submitted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    submit = server.engine.submit

    def third_fails(*arguments: Any, **options: Any) -> Any:
        if len(server.engine.submitted) == 2:
            raise OverflowError("no error of ours")
        return submit(*arguments, **options)

    monkeypatch.setattr(server.engine, "submit", third_fails)
    assert (await server.complete(n=3)).status_code == 500
    assert len(server.engine.aborted) == 2
    assert server.engine.running == 0


async def test_work_is_cancelled_when_the_client_leaves_first() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnected):
        await until_disconnect(receive, work())
    assert cancelled.is_set()


async def test_result_and_error_of_the_work_come_through_while_the_client_stays() -> None:
    async def stays() -> dict[str, str]:
        await asyncio.sleep(60)
        raise AssertionError

    async def fails() -> None:
        raise ValueError("mine")

    assert await until_disconnect(stays, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="mine"):
        await until_disconnect(stays, fails())
