"""/v1/messages and /v1/messages/count_tokens: Anthropic's shapes, events and errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.config import hash_key
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, Served

BASE: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


async def create(server: Served, **fields: Any) -> httpx.Response:
    return await server.post("/v1/messages", BASE | fields)


def assert_anthropic_error(response: httpx.Response, status: int, kind: str, *words: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert set(body["error"]) == {"type", "message"}
    for word in words:
        assert word in body["error"]["message"], body


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_message_has_anthropics_shape(serve: Serve) -> None:
    server = await serve()
    body = (await create(server, max_tokens=5, system="Be brief.")).json()
    assert body["id"].startswith("msg_")
    prompt = server.engine.submitted[0].prompt_token_ids
    assert b"system\nBe brief." in bytes(token for token in prompt if token < 256)
    assert body == {
        "id": body["id"], "type": "message", "role": "assistant", "model": "tiny",
        "content": [{"type": "text", "text": "Hello"}], "stop_reason": "max_tokens", "stop_sequence": None,
        "usage": {"input_tokens": len(prompt), "output_tokens": 5, "cache_creation_input_tokens": 0,
                  "cache_read_input_tokens": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "fields", "reason", "sequence", "text"),
    [([*b"Hi", 258], {}, "end_turn", None, "Hi"),
     (list(b"abcd"), {"stop_sequences": ["cd"]}, "stop_sequence", "cd", "ab"),
     (list(b"abcd"), {"max_tokens": 3}, "max_tokens", None, "abc")],
)  # fmt: skip
async def test_stop_reasons_streamed_and_not(
    serve: Serve, script: list[int], fields: dict[str, Any], reason: str, sequence: str | None, text: str
) -> None:
    server = await serve(FakeEngine(script))
    body = (await create(server, **fields)).json()
    assert (body["stop_reason"], body["stop_sequence"], body["content"][0]["text"]) == (reason, sequence, text)
    found = events(await create(server, stream=True, **fields))
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in found[2:-3]) == text
    assert found[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert found[-2]["usage"] == body["usage"]
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)


async def test_a_last_turn_of_the_assistant_is_continued(serve: Serve) -> None:
    server = await serve()
    messages = [*BASE["messages"], {"role": "assistant", "content": "The answer is"}]
    assert (await create(server, messages=messages)).status_code == 200
    prompt = bytes(token for token in server.engine.submitted[0].prompt_token_ids if token < 256)
    assert prompt.endswith(b"assistant\nThe answer is")


async def test_blocks_of_text_and_thinking(serve: Serve) -> None:
    server = await serve()
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    cached = {"type": "text", "text": "B", "cache_control": {}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, cached]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "C"}]},
        {"role": "user", "content": "D"},
    ]  # fmt: skip
    system = [{"type": "text", "text": "S"}]
    assert (await create(server, messages=messages, system=system)).status_code == 200
    prompt = bytes(token for token in server.engine.submitted[0].prompt_token_ids if token < 256)
    assert prompt == b"system\nS\nuser\nA\nB\nassistant\nC\nuser\nD\nassistant\n"


async def test_cached_tokens_are_counted_apart_where_the_server_tells_them(serve: Serve) -> None:
    server = await serve(FakeEngine(num_cached_tokens=4), enable_prompt_tokens_details=True)
    usage = (await create(server)).json()["usage"]
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] == len(server.engine.submitted[0].prompt_token_ids) - 4


async def test_count_tokens_counts_what_a_message_would_have(serve: Serve) -> None:
    server = await serve()
    body = {"model": "tiny", "messages": BASE["messages"], "system": "S"}
    count = (await server.post("/v1/messages/count_tokens", body)).json()
    used = (await create(server, system="S")).json()["usage"]["input_tokens"]
    assert count == {"input_tokens": used}
    assert len(server.engine.submitted) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 10**6}, "max_tokens"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"), ({"temperature": 1.5}, "temperature"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"), ({"top_p": 0}, "top_p"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "messages"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"), ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"stop_sequences": [""]}, "stop_sequences"), ({"model": None}, "model"), ({"container": "x"}, "container"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "word"), REFUSED)
async def test_refusals_come_in_anthropics_envelope(serve: Serve, fields: dict[str, Any], word: str) -> None:
    server = await serve()
    assert_anthropic_error(await create(server, **fields), 400, "invalid_request_error", word)
    assert server.engine.running == 0


async def test_errors_of_every_layer_come_in_anthropics_envelope(serve: Serve) -> None:
    server = await serve(max_body_bytes=1000)
    assert_anthropic_error(await create(server, model="other"), 404, "not_found_error", "does not exist")
    assert_anthropic_error(await create(server, system="x" * 2000), 413, "request_too_large")
    assert_anthropic_error(await server.http.get("/v1/messages"), 405, "invalid_request_error")
    bad = await server.http.post("/v1/messages", content="{", headers={"content-type": "application/json"})
    assert_anthropic_error(bad, 400, "invalid_request_error", "not valid JSON")
    server.engine.die()
    assert_anthropic_error(await create(server), 503, "overloaded_error")


async def test_a_failure_after_the_first_event_is_an_error_event(serve: Serve) -> None:
    engine = FakeEngine(step_seconds=0.01)
    server = await serve(engine)
    task = asyncio.create_task(create(server, stream=True))
    while not await server.metric("vllm:generation_tokens_total"):
        await asyncio.sleep(0.002)
    engine.fail("the model's output was not finite")
    last = events(await task)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")


async def test_the_key_may_come_as_anthropics_clients_send_it(serve: Serve) -> None:
    server = await serve(api_key_hashes=(hash_key("secret"),))
    assert_anthropic_error(await create(server), 401, "authentication_error")
    for headers, status in (({"x-api-key": "secret"}, 200), ({"x-api-key": "wrong"}, 401), ({"x-api-key": ""}, 401)):
        assert (await server.http.post("/v1/messages", json=BASE, headers=headers)).status_code == status
