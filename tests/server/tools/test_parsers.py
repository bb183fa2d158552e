"""Every family's syntax: what it means, that cutting does not matter, that hostile text costs linear time."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.errors import ConfigError
from server.tools.events import CallArguments, CallBegin, Content, Event, Reasoning, joined
from server.tools.parsers import TOOL_PARSERS, tool_style
from server.tools.qwen3_coder import typed
from tests.server.tools.corpus import CASES, PARSERS, parse

FRAGMENTS = (
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": 1}', "}", "{", "[", "]", '"', "\\", ",", ":",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "f", ";", "<|python_tag|>", "<function=f>", "<parameter=s>",
    "</parameter>", "</function>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "```json\n", "\n", " ", "<TOOLCALL>", "</TOOLCALL>", "<think>",
    "</think>", "<|channel|>",
    "analysis", "final", "<|message|>", "<|end|>", "<|start|>", " to=functions.f", "<|call|>",
    "<", "é", "日", "text",
)  # fmt: skip


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_text_means_these_events(family: str, text: str, expected: list[Event]) -> None:
    assert parse(PARSERS[family], [text]) == expected


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_text_cut_anywhere_means_the_same(family: str, text: str, expected: list[Event]) -> None:
    for cut in range(len(text) + 1):
        assert parse(PARSERS[family], [text[:cut], text[cut:]]) == expected, f"cut at {cut}"
    assert parse(PARSERS[family], list(text)) == expected, "character by character"


@pytest.mark.parametrize("family", PARSERS)
@settings(max_examples=150, deadline=None)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14), data=st.data())
def test_any_text_cut_anyhow_means_the_same(family: str, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(PARSERS[family], [text])
    assert parse(PARSERS[family], pieces) == whole
    assert parse(PARSERS[family], list(text)) == whole


@pytest.mark.parametrize("family", sorted(set(PARSERS) - {"required", "named"}))
@given(text=st.text(st.characters(exclude_characters="<{[;", exclude_categories=["Cs"]), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_text_without_any_markers_is_left_as_it_is(family: str, text: str) -> None:
    kind = Reasoning if family == "think_open" else Content
    if not text.startswith((" to=", " to")) or family != "harmony":
        assert parse(PARSERS[family], list(text)) == [kind(text)]


HOSTILE = [
    "<tool_call>" * 9_000, "<tool_call>{" + '"a":' * 25_000, '<tool_call>{"name":"f","arguments":' + "[" * 99_000,
    "<" * 100_000, "[TOOL_CALLS]" * 8_000, "[TOOL_CALLS]f{" + '"' * 99_000, "[TOOL_CALLS]" + "n" * 99_000,
    "<function=" + "x" * 99_000, "<function=f><parameter=s>" + "</paramete" * 9_900, "{" * 100_000,
    '{"name": "' + "\\" * 99_000, "<｜tool▁calls▁begin｜>" + "<｜tool▁call▁begin｜>" * 5_000,
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{" * 2_000, "<think>" * 14_000,
    "<think>" + "</thin" * 16_000,
    "<|channel|>" * 9_000, "<|channel|>" + "a" * 99_000, "<|channel|>analysis<|message|>" * 3_300, " " * 100_000,
    "\n<tool_call>\n" * 7_700, "<TOOLCALL>[" * 9_000,
]  # fmt: skip


@pytest.mark.parametrize("family", PARSERS)
def test_hostile_text_costs_time_in_proportion_to_its_length(family: str) -> None:
    """100 kB in pieces of 16 characters: quadratic work would take minutes, this takes a fraction of a second.

    The bound is against the same family reading as much plain text, and generous: both are a few 100 ns a character.
    """
    plain = _seconds(family, "word " * 20_000)
    for text in HOSTILE:
        seconds = _seconds(family, text)
        assert seconds < 40 * plain + 1.0, f"{seconds:.2f} s for {text[:40]!r}..., plain text takes {plain:.3f} s"


def _seconds(family: str, text: str) -> float:
    parser = PARSERS[family]()
    started = time.process_time()
    for at in range(0, len(text), 16):
        parser.push(text[at : at + 16])
    parser.finish()
    return time.process_time() - started


def test_arguments_are_given_out_while_they_arrive() -> None:
    parser = PARSERS["hermes"]()
    assert joined(parser.push('<tool_call>{"name": "f", "arguments": {"s": "on')) == [
        CallBegin("f"),
        CallArguments('{"s": "on'),
    ]
    assert joined(parser.push('e"}')) == [CallArguments('e"}')]


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("5", {"type": "string"}, "5"), ("5", {"type": "integer"}, 5), ("5", None, 5),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True), ("x", {"type": "integer"}, "x"), ("[1, 2]", {"type": "array"}, [1, 2]),
        ("null", {"type": ["string", "null"]}, None), ("5", {"type": ["string", "null"]}, "5"),
        ("a", {"enum": ["a", "b"]}, "a"), ("1", {"enum": ["1"]}, "1"), ("NaN", {"type": "number"}, "NaN"),
        ("[" * 50_000, {"type": "array"}, "[" * 50_000), ('"quoted"', {"type": "string"}, '"quoted"'),
    ],
)  # fmt: skip
def test_parameter_of_an_xml_like_call_is_typed_by_its_schema(value: str, schema: object, expected: object) -> None:
    assert json.loads(typed(value, schema)) == expected


@pytest.mark.parametrize(
    ("template", "has_tools", "expected"),
    [
        ("{{ tools }}<tool_call>", True, "hermes"), ("{{ tools }}<tool_call>\n<function=", True, "qwen3_coder"),
        ("{{ tools }}[TOOL_CALLS]", True, "mistral"), ("{{ tools }}<|python_tag|>", True, "llama3_json"),
        ("{{ tools }}<TOOLCALL>", True, "nemotron"), ("{{ tools }}<｜tool▁calls▁begin｜>", True, "deepseek_v3"),
        ("{{ tools }}<|channel|><|message|>", True, "gpt_oss"), ("{{ tools }}", True, None), ("hi", False, "hermes"),
        (None, False, "hermes"),
    ],
)  # fmt: skip
def test_parser_is_detected_from_the_chat_template(template: str | None, has_tools: bool, expected: str | None) -> None:
    found = tool_style("auto", template, has_tools)
    assert (found and found.name) == expected


def test_parser_by_name_and_unknown_names() -> None:
    assert all(tool_style(name, None, True) is not None for name in TOOL_PARSERS)
    assert tool_style("none", "<tool_call>", True) is None
    with pytest.raises(ConfigError, match="hermes") as error:
        tool_style("hermse", None, True)
    assert error.value.flag == "--tool-call-parser"
