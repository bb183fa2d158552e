"""/v1/responses: shapes, events, and what is kept for how long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.response_store import ResponseStore, StoredResponse
from tests.fakes import FakeEngine, Submitted, fake_info
from tests.server.conftest import Serve, Served, assert_error

ANSWER = "Hello world, this is a scripted answer."


async def create(server: Served, said: Any = "Hi", **fields: Any) -> httpx.Response:
    return await server.post("/v1/responses", {"input": said} | fields)


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; names, numbers and framing are checked here."""
    assert response.status_code == 200, response.text
    found = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_of(entry: Submitted) -> str:
    return bytes(token for token in entry.prompt_token_ids if token < 256).decode()


async def test_response_has_openais_shape(serve: Serve) -> None:
    server = await serve()
    body = (await create(server, max_output_tokens=5, instructions="Be brief.", metadata={"a": "b"})).json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["model"]) == ("response", "incomplete", "tiny")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert body["usage"]["output_tokens"] == 5
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 5
    assert (body["instructions"], body["metadata"], body["error"]) == ("Be brief.", {"a": "b"}, None)
    assert "system\nBe brief." in prompt_of(server.engine.submitted[0])


async def test_a_stop_completes_a_response(serve: Serve) -> None:
    server = await serve(FakeEngine([*b"Hi", 258]))
    body = (await create(server)).json()
    assert (body["status"], body["incomplete_details"]) == ("completed", None)
    assert body["output"][0]["status"] == "completed"


async def test_events_tell_the_whole_response(serve: Serve) -> None:
    server = await serve(FakeEngine([*"héllo".encode(), 258]))
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain = (await create(server, **fields)).json()
    found = named_events(await create(server, stream=True, **fields))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    deltas = [event for event in found if event["type"].endswith("delta")]
    text = "".join(event["delta"] for event in deltas)
    last = found[-1]["response"]
    assert text == "héllo" == last["output"][0]["content"][0]["text"]
    logprobs = [entry for event in deltas for entry in event["logprobs"]]
    assert logprobs == last["output"][0]["content"][0]["logprobs"] == plain["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 7
    assert len(logprobs[0]["top_logprobs"]) == 2
    assert found[0]["response"]["status"] == "in_progress"
    assert {event.get("item_id", last["output"][0]["id"]) for event in found} == {last["output"][0]["id"]}
    unlike = {"id", "created_at", "output"}
    assert {k: v for k, v in last.items() if k not in unlike} == {k: v for k, v in plain.items() if k not in unlike}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kept_response_is_got_gone_on_from_and_deleted(serve: Serve, stream: bool) -> None:
    server = await serve(FakeEngine([*b"Fine.", 258]))
    answer = await create(server, "How are you?", instructions="Be kind.", stream=stream)
    first = named_events(answer)[-1]["response"] if stream else answer.json()
    assert (await server.http.get(f"/v1/responses/{first['id']}")).json() == first
    second = (await create(server, "And now?", previous_response_id=first["id"])).json()
    assert second["previous_response_id"] == first["id"]
    prompt = prompt_of(server.engine.submitted[-1])
    assert prompt == "user\nHow are you?\nassistant\nFine.\nuser\nAnd now?\nassistant\n", "without the instructions"
    third = await create(server, "Well?", previous_response_id=second["id"])
    assert "Fine.\nuser\nAnd now?\nassistant\nFine.\nuser\nWell?" in prompt_of(server.engine.submitted[-1])
    assert third.status_code == 200
    gone = (await server.http.delete(f"/v1/responses/{first['id']}")).json()
    assert gone == {"id": first["id"], "object": "response", "deleted": True}
    assert_error(await server.http.get(f"/v1/responses/{first['id']}"), 404, "response_id", "not found")
    assert_error(await create(server, previous_response_id=first["id"]), 404, "response_id", "not found")


async def test_store_false_keeps_nothing(serve: Serve) -> None:
    server = await serve()
    body = (await create(server, store=False)).json()
    assert_error(await server.http.get(f"/v1/responses/{body['id']}"), 404, "response_id")
    assert len(server.app.state.server.responses) == 0


async def test_background_response_is_polled_and_finishes(serve: Serve) -> None:
    engine = FakeEngine([*b"Fine.", 258])
    engine.gate.clear()
    server = await serve(engine)
    begun = (await create(server, background=True)).json()
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert (await server.http.get(f"/v1/responses/{begun['id']}")).json() == begun
    assert_error(await create(server, previous_response_id=begun["id"]), 400, "previous_response_id", "still running")
    engine.gate.set()
    for _ in range(100):
        body = (await server.http.get(f"/v1/responses/{begun['id']}")).json()
        if body["status"] != "in_progress":
            break
        await asyncio.sleep(0.01)
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("completed", "Fine.")
    assert (await server.post(f"/v1/responses/{begun['id']}/cancel", {})).json() == body


@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_background_response_is_stopped(serve: Serve, how: str) -> None:
    engine = FakeEngine(step_seconds=0.001)
    server = await serve(engine)
    begun = (await create(server, background=True)).json()
    while not engine.running:
        await asyncio.sleep(0.001)
    if how == "cancel":
        body = (await server.post(f"/v1/responses/{begun['id']}/cancel", {})).json()
        assert body["status"] == "cancelled"
        assert (await server.http.get(f"/v1/responses/{begun['id']}")).json() == body
    else:
        await server.http.delete(f"/v1/responses/{begun['id']}")
        await asyncio.sleep(0.01)
        assert_error(await server.http.get(f"/v1/responses/{begun['id']}"), 404, "response_id")
    assert engine.running == 0


async def test_more_in_the_background_than_the_store_holds_is_refused_for_now(serve: Serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = await serve(engine, stored_responses_bytes=15_000)
    said = [{"type": "reasoning", "content": [{"text": "x" * 1000}]}, {"role": "assistant", "content": "a"}]
    answers = [await create(server, said, background=True) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 429, 429, 429]
    assert "retry-after" in answers[-1].headers
    assert engine.running == 1, "a refused one does not run"
    await server.app.state.server.responses.close()


async def test_synchronous_response_cannot_be_cancelled(serve: Serve) -> None:
    server = await serve()
    body = (await create(server, max_output_tokens=1)).json()
    assert_error(await server.post(f"/v1/responses/{body['id']}/cancel", {}), 400, "response_id", "synchronous")


async def test_an_engine_error_is_a_500_or_a_failed_event(serve: Serve) -> None:
    engine = FakeEngine(step_seconds=0.01)
    server = await serve(engine)

    async def failing(**fields: Any) -> httpx.Response:
        task = asyncio.create_task(create(server, **fields))
        while not engine.running:
            await asyncio.sleep(0.001)
        engine.fail("the model's output was not finite")
        return await task

    assert_error(await failing(), 500, None, "not finite")
    last = named_events(await failing(stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "not finite" in last["response"]["error"]["message"]
    begun = (await create(server, background=True)).json()
    await asyncio.sleep(0)
    engine.fail("the model's output was not finite")
    await asyncio.sleep(0.05)
    assert (await server.http.get(f"/v1/responses/{begun['id']}")).json()["status"] == "failed"


async def test_items_of_every_kind_become_turns(serve: Serve) -> None:
    server = await serve()
    items = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Two.", "annotations": []}]},
        {"role": "user", "content": "Three."},
    ]  # fmt: skip
    assert (await create(server, items)).status_code == 200
    prompt = prompt_of(server.engine.submitted[0])
    assert prompt == "developer\nRules.\nuser\nOne.\nassistant\nTwo.\nuser\nThree.\nassistant\n"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input"), ({"input": [{"role": "user", "content": 5}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"type": "reasoning", "content": [{"text": "x"}]}]}, "input"), ({"input": "x" * 300}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "odd"}}}, "text"), ({"text": {"format": 5}}, "text"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text"), ({"text": {"verbosity": "low"}}, "text"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}}, "text"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"truncation": "auto"}, "truncation"), ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"service_tier": "flex"}, "service_tier"), ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"), ({"top_logprobs": 2}, "top_logprobs"), ({"include": ["x"]}, "include"),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
    ({"background": True, "store": False}, "background"), ({"background": True, "stream": True}, "background"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ({"previous_response_id": "x" * 600}, "previous_response_id"),
    ({"stop": [""]}, "stop"), ({"logit_bias": {"999": 1}}, "logit_bias"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED)
async def test_refusals_name_the_responses_own_field(serve: Serve, fields: dict[str, Any], param: str) -> None:
    server = await serve()
    assert_error(await server.post("/v1/responses", {"input": "Hi"} | fields), 400, param)
    assert server.engine.running == 0


async def test_text_format_is_the_answers_form(serve: Serve) -> None:
    server = await serve()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}
    body = (await create(server, text=text)).json()
    assert body["text"] == text
    spec = server.engine.submitted[0].params.structured
    assert spec is not None
    assert (spec.kind, json.loads(spec.value)) == ("json", schema)
    await create(server, text={"format": {"type": "json_object"}})
    assert server.engine.submitted[1].params.structured.kind == "json_object"  # type: ignore[union-attr]


async def test_values_that_ask_for_nothing_pass(serve: Serve) -> None:
    server = await serve()
    fields = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": None, "truncation": "disabled",
        "text": {"format": {"type": "text"}}, "service_tier": "auto", "include": [], "prompt_cache_key": "k",
        "safety_identifier": "s", "vendor_hint": 1,
    }  # fmt: skip
    assert (await create(server, **fields)).status_code == 200


async def test_a_client_that_leaves_a_stream_ends_it(serve: Serve) -> None:
    engine = FakeEngine(step_seconds=0.001)
    server = await serve(engine)
    task = asyncio.create_task(create(server, stream=True))
    while not engine.running:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.running == 0


async def test_the_end_of_the_server_stops_what_runs_in_the_background(serve: Serve) -> None:
    engine = FakeEngine(step_seconds=0.001, info=fake_info(max_model_len=4096))
    server = await serve(engine)
    await create(server, background=True)
    await asyncio.sleep(0.01)
    await server.app.state.server.responses.close()
    assert engine.running == 0


# -- the store ----------------------------------------------------------------------------------------------------


def stored(name: str, size: int = 1000) -> StoredResponse:
    return StoredResponse({"id": name, "text": "x" * size}, [])


def test_the_store_never_holds_more_than_its_bytes_and_drops_the_oldest_first() -> None:
    store = ResponseStore(30_000, 60)
    for i in range(20):
        store.put(stored(f"r{i}"))
        assert store.num_bytes <= 30_000
    kept = [i for i in range(20) if f"r{i}" in store]
    assert kept == list(range(20 - len(kept), 20))
    assert 3 <= len(kept) <= 5
    store.put(stored("large", 10**6))
    assert "large" not in store
    assert [i for i in range(20) if f"r{i}" in store] == kept, "what is too large displaces nothing"
    for i in kept:
        store.delete(f"r{i}")
    assert store.num_bytes == 0


def test_the_store_forgets_after_its_time() -> None:
    now = [0.0]
    store = ResponseStore(10**6, 60, clock=lambda: now[0])
    store.put(stored("old"))
    now[0] = 59.0
    store.put(stored("young"))
    assert store.get("old")
    now[0] = 60.0
    with pytest.raises(Exception, match="not found"):
        store.get("old")
    assert store.get("young")
    assert len(store) == 1
