"""Open loops do not wait for answers, times count from when requests were due, and a stalled client is reported."""

from __future__ import annotations

import asyncio
import time

from loadtest.traffic.call import Call, Conversation
from loadtest.traffic.drive import closed_loop, open_loop
from loadtest.traffic.watch import MAX_LAG_MS, Condition, Watch
from tests.loadtest.traffic.scripted import delta, scripted, usage, whole

ANSWER = whole(delta(content="a"), delta(content="b"), usage(4, 2))
CALL = Call((("user", "x"),), 2)


def talks(*instants: float) -> list[Conversation]:
    return [Conversation((CALL,), at=at) for at in instants]


async def answer_at_once(writer, body, number):
    writer.write(ANSWER)


def test_requests_behind_a_slow_one_count_from_when_they_were_due():
    turn = asyncio.Lock()

    async def one_at_a_time(writer, body, number):
        async with turn:
            await asyncio.sleep(0.05)
            writer.write(ANSWER)

    with scripted(one_at_a_time) as endpoint:
        traffic = asyncio.run(open_loop(endpoint, talks(*(0.01 * i for i in range(8)))))
    firsts = sorted(outcome.ttft for outcome in traffic.outcomes)
    assert all(outcome.failure is None for outcome in traffic.outcomes)
    # the last was due after 0.07 s and answered after 8 x 0.05 s at the earliest
    assert firsts[-1] >= 8 * 0.05 - 0.07 - 0.01
    assert all(outcome.late >= 0 for outcome in traffic.outcomes)


def test_a_closed_loop_has_as_many_requests_out_as_it_has_users():
    out = most = 0

    async def count(writer, body, number):
        nonlocal out, most
        out += 1
        most = max(most, out)
        await asyncio.sleep(0.02)
        out -= 1
        writer.write(ANSWER)

    with scripted(count) as endpoint:
        traffic = asyncio.run(closed_loop(endpoint, talks(*[0.0] * 12), 3))
    assert most == 3
    assert len(traffic.outcomes) == 12


def test_turns_of_a_conversation_follow_each_other_after_thinking():
    with scripted(answer_at_once) as endpoint:
        talk = Conversation((CALL, CALL, CALL), think_seconds=0.05)
        first, second, third = asyncio.run(open_loop(endpoint, [talk])).outcomes
    assert second.due >= first.ended + 0.05
    assert third.due >= second.ended + 0.05


def test_a_turn_that_fails_fails_those_after_it():
    async def refuse_second(writer, body, number):
        writer.write(ANSWER if number != 1 else b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")

    with scripted(refuse_second) as endpoint:
        outcomes = asyncio.run(closed_loop(endpoint, [Conversation((CALL, CALL, CALL))], 1)).outcomes
    assert [outcome.failure for outcome in outcomes] == [None, "HTTP 503", "an earlier turn failed"]


def test_progress_is_told_to_the_last_call():
    told = []
    with scripted(answer_at_once) as endpoint:
        asyncio.run(closed_loop(endpoint, talks(0, 0, 0), 2, lambda done, of: told.append((done, of))))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_planted_stall_of_the_client_makes_the_run_invalid():
    async def stalled(endpoint):
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, time.sleep, 0.4)  # whoever writes a client writes one of these
        return await open_loop(endpoint, talks(*(0.01 * i for i in range(80))))

    with scripted(answer_at_once) as endpoint:
        condition = asyncio.run(stalled(endpoint)).condition
    assert condition.lag_ms_max >= 350
    assert any(why.startswith("client stalled") for why in condition.complaints())
    assert any(why.startswith("client late") for why in condition.complaints())


def test_a_stall_counts_as_often_as_timers_fell_into_it():
    watch = Watch()
    for _ in range(950):
        watch._note(0.0004)
    watch._note(0.3)  # once in ten seconds; among one sample per timer it would be the 99.9th percentile
    lags = sorted(watch._lags)
    assert lags[int(0.99 * len(lags))] > MAX_LAG_MS / 1000


def test_a_client_that_keeps_up_has_no_complaints_and_each_limit_has_one():
    assert Condition(3.0, 9.0, 4.0, 0.5).complaints() == []
    assert len(Condition(30.0, 90.0, 4.0, 0.5).complaints()) == 1
    assert len(Condition(30.0, 90.0, 40.0, 0.95).complaints()) == 3
