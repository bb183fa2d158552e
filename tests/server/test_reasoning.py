"""Reasoning over HTTP: its own field in messages and deltas, told apart by the chat template's style."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.structured.spec import ReasoningSpan
from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.processor import TextProcessor
from server.reasoning.parsers import REASONING_PARSERS, reasoning_style
from tests.fakes import FakeEngine
from tests.server.conftest import TEXT, Serve, events
from tests.server.test_tools import WEATHER, says

THINKING = "{{ messages[0].content }}{# </think> #}"
OPENED = "{{ messages[0].content }}{# </think> #}<think>\n"
CLOSED = "{{ messages[0].content }}<think>\n\n</think>\n\n"


def text_of(template: str) -> TextProcessor:
    return TextProcessor(TEXT.tokenizer, ChatTemplate(template))


async def message(serve: Serve, template: str, said: str, parser: str = "auto", **fields: Any) -> dict[str, Any]:
    server = await serve(engine=says(said), text=text_of(template), reasoning_parser=parser)
    body = {"max_tokens": 100} | fields
    whole: dict[str, Any] = (await server.chat(**body)).json()["choices"][0]["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in events(await server.chat(**body, stream=True))]
    for name in ("content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (whole[name] or ""), "streamed equals whole"
    return whole


@pytest.mark.parametrize(
    ("template", "parser", "said", "reasoning", "content"),
    [
        (THINKING, "auto", "<think>hm</think>\n\nYes", "hm", "\n\nYes"),
        (THINKING, "auto", "Yes", None, "Yes"),
        (OPENED, "auto", "hm</think>Yes", "hm", "Yes"),
        (OPENED, "auto", "hm", "hm", None),
        (CLOSED, "auto", "Yes", None, "Yes"),
        (THINKING, "deepseek_r1", "hm</think>Yes", "hm", "Yes"),
        (CLOSED, "deepseek_r1", "Yes", None, "Yes"),
        (THINKING, "none", "<think>hm</think>Yes", None, "<think>hm</think>Yes"),
        ("{{ messages[0].content }}", "auto", "<think>hm</think>Yes", None, "<think>hm</think>Yes"),
        ("{{ messages[0].content }}", "nemotron", "<think>hm</think>Yes", "hm", "Yes"),
        (
            "{{ messages[0].content }}<|start|>assistant{# <|channel|><|message|> #}", "auto",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes", "hm", "Yes",
        ),
    ],
)  # fmt: skip
async def test_reasoning_and_answer_are_told_apart(
    serve: Serve, template: str, parser: str, said: str, reasoning: str | None, content: str | None
) -> None:
    found = await message(serve, template, said, parser)
    assert (found["reasoning"], found["content"]) == (reasoning, content)


async def test_reasoning_can_be_left_out(serve: Serve) -> None:
    found = await message(serve, OPENED, "hm</think>Yes", include_reasoning=False)
    assert (found["reasoning"], found["content"]) == (None, "Yes")


async def test_calls_come_after_the_reasoning(serve: Serve) -> None:
    said = '<tool_call> is it?</think>\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    found = await message(serve, OPENED, said, tools=[WEATHER])
    assert found["reasoning"] == "<tool_call> is it?"
    assert found["tool_calls"][0]["function"]["name"] == "weather"
    assert found["content"] is None


async def test_harmony_calls_are_found_by_the_parser_of_both(serve: Serve) -> None:
    template = "{{ messages[0].content }}{{ tools }}{# <|channel|><|message|> #}"
    said = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
    found = await message(serve, template, said, tools=[WEATHER])
    assert found["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


@pytest.mark.parametrize(
    ("template", "parser", "expected"),
    [
        (OPENED, "auto", ReasoningSpan("<think>", "</think>", True)),
        (THINKING, "auto", ReasoningSpan("<think>", "</think>", False)),
        (CLOSED, "auto", None),
        (THINKING, "gpt_oss", ReasoningSpan("", "<|channel|>final<|message|>", True)),
    ],
)
async def test_grammar_begins_where_the_reasoning_ends(
    serve: Serve, template: str, parser: str, expected: ReasoningSpan | None
) -> None:
    engine = FakeEngine()
    server = await serve(engine=engine, text=text_of(template), reasoning_parser=parser)
    await server.chat(response_format={"type": "json_object"}, max_tokens=2)
    spec = engine.submitted[0].params.structured
    assert spec is not None
    assert spec.reasoning == expected


def test_unknown_reasoning_parser_names_the_flag() -> None:
    assert all(reasoning_style(name, None) is not None for name in REASONING_PARSERS)
    with pytest.raises(ConfigError, match="qwen3") as error:
        reasoning_style("qwen", None)
    assert error.value.flag == "--reasoning-parser"
