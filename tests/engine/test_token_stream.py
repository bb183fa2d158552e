"""A reader that lags gets what gathered as one output, and never loses tokens to an error behind them."""

import asyncio

import pytest

from nvfp4_runtime.engine.messages import TokenLogprob, TokenOutput
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import EngineDeadError


def output(*ids: int, finish: str | None = None, scored: bool = False) -> TokenOutput:
    logprobs = [TokenLogprob(i, -1.0, 1, []) for i in ids] if scored else None
    return TokenOutput("r", list(ids), logprobs, finish_reason=finish)


async def test_outputs_that_wait_become_one():
    stream = TokenStream("r")
    for item in (output(1, scored=True), output(2, 3, scored=True), output(4, finish="length", scored=True)):
        stream.put(item)
    read = [item async for item in stream]
    assert [item.token_ids for item in read] == [[1, 2, 3, 4]]
    assert [entry.token_id for entry in read[0].logprobs or []] == [1, 2, 3, 4]
    assert read[0].finish_reason == "length"


async def test_a_reader_that_waits_gets_each_as_it_comes():
    stream = TokenStream("r")
    read: list[list[int]] = []

    async def reader() -> None:
        async for item in stream:
            read.append(item.token_ids)

    task = asyncio.create_task(reader())
    for item in (output(1), output(2), output(3, finish="stop")):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stream.put(item)
    await task
    assert read == [[1], [2], [3]]


async def test_tokens_before_an_error_are_read_first():
    stream = TokenStream("r")
    stream.put(output(1))
    stream.put(output(2))
    stream.put(EngineDeadError("gone"))
    assert (await anext(stream)).token_ids == [1, 2]
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(stream)

    stream = TokenStream("r")
    stream.put(output(1))
    stream.put(output(finish="error"))
    assert (await anext(stream)).finish_reason is None
    assert (await anext(stream)).finish_reason == "error"
