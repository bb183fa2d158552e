"""Tools on /v1/responses and /v1/messages through the official clients, on the simulated engine: forced calls and the
turn that follows them must work with a model that knows nothing."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.conftest import LiveServer

pytest.importorskip("llguidance", reason="package llguidance is not installed")

MODEL = "simulated"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}, "unit": {"enum": ["C", "F"]}},
    "required": ["days", "unit"],
    "additionalProperties": False,
}
FUNCTION: Any = {"type": "function", "name": "weather", "description": "Weather", "parameters": SCHEMA, "strict": True}
TOOL: Any = {"name": "weather", "description": "Weather", "input_schema": SCHEMA}
FORCED = [("required", {"type": "any"}), ("named", {"type": "tool", "name": "weather"})]


@pytest.fixture(scope="module")
def client(simulated: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(simulated: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=simulated.url, api_key="none", max_retries=0)


def check(arguments: Any) -> None:
    assert set(arguments) == {"days", "unit"}
    assert arguments["unit"] in ("C", "F")
    assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("forced", ["required", "named"])
def test_openai_calls_a_forced_function_and_takes_its_result(client: openai.OpenAI, forced: str) -> None:
    choice: Any = "required" if forced == "required" else {"type": "function", "name": "weather"}
    options: dict[str, Any] = {
        "model": MODEL, "tools": [FUNCTION], "tool_choice": choice, "max_output_tokens": 400,
        "parallel_tool_calls": False, "extra_body": {"seed": 3},
    }  # fmt: skip
    plain = client.responses.create(input="Weather?", **options)
    (call,) = plain.output
    check(json.loads(call.arguments))
    with client.responses.stream(input="Weather?", **options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 1
    (again,) = final.output
    assert (again.name, again.arguments) == (call.name, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    after = client.responses.create(
        model=MODEL, input=[result], previous_response_id=plain.id, tools=[FUNCTION], max_output_tokens=8
    )
    assert (after.output[0].type, after.usage.output_tokens) == ("message", 8)
    whole = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "Weather?"}, call.model_dump(), result], tools=[FUNCTION],
        max_output_tokens=8,
    )  # fmt: skip
    assert whole.usage.input_tokens == after.usage.input_tokens


def test_openai_parses_text_into_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(model=MODEL, input="Weather?", text=form, max_output_tokens=400)
    check(json.loads(answer.output_text))


@pytest.mark.parametrize(("forced", "choice"), FORCED)
def test_anthropic_calls_a_forced_tool_and_takes_its_result(
    claude: anthropic.Anthropic, forced: str, choice: Any
) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "max_tokens": 400, "tools": [TOOL], "extra_body": {"seed": 3},
        "tool_choice": choice | {"disable_parallel_tool_use": True},
    }  # fmt: skip
    asked: list[Any] = [{"role": "user", "content": "Weather?"}]
    plain = claude.messages.create(messages=asked, **options)
    (call,) = plain.content
    assert (plain.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "weather")
    check(call.input)
    with claude.messages.stream(messages=asked, **options) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    check(json.loads("".join(parts)))
    assert final.content[0].input == json.loads("".join(parts))
    assert final.stop_reason == "tool_use"
    results: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}]
    turns = [*asked, {"role": "assistant", "content": plain.content}, {"role": "user", "content": results}]
    after = claude.messages.create(model=MODEL, max_tokens=8, messages=turns, tools=[TOOL])
    assert (after.stop_reason, after.usage.output_tokens) == ("max_tokens", 8)
    count = claude.messages.count_tokens(model=MODEL, messages=turns, tools=[TOOL])
    assert count.input_tokens == after.usage.input_tokens > plain.usage.input_tokens
