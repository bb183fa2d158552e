"""Tools over HTTP: what is refused, what the model is shown, and the shapes of calls, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.processor import TextProcessor
from server.tools.request import calls_schema
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import TEXT, Serve, assert_error, events

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = 'On it.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def says(text: str) -> FakeEngine:
    """An engine that says `text` and then ends by EOS."""
    return FakeEngine([*text.encode(), 258], info=fake_info(max_model_len=8192))


def prompt_of(engine: FakeEngine) -> str:
    return TEXT.tokenizer.decode(engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"tools": []}, "tools", "at least one"),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED}, "tool_choice", "needs tools"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice", "weather"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice", ""),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice", ""),
        ({"tools": [CLOCK, CLOCK]}, "tools", "taken"),
        ({"tools": [{"type": "function"}]}, "tools", ""),
        ({"tools": [{"type": "search", "function": {"name": "x"}}]}, "tools", ""),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", "name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools", "name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools",
         "object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}]}, "tools",
         "object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", ""),
        ({"tools": "weather"}, "tools", ""),
        ({"tools": [CLOCK] * 1025}, "tools", ""),
        ({"tools": [CLOCK], "parallel_tool_calls": "maybe"}, "parallel_tool_calls", ""),
        ({"include_reasoning": "maybe"}, "include_reasoning", ""),
    ],
)  # fmt: skip
async def test_tools_that_cannot_be_used_are_a_400_naming_the_field(
    serve: Serve, fields: dict[str, Any], param: str, word: str
) -> None:
    server = await serve()
    assert_error(await server.chat(**fields), 400, param, word)
    assert server.engine.running == 0


async def test_deeply_nested_parameters_are_refused(serve: Serve) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(80):
        schema = {"type": "object", "properties": {"a": schema}}
    server = await serve()
    assert_error(
        await server.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}]),
        400, "tools", "nested",
    )  # fmt: skip


async def test_call_has_openais_shape(serve: Serve) -> None:
    server = await serve(says(CALL))
    choice = (await server.chat(tools=[WEATHER], max_tokens=150)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": '{"city": "Paris"}'})
    assert choice["message"]["content"] == "On it."
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)


async def test_streamed_call_has_index_and_name_once_and_arguments_in_pieces(serve: Serve) -> None:
    server = await serve(says(CALL + CALL.removeprefix("On it.")))
    chunks = events(await server.chat(tools=[WEATHER, CLOCK], max_tokens=300, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "On it."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    opened = [call for call in calls if "id" in call]
    assert [call["index"] for call in opened] == [0, 1]
    assert all(call["function"] == {"name": "weather", "arguments": ""} for call in opened)
    assert len({call["id"] for call in opened}) == 2
    assert all(set(call) == {"index", "function"} for call in calls if "id" not in call)
    for index in (0, 1):
        pieces = [call["function"]["arguments"] for call in calls if call["index"] == index]
        assert json.loads("".join(pieces)) == {"city": "Paris"}
        assert len(pieces) > 3
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "tool_calls"
    assert not any(reasons[:-1])


async def test_without_parallel_calls_only_the_first_is_passed_on(serve: Serve) -> None:
    server = await serve(says(CALL + CALL))
    choice = (await server.chat(tools=[WEATHER], parallel_tool_calls=False, max_tokens=300)).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_text_without_a_call_is_content_and_stops_as_ever(serve: Serve) -> None:
    server = await serve(says("Just text."))
    choice = (await server.chat(tools=[WEATHER], max_tokens=50)).json()["choices"][0]
    assert choice["message"]["content"] == "Just text."
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


async def test_call_cut_by_max_tokens_ends_with_length(serve: Serve) -> None:
    server = await serve(says(CALL))
    choice = (await server.chat(tools=[WEATHER], max_tokens=60)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_tool_choice_none_parses_nothing_and_describes_nothing(serve: Serve) -> None:
    server = await serve(says(CALL))
    choice = (await server.chat(tools=[WEATHER], tool_choice="none", max_tokens=150)).json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert "weather" not in prompt_of(server.engine)


async def test_required_calls_are_forced_by_a_grammar(serve: Serve) -> None:
    said = '[{"name": "weather", "parameters": {"city": "Oslo"}}, {"name": "clock", "parameters": {}}]'
    server = await serve(says(said))
    choice = (await server.chat(tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=150)).json()["choices"][0]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert calls == [("weather", '{"city": "Oslo"}'), ("clock", "{}")]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    spec = server.engine.submitted[0].params.structured
    assert spec is not None
    assert json.loads(spec.value) == calls_schema(
        {"weather": WEATHER["function"]["parameters"], "clock": {"type": "object", "properties": {}}}, True
    )  # type: ignore[index]


async def test_named_call_is_forced_and_ends_with_stop_as_at_openai(serve: Serve) -> None:
    server = await serve(says('{"city": "Oslo"}'))
    fields: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": NAMED, "max_tokens": 50}
    choice = (await server.chat(**fields)).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert choice["finish_reason"] == "stop"
    spec = server.engine.submitted[0].params.structured
    assert spec is not None
    assert json.loads(spec.value) == WEATHER["function"]["parameters"]  # type: ignore[index]
    chunks = events(await server.chat(**fields, stream=True))
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Oslo"}'


async def test_template_without_tools_gets_them_in_the_system_message(serve: Serve) -> None:
    server = await serve(says("x"))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    await server.chat(messages=messages, tools=[WEATHER], max_tokens=1)
    prompt = prompt_of(server.engine)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert json.dumps(WEATHER) in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt


async def test_template_with_tools_gets_them_as_they_were_sent(serve: Serve) -> None:
    text = TextProcessor(TEXT.tokenizer, ChatTemplate("{{ tools | tojson }}<tool_call>{{ messages[0].tool_calls }}"))
    server = await serve(text=text)
    await server.chat(tools=[WEATHER], max_tokens=1)
    assert prompt_of(server.engine).startswith(json.dumps([WEATHER]))


async def test_auto_without_a_known_parser_says_what_to_do(serve: Serve) -> None:
    text = TextProcessor(TEXT.tokenizer, ChatTemplate("{{ tools | tojson }}{{ messages[0].content }}"))
    server = await serve(text=text)
    assert_error(await server.chat(tools=[WEATHER]), 400, "tool_choice", "--tool-call-parser")
    assert (await server.chat(tools=[WEATHER], tool_choice="required", max_tokens=2)).status_code == 200
    chosen = await serve(text=text, tool_call_parser="mistral", engine=says('[TOOL_CALLS]weather{"city": "Oslo"}'))
    (call,) = (await chosen.chat(tools=[WEATHER], max_tokens=99)).json()["choices"][0]["message"]["tool_calls"]
    assert len(call["id"]) == 9, "Mistral's templates take no other"


async def test_choices_have_calls_of_their_own(serve: Serve) -> None:
    server = await serve(says(CALL))
    body = (await server.chat(tools=[WEATHER], n=3, max_tokens=150)).json()
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in body["choices"]}
    assert len(ids) == 3


async def test_logprobs_and_token_ids_are_each_given_once(serve: Serve) -> None:
    server = await serve(says(CALL))
    fields: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 150, "logprobs": True, "return_token_ids": True}
    chunks = events(await server.chat(**fields, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice.get("token_ids", ())] == [*CALL.encode(), 258]
    entries = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert len(entries) == len(CALL) + 1


def test_references_inside_a_tools_schema_still_point_to_it() -> None:
    schema = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}, "q": {"$ref": "#"}}, "$defs": {"P": {}}}
    found = calls_schema({"f": schema}, False)
    assert found["maxItems"] == 1
    moved = found["$defs"]["tool_0"]["properties"]
    assert (moved["p"]["$ref"], moved["q"]["$ref"]) == ("#/$defs/tool_0/$defs/P", "#/$defs/tool_0")
