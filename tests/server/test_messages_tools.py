"""Tools and thinking on /v1/messages: blocks, their events, and results that come back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Serve, Served
from tests.server.test_messages import assert_anthropic_error, create, events
from tests.server.test_reasoning import OPENED, text_of
from tests.server.test_tools import CALL, prompt_of, says

WEATHER = {
    "name": "weather",
    "description": "The weather somewhere.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASKED = {"role": "user", "content": "Weather?"}
USED = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}],
}


def result(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "Rain"} | fields]}


async def streamed_and_whole(server: Served, **fields: Any) -> dict[str, Any]:
    """The answer; what its events add up to is checked to be the same."""
    whole: dict[str, Any] = (await create(server, **fields)).json()
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events(await create(server, stream=True, **fields)):
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                texts.append("")
            case "content_block_delta":
                kind = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}[blocks[-1]["type"]]
                texts[-1] += event["delta"][kind]
            case "message_delta":
                assert event["delta"]["stop_reason"] == whole["stop_reason"]
    for block, text, other in zip(blocks, texts, whole["content"], strict=True):
        value = json.loads(text) if block["type"] == "tool_use" else text
        name = "input" if block["type"] == "tool_use" else block["type"]
        assert (block | {"id": ""} if name == "input" else block) | {name: value} == (
            other | {"id": ""} if name == "input" else other
        )
    return whole


async def test_call_is_a_block(serve: Serve) -> None:
    server = await serve(says(CALL))
    whole = await streamed_and_whole(server, tools=[WEATHER])
    text, call = whole["content"]
    assert text == {"type": "text", "text": "On it."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert whole["stop_reason"] == "tool_use"


async def test_thinking_is_a_block_before_the_answer(serve: Serve) -> None:
    server = await serve(says("hm</think>Yes"), text=text_of(OPENED))
    whole = await streamed_and_whole(server)
    assert whole["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Yes"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"type": "any", "disable_parallel_tool_use": True}, '[{"name":"weather","parameters":{"city":"Oslo"}}]'),
     ({"type": "tool", "name": "weather"}, '{"city":"Oslo"}')],
)  # fmt: skip
async def test_forced_calls_are_held_to_a_grammar(serve: Serve, choice: dict[str, Any], said: str) -> None:
    server = await serve(says(said))
    whole = await streamed_and_whole(server, tools=[WEATHER], tool_choice=choice)
    (call,) = whole["content"]
    assert (call["input"], whole["stop_reason"]) == ({"city": "Oslo"}, "tool_use")
    spec = server.engine.submitted[0].params.structured
    assert spec.param == "tools"
    assert ("maxItems" in spec.value) is ("disable_parallel_tool_use" in choice)


async def test_tool_choice_none_calls_nothing(serve: Serve) -> None:
    server = await serve(says(CALL))
    whole = await streamed_and_whole(server, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block["type"] for block in whole["content"]] == ["text"]


async def test_a_call_cut_by_the_limit_has_no_input(serve: Serve) -> None:
    server = await serve(says('{"city":"Oslo"}'))
    choice = {"type": "tool", "name": "weather"}
    whole = (await create(server, tools=[WEATHER], tool_choice=choice, max_tokens=5)).json()
    assert (whole["stop_reason"], whole["content"][0]["input"]) == ("max_tokens", {})


@pytest.mark.parametrize(
    ("fields", "shown"),
    [({}, "Rain"), ({"is_error": True}, "Error: Rain"), ({"content": [{"type": "text", "text": "Fog"}]}, "Fog")],
)
async def test_result_goes_back_in_the_next_turn(serve: Serve, fields: dict[str, Any], shown: str) -> None:
    server = await serve(says("x"))
    messages = [ASKED, USED, result(**fields)]
    assert (await create(server, messages=messages, tools=[WEATHER], max_tokens=3)).status_code == 200
    prompt = prompt_of(server.engine)
    assert prompt.index("Weather?") < prompt.index('"Oslo"') < prompt.index(f"<tool_response>\n{shown}\n")
    count = await server.post("/v1/messages/count_tokens", {"model": "tiny", "messages": messages, "tools": [WEATHER]})
    assert count.json() == {"input_tokens": len(server.engine.submitted[0].prompt_token_ids)}


async def test_thinking_budget_and_switch_reach_the_engine_and_the_template(serve: Serve) -> None:
    template = "{{ messages[0].content }} on={{ enable_thinking }}{# </think> #}<think>"
    server = await serve(says("hm</think>Yes"), text=text_of(template))
    thinking = {"type": "enabled", "budget_tokens": 1024}
    await create(server, thinking=thinking, max_tokens=2000)
    assert "on=True" in prompt_of(server.engine)
    assert server.engine.submitted[0].params.thinking.num_tokens == 1024
    await create(server, thinking={"type": "disabled"})
    assert "on=False" in prompt_of(server.engine)
    assert server.engine.submitted[1].params.thinking.num_tokens == 0


async def test_output_format_is_a_schema(serve: Serve) -> None:
    server = await serve(says("{}"))
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_format": form}, {"output_config": {"format": form}}):
        await create(server, **fields)
        assert json.loads(server.engine.submitted[-1].params.structured.value) == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"name": "weather"}]}, "input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "clock"}}, "clock"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"messages": [ASKED, USED]}, "tool_result"),
        ({"messages": [ASKED, result()]}, "t1"),
        ({"messages": [ASKED, USED, ASKED, result()]}, "t1"),
        ({"messages": [ASKED, USED, result(content=[{"type": "image"}])]}, "image"),
        ({"messages": [ASKED, USED, result(content=7)]}, "string"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "thinking"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]}, "input"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}, "max_tokens": 9000}, "1024"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "max_tokens"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"thinking": {"type": "disabled", "display": "omitted"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1100}, "--reasoning-parser"),
        ({"output_config": {"effort": "high"}}, "output_config"),
        ({"output_format": {"type": "text"}}, "output_format"),
    ],
)
async def test_what_cannot_be_had_is_refused(serve: Serve, fields: dict[str, Any], word: str) -> None:
    server = await serve(says("x"))
    assert_anthropic_error(await create(server, **fields), 400, "invalid_request_error", word)
    assert server.engine.running == 0
