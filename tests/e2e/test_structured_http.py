"""Structured output and tools through real processes and the official client, on the simulated engine: no model knows
less, and forced calls and grammars must work all the same."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import openai
import pytest

from tests.e2e.conftest import LiveServer

pytest.importorskip("llguidance", reason="package llguidance is not installed")

MODEL = "simulated"
MESSAGES: list[Any] = [{"role": "user", "content": "Weather?"}]
COLOURS = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 4}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}, "unit": {"enum": ["C", "F"]}},
            "required": ["days", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
    "additionalProperties": False,
}}}  # fmt: skip


@pytest.fixture(scope="module")
def client(simulated: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **{"max_tokens": 400, "seed": 3} | options)


def test_response_format_gives_what_the_schema_says_and_stops(client: openai.OpenAI) -> None:
    schema = {"name": "colours", "schema": COLOURS, "strict": True}
    for seed in range(5):
        choice = ask(client, response_format={"type": "json_schema", "json_schema": schema}, seed=seed).choices[0]
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content)) <= {"red", "green"}


@pytest.mark.parametrize("stream", [False, True])
def test_structured_outputs_reach_completions_too(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=50, stream=stream, n=2, temperature=1.0,
        extra_body={"structured_outputs": {"regex": "[a-c]{5}-[0-9]"}},
    )  # fmt: skip
    texts = {0: "", 1: ""}
    if stream:
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = {choice.index: choice.text for choice in answer.choices}
    assert all(re.fullmatch("[a-c]{5}-[0-9]", text) for text in texts.values()), texts


def test_required_tools_are_called_by_a_model_that_knows_nothing(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = ask(client, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = choice.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == ({"days", "unit"} if call.function.name == "weather" else {"zone"})
        assert choice.choices[0].finish_reason == "tool_calls"


def test_named_tool_streams_its_arguments(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    stream = ask(client, tools=[WEATHER, CLOCK], tool_choice=named, stream=True)
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "weather"
    assert calls[0].id
    assert 1 <= json.loads("".join(call.function.arguments or "" for call in calls))["days"] <= 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= nothing"}}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
         "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"a": {"$ref": "#/missing"}}}}}], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_grammar_that_does_not_compile_is_that_requests_400(
    client: openai.OpenAI, options: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        list(ask(client, stream=stream, **options))
    assert error.value.param == param


async def test_hostile_grammars_hold_nobody_up(simulated: LiveServer) -> None:
    """Each is refused or works, while plain requests go on and the engine lives."""
    client = openai.AsyncOpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)
    chain = "root ::= r0\n" + "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(20_000)) + 'r20000 ::= "b"\n'
    bombs = [
        {"grammar": chain}, {"grammar": 'root ::= root root | "a" | ""'}, {"regex": "((a{1,99}){1,99}){1,99}"},
        {"regex": "(.*a.{20})+"}, {"choice": [f"word {i * 7919}" for i in range(10_000)]},
        {"json": {"type": "array", "items": {}, "minItems": 10**6}},
    ]  # fmt: skip

    async def bomb(constraint: dict[str, Any]) -> str:
        try:
            answer = await client.completions.create(
                model=MODEL, prompt="x", max_tokens=8, extra_body={"structured_outputs": constraint}
            )
        except openai.BadRequestError:
            return "refused"
        return answer.choices[0].finish_reason

    async def plain() -> float:
        started = time.monotonic()
        await client.completions.create(model=MODEL, prompt="y", max_tokens=4)
        return time.monotonic() - started

    outcomes = asyncio.gather(*map(bomb, bombs))
    slowest = 0.0
    while not outcomes.done():
        slowest = max(slowest, await plain())
        await asyncio.sleep(0.05)
    assert outcomes.result()[0] == "refused", "it overflows the stack of the process that tries it"
    assert set(outcomes.result()) <= {"refused", "length", "stop"}
    assert slowest < 5
    simulated.assert_idle()


def test_abandoned_constrained_stream_leaves_nothing(simulated: LiveServer, client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, extra_body={"structured_outputs": {"regex": "[a-z]{300}"}})
    for _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    simulated.assert_idle()
