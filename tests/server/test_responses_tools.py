"""Tools and reasoning on /v1/responses: items, their events, and results that come back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvfp4_runtime.structured.thinking import ThinkingBudget
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, Served, assert_error
from tests.server.test_reasoning import OPENED, text_of
from tests.server.test_responses import create, named_events
from tests.server.test_tools import CALL, prompt_of, says

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
NAMED = {"type": "function", "name": "weather"}


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Event types in order, without their prefix, neighbours that are alike as one."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]


async def streamed_and_whole(server: Served, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both ways to the same answer; what must agree is checked."""
    whole = (await create(server, **fields)).json()
    events = named_events(await create(server, stream=True, **fields))
    last = events[-1]["response"]
    assert _told(last["output"]) == _told(whole["output"])
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]
    return events, whole


def _told(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


async def test_call_is_an_item_with_its_own_events(serve: Serve) -> None:
    server = await serve(says(CALL))
    events, whole = await streamed_and_whole(server, tools=[WEATHER])
    said, call = whole["output"]
    assert said["content"][0]["text"] == "On it."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    assert call["call_id"].startswith("call_")
    assert call["id"].startswith("fc_")
    assert whole["status"] == "completed"
    assert whole["tools"] == [WEATHER]
    assert kinds_of(events)[2:] == [
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "".join(event["delta"] for event in deltas) == done["arguments"] == call["arguments"]
    assert {event["output_index"] for event in deltas} == {1}
    assert "weather" in prompt_of(server.engine)


async def test_reasoning_is_an_item_before_the_answer(serve: Serve) -> None:
    server = await serve(says("hm</think>Yes"), text=text_of(OPENED))
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    events, whole = await streamed_and_whole(server, **fields)
    reasoning, said = whole["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert said["content"][0]["text"] == "Yes"
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert kinds_of(events)[2:8] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
    ]  # fmt: skip
    assert "".join(e["delta"] for e in events if e["type"] == "response.reasoning_text.delta") == "hm"


async def test_a_call_cut_by_the_limit_is_incomplete(serve: Serve) -> None:
    server = await serve(says('{"city": "Par'))
    fields = {"tools": [WEATHER], "tool_choice": NAMED, "max_output_tokens": 5}
    whole = (await create(server, **fields)).json()
    (call,) = whole["output"]
    assert (whole["status"], call["status"], call["arguments"]) == ("incomplete", "incomplete", '{"cit')


@pytest.mark.parametrize(("choice", "said"), [("required", '[{"name":"weather","parameters":{"city":"Oslo"}}]'),
                                              (NAMED, '{"city":"Oslo"}')])  # fmt: skip
async def test_forced_calls_are_held_to_a_grammar(serve: Serve, choice: Any, said: str) -> None:
    server = await serve(says(said))
    whole = (await create(server, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)).json()
    (call,) = whole["output"]
    assert (call["name"], call["arguments"]) == ("weather", '{"city":"Oslo"}')
    assert (whole["tool_choice"], whole["parallel_tool_calls"]) == (choice, False)
    assert server.engine.submitted[0].params.structured.param == "tools"


async def test_result_goes_back_in_the_next_turn(serve: Serve) -> None:
    server = await serve(says(CALL))
    first = (await create(server, "Weather in Paris?", tools=[WEATHER])).json()
    call = first["output"][1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny"}
    assert (await create(server, [result], previous_response_id=first["id"], tools=[WEATHER])).status_code == 200
    kept = prompt_of(server.engine)
    turns = [{"role": "user", "content": "Weather in Paris?"}, *first["output"], result]
    assert (await create(server, turns, tools=[WEATHER])).status_code == 200
    assert prompt_of(server.engine) == kept
    assert "Weather in Paris?" in kept
    assert kept.index("On it.") < kept.index('"Paris"') < kept.index("Sunny")


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", ""),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "name"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", ""),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input", "No tool call found"),
        ({"input": [{"type": "function_call_output", "output": "y"}]}, "input", "call_id"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{"}]}, "input", "not JSON"),
        ({"input": [{"type": "function_call", "call_id": "x" * 600, "name": "f", "arguments": "{}"}]}, "input", "512"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "does not read"),
        ({"reasoning": {"effort": "huge"}}, "reasoning", "huge"),
        ({"reasoning": {"summary": "auto"}}, "reasoning", "summary"),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "--reasoning-parser"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", ""),
    ],
)
async def test_what_cannot_be_had_is_a_400_naming_the_field(
    serve: Serve, fields: dict[str, Any], param: str, word: str
) -> None:
    server = await serve()
    assert_error(await server.post("/v1/responses", {"input": "Hi"} | fields), 400, param, word)
    assert server.engine.running == 0


async def test_effort_reaches_the_template_or_bounds_the_reasoning(serve: Serve) -> None:
    template = "{{ messages[0].content }} effort={{ reasoning_effort }}{# </think> #}"
    server = await serve(FakeEngine(), text=text_of(template))
    body = (await create(server, reasoning={"effort": "low"}, max_output_tokens=3)).json()
    assert "effort=low" in prompt_of(server.engine)
    assert body["reasoning"] == {"effort": "low", "summary": None}
    assert server.engine.submitted[0].params.thinking is None
    await create(server, reasoning={"effort": "none"}, max_output_tokens=3)
    thinking = server.engine.submitted[1].params.thinking
    assert isinstance(thinking, ThinkingBudget)
    assert thinking.num_tokens == 0
