"""POST /v1/embeddings: shapes, encodings, pooling, refusals."""

from __future__ import annotations

import asyncio
import base64
from array import array
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.conftest import Serve, Served, assert_error


async def embed(server: Served, text: Any = "Hello", **fields: Any) -> Any:
    return await server.post("/v1/embeddings", {"input": text} | fields)


async def test_answer_has_openais_shape(serve: Serve) -> None:
    server = await serve()
    body = (await embed(server, ["Hello", "you"])).json()
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert body["data"][0] == {"index": 0, "object": "embedding", "embedding": [5.0, float(ord("o")), 0.0]}
    assert body["usage"] == {
        "prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip
    assert server.engine.running == 0
    assert await server.metric("vllm:request_success_total", finished_reason="stop") == 2


@pytest.mark.parametrize("text", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
async def test_input_may_be_text_or_tokens(serve: Serve, text: Any) -> None:
    server = await serve()
    assert (await embed(server, text)).json()["data"][0]["embedding"] == [2.0, 105.0, 0.0]


async def test_base64_is_the_same_vector(serve: Serve) -> None:
    server = await serve()
    plain = (await embed(server)).json()["data"][0]["embedding"]
    coded = (await embed(server, encoding_format="base64")).json()["data"][0]["embedding"]
    assert array("f", base64.b64decode(coded)).tolist() == plain


async def test_pooling_is_the_servers_unless_the_request_says(serve: Serve) -> None:
    server = await serve(pooling="mean")
    assert (await embed(server)).json()["data"][0]["embedding"][2] == 1.0
    assert (await embed(server, pooling="last")).json()["data"][0]["embedding"][2] == 0.0


async def test_long_input_is_refused_or_cut_as_asked(serve: Serve) -> None:
    server = await serve()
    assert_error(await embed(server, "x" * 300), 400, "input", "maximum context length is 256 tokens")
    assert (await embed(server, "x" * 300, truncate_prompt_tokens=-1)).json()["usage"]["prompt_tokens"] == 255
    assert (await embed(server, "abc", truncate_prompt_tokens=2)).json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"dimensions": 5}, "dimensions"), ({"encoding_format": "int8"}, "encoding_format"), ({"input": []}, "input"),
     ({"input": ""}, "input"), ({"input": [[]]}, "input"), ({"input": [1.5]}, "input"), ({"input": [999]}, "input"),
     ({"pooling": "max"}, "pooling"), ({"input": ["a"] * 1025}, "input"),
     ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens")],
)  # fmt: skip
async def test_refusals_name_the_field(serve: Serve, fields: dict[str, Any], param: str) -> None:
    server = await serve()
    assert_error(await server.post("/v1/embeddings", {"input": "Hi"} | fields), 400, param)
    assert server.engine.running == 0


async def test_a_client_that_leaves_aborts_all_of_it(serve: Serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = await serve(engine)
    task = asyncio.create_task(embed(server, ["a", "b"]))
    while engine.running < 2:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.running == 0


async def test_an_engine_error_is_a_500_and_frees_the_rest(serve: Serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = await serve(engine)
    task = asyncio.create_task(embed(server, ["a", "b"]))
    while engine.running < 2:
        await asyncio.sleep(0)
    engine.fail("the model's output was not finite")
    assert_error(await task, 500, None, "not finite")
    assert engine.running == 0
