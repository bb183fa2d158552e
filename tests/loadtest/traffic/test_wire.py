"""What the client makes of an answer, wherever its bytes are cut and however it ends."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from loadtest.traffic.call import Call, Outcome
from loadtest.traffic.wire import Client, Endpoint, read_answer
from tests.loadtest.traffic.scripted import HEAD, chunk, delta, event, scripted, usage, whole

CALL = Call((("user", "hello"),), 3)
ANSWER = whole(delta(role="assistant", content=""), delta(content="a"), delta(content="bc"), usage(5, 3))


def send(endpoint: Endpoint, count: int = 1, timeout: float = 20.0) -> list[Outcome]:
    async def main() -> list[Outcome]:
        client = Client(endpoint, time.perf_counter(), timeout)
        try:
            return [await client.send(CALL, 0.0) for _ in range(count)]
        finally:
            client.close()

    return asyncio.run(main())


def answering(data: bytes, close: bool = False):
    async def answer(writer, body, number):
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return answer


def test_an_answer_is_counted_by_usage_and_timed_by_its_text():
    asked = []

    async def answer(writer, body, number):
        asked.append(body)
        writer.write(HEAD + chunk(event(delta(role="assistant", content=""))))
        await asyncio.sleep(0.1)
        writer.write(chunk(event(delta(content="a"))))
        await asyncio.sleep(0.05)
        writer.write(
            chunk(event(delta(content="bc"))) + chunk(event(usage(5, 3))) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
        )

    with scripted(answer) as endpoint:
        (outcome,) = send(endpoint)
    assert outcome.failure is None
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.answer_id) == (5, 3, "a1")
    assert len(outcome.arrivals) == 2  # the first event brings a role and no text
    assert outcome.ttft >= 0.1
    assert outcome.gaps[0] >= 0.04
    assert outcome.tpot == pytest.approx(outcome.gaps[0] / 2)  # three tokens came, so two after the first
    assert outcome.e2e >= outcome.ttft + outcome.gaps[0]
    assert asked[0]["ignore_eos"] is True
    assert asked[0]["stream_options"] == {"include_usage": True}
    assert asked[0]["max_tokens"] == 3


@pytest.mark.parametrize("size", [1, 7, 64])
def test_events_are_found_wherever_reads_cut_them(size):
    async def answer(writer, body, number):
        for start in range(0, len(ANSWER), size):
            writer.write(ANSWER[start : start + size])
            await asyncio.sleep(0)

    with scripted(answer) as endpoint:
        (outcome,) = send(endpoint)
    assert outcome.failure is None
    assert outcome.completion_tokens == 3
    assert len(outcome.arrivals) == 2


def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_is_replaced():
    async def answer(writer, body, number):
        writer.write(ANSWER)
        if number == 1:
            await writer.drain()
            writer.close()  # without saying so: the client meets it with its next request

    with scripted(answer) as endpoint:
        outcomes = send(endpoint, 4)
    assert [outcome.failure for outcome in outcomes] == [None] * 4


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", "HTTP 429"),
        (whole({"error": {"message": "engine died"}}), "error event: .*engine died"),
        (whole(delta(role="assistant"), usage(5, 3)), "an answer without text"),
        (whole(delta(content="a")), "no usage"),
        (whole(b"{not json"), "not JSON"),
        (HEAD + chunk(event(delta(content="a"))) + b"0\r\n\r\n", r"without \[DONE\]"),
        (b"garbage\r\n\r\n", "not HTTP"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_with_a_reason(data, failure):
    with scripted(answering(data)) as endpoint:
        (outcome,) = send(endpoint)
    assert outcome.failure is not None
    assert re.search(failure, outcome.failure), outcome.failure


def test_a_connection_that_ends_early_is_a_failure():
    with scripted(answering(HEAD + chunk(event(delta(content="a"))), close=True)) as endpoint:
        (outcome,) = send(endpoint)
    assert outcome.failure is not None
    assert "closed before" in outcome.failure


def test_an_answer_that_ends_with_its_connection_is_whole():
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    body = event(delta(content="a")) + event(usage(1, 1)) + event(b"[DONE]")
    with scripted(answering(head + body, close=True)) as endpoint:
        (outcome,) = send(endpoint)
    assert outcome.failure is None
    assert outcome.completion_tokens == 1


def test_nobody_waits_for_ever():
    with scripted(answering(HEAD)) as endpoint:
        (outcome,) = send(endpoint, timeout=0.2)
    assert outcome.failure == "no whole answer within 0.2 s"


def test_a_server_that_is_not_there_is_a_failure_of_each_request():
    (outcome,) = send(Endpoint("http://127.0.0.1:9", "m"))
    assert outcome.failure is not None
    assert outcome.failure.startswith("no connection")


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="expected a URL such as"):
        Client(Endpoint("127.0.0.1:8000", "m"), 0.0)


def test_reasoning_and_tool_calls_are_text_too():
    outcome = Outcome(0.0)
    pieces = [
        (1.0, event(delta(reasoning_content="hm"))),
        (2.0, event(delta(tool_calls=[{"index": 0}]))),
        (3.0, event(usage(1, 2)) + event(b"[DONE]")),
    ]
    read_answer(outcome, 200, pieces, 0.5)
    assert outcome.failure is None
    assert outcome.arrivals == [0.5, 1.5]
