"""A request's time: 504 before the first token, an error event after, and nothing left running."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nvfp4_runtime.engine.messages import TokenLogprob, TokenOutput
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import SlowReaderError
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve, assert_error, events
from tests.server.test_disconnect import BODIES, Client, until

MESSAGES = [{"role": "user", "content": "Hi"}]
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 200}),
    ("/v1/completions", {"prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 200}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 200, "use_beam_search": True}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 200}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 200}),
    ("/v1/messages", {"model": "tiny", "messages": MESSAGES, "max_tokens": 200}),
    ("/v1/embeddings", {"input": ["Hi", "Ho"]}),
]


@pytest.mark.parametrize(("path", "body"), WAYS)
async def test_time_that_is_up_before_the_first_token_is_a_504(serve: Serve, path: str, body: dict[str, Any]) -> None:
    server = await serve()
    server.engine.gate.clear()
    response = await server.post(path, body | {"timeout": 0.05})
    assert response.status_code == 504, response.text
    assert "within its 0.05 seconds" in response.text
    assert server.engine.running == 0, "its blocks are back"
    server.engine.gate.set()
    assert (await server.post(path, body | {"timeout": 30})).status_code == 200


@pytest.mark.parametrize(("path", "body"), [way for way in WAYS[:4] if "use_beam_search" not in way[1]])
async def test_time_that_is_up_in_a_stream_is_an_error_event(serve: Serve, path: str, body: dict[str, Any]) -> None:
    server = await serve(FakeEngine(step_seconds=0.01), request_timeout_seconds=0.3)
    chunks = events(await server.post(path, body | {"stream": True}))
    assert chunks[0]["choices"]
    assert chunks[-1]["error"]["code"] == 504
    assert server.engine.running == 0


async def test_an_answer_within_its_time_is_whole_and_leaves_no_timer(serve: Serve) -> None:
    server = await serve(request_timeout_seconds=0.2)
    assert (await server.complete(max_tokens=5)).status_code == 200
    await asyncio.sleep(0.3)
    assert server.engine.aborted == []


@pytest.mark.parametrize("timeout", [0, -1, 601, 1e30, True, "soon", float("nan")])
@pytest.mark.parametrize(("path", "body"), WAYS[::3])
async def test_timeout_may_only_lower_the_servers(serve: Serve, path: str, body: dict[str, Any], timeout: Any) -> None:
    server = await serve()
    if timeout != timeout:
        content = '{"prompt": "Hi", "timeout": NaN}'
        response = await server.http.post(WAYS[0][0], content=content, headers={"content-type": "application/json"})
        assert_error(response, 400, "timeout")
    else:
        assert_error(await server.post(path, body | {"timeout": timeout}), 400, "timeout")


async def test_a_reader_that_lags_too_far_behind_is_aborted_at_once(serve: Serve) -> None:
    info = fake_info(max_model_len=4096)
    server = await serve(FakeEngine(info=info), stream_buffer_bytes=10_000, slow_client_seconds=60)
    slow = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True, "max_tokens": 4000})
    await until(lambda: len(slow.sent) > 3)
    slow.reading.clear()
    await until(lambda: server.engine.running == 0)
    assert len(server.engine.aborted) == 1
    slow.reading.set()
    await asyncio.wait_for(slow.task, 30)
    assert b'"code":408' in slow.sent[-1]["body"]
    quick = await server.complete(stream=True, max_tokens=4000, ignore_eos=True)
    assert len(events(quick)) == 4000, "who reads is not told so"


async def test_backlog_of_a_stream_is_bounded_by_what_it_weighs() -> None:
    overflowed: list[str] = []
    stream = TokenStream("r")
    stream.bound(20_000, lambda: overflowed.append("r"))
    heavy = [TokenLogprob(1, -1.0, 1, [(i, -1.0) for i in range(20)])]
    for _ in range(5):
        stream.put(TokenOutput("r", [1], logprobs=heavy))
    assert not overflowed
    assert len((await anext(stream)).token_ids) == 5
    for _ in range(20):
        stream.put(TokenOutput("r", [1], logprobs=heavy))
    assert overflowed == ["r"]
    with pytest.raises(SlowReaderError, match="20000 bytes"):
        await anext(stream)


async def test_the_last_output_is_kept_whatever_comes_after() -> None:
    stream = TokenStream("r")
    stream.put(TokenOutput("r", [1], finish_reason="stop"))
    stream.fail(SlowReaderError("too late to fail"))
    stream.put(TokenOutput("r", [], finish_reason="abort"))
    assert [output.finish_reason async for output in stream] == ["stop"]
