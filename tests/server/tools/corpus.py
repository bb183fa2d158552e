"""Model texts of every family, with the events they stand for. [] after a name: arguments {}."""

from __future__ import annotations

from collections.abc import Callable

from server.message import Pipeline
from server.reasoning.think import ThinkTags
from server.tools.bare_json import ForcedCall, ForcedCalls
from server.tools.events import CallArguments, CallBegin, Content, Event, Reasoning, TextParser, joined
from server.tools.harmony import Harmony
from server.tools.parsers import tool_style

SCHEMAS = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    "g": {"type": "object", "properties": {}},
}


def style(name: str) -> Callable[[], Pipeline]:
    found = tool_style(name, None, True)
    assert found is not None
    return lambda: Pipeline(None, found.make(SCHEMAS))


def pipeline(reasoning: Callable[[], TextParser] | None, tools: str | None) -> Callable[[], Pipeline]:
    found = tool_style(tools, None, True) if tools else None
    return lambda: Pipeline(reasoning() if reasoning else None, found.make(SCHEMAS) if found else None)


PARSERS: dict[str, Callable[[], Pipeline]] = {
    name: style(name) for name in ("hermes", "llama3_json", "mistral", "qwen3_coder", "deepseek_v3", "nemotron")
} | {
    "think": pipeline(lambda: ThinkTags(False), "hermes"),
    "think_open": pipeline(lambda: ThinkTags(True), None),
    "harmony": pipeline(Harmony, None),
    "required": lambda: Pipeline(None, ForcedCalls()),
    "named": lambda: Pipeline(None, ForcedCall("f")),
}


def call(name: str, arguments: str) -> list[Event]:
    return [CallBegin(name), CallArguments(arguments)]


def said(text: str) -> list[Event]:
    return [Content(text)]


_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
CASES: list[tuple[str, str, list[Event]]] = [
    (
        "hermes",
        'Let me.\n<tool_call>\n{"name": "f", "arguments": {"a": 1, "s": "x}\\"{"}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"a": [1, {}]}, "name": "g"}</tool_call>',
        said("Let me.") + call("f", '{"a": 1, "s": "x}\\"{"}') + call("g", '{"a": [1, {}]}'),
    ),
    ("hermes", '<tool_call>{"name": "g"}</tool_call> done', call("g", "{}") + said("done")),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"q\\": 2}"}]</tool_call>',
     call("f", "{}") + call("g", '{"q": 2}')),
    ("hermes", "<tool_call>oops</tool_call>", said("<tool_call>oops</tool_call>")),
    ("hermes", 'a < b <tool_call>{"x": 1}</tool_call>', said('a < b <tool_call>{"x": 1}</tool_call>')),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a', call("f", '{"a')),
    ("hermes", '<tool_call>{"name": "f', said('<tool_call>{"name": "f')),
    ("hermes", "plain <tool_ text \n", said("plain <tool_ text \n")),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', call("f", "{}") + call("g", "{}")),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
     call("f", '{"a": 1}') + call("g", "{}")),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 2}}', call("f", '{"a": 2}')),
    ("llama3_json", "<|python_tag|>print(1)", said("<|python_tag|>print(1)")),
    ("llama3_json", '  {"answer": 5} and', said('  {"answer": 5} and')),
    ("llama3_json", 'hello {"name": "f"}', said('hello {"name": "f"}')),
    ("llama3_json", '{"name": "f", "parameters": {}}  thanks', call("f", "{}") + said("thanks")),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
     call("f", '{"a": 1}') + call("g", "{}")),
    ("mistral", 'Hi [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"b": {}}',
     said("Hi") + call("f", '{"a": 1}') + call("g", '{"b": {}}')),
    ("mistral", "[TOOL_CALLS]what", said("[TOOL_CALLS]what")),
    ("mistral", "[TOOL_CALLS][1, 2]", said("[TOOL_CALLS][1, 2]")),
    (
        "qwen3_coder",
        "ok\n<tool_call>\n<function=f>\n<parameter=a>\n3\n</parameter>\n<parameter=s>\nx <b> \"q\"\nl2\n</parameter>\n"
        "</function>\n</tool_call>\nbye",
        said("ok") + call("f", '{"a": 3, "s": "x <b> \\"q\\"\\nl2"}') + said("bye"),
    ),
    ("qwen3_coder", "<function=g>\n</function>", call("g", "{}")),
    ("qwen3_coder", "<tool_call> no", said("<tool_call> no")),
    ("qwen3_coder", "<tool_call><function=f><parameter=s>5</function></tool_call>", call("f", '{"s": "5"}')),
    ("qwen3_coder", "<function=h><parameter=x>5</parameter><parameter=y>t</parameter></function>",
     call("h", '{"x": 5, "y": "t"}')),
    (
        "deepseek_v3",
        f'hm<｜tool▁calls▁begin｜>{_V3}f\n```json\n{{"a": 1}}\n```<｜tool▁call▁end｜>\n'
        f"{_V3}g\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        said("hm") + call("f", '{"a": 1}') + call("g", "{}"),
    ),
    (
        "deepseek_v3",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        call("f", '{"a": 1}'),
    ),
    ("nemotron", '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>', call("f", '{"a": 1}')),
    ("think", '\n<think>hm <x </think>\n\nYes <tool_call>{"name": "g"}</tool_call>',
     [Reasoning("hm <x "), *said("\n\nYes"), *call("g", "{}")]),
    ("think", "no thought", said("no thought")),
    ("think", "<thin", said("<thin")),
    ("think", "  ", said("  ")),
    ("think_open", "hm</think>\n\nYes", [Reasoning("hm"), *said("\n\nYes")]),
    ("think_open", "never ends", [Reasoning("never ends")]),
    ("think_open", "<think>a</think>b</think>", [Reasoning("a"), *said("b</think>")]),
    (
        "harmony",
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|>',
        [Reasoning("think"), *call("f", '{"a": 1}')],
    ),
    ("harmony", "<|channel|>final<|message|>hello<|return|>", said("hello")),
    ("harmony", "<|channel|>commentary<|message|>first<|end|><|start|>assistant<|channel|>final<|message|> last",
     said("first last")),
    ("harmony", " to=functions.g<|channel|>commentary json<|message|>{}<|call|>", call("g", "{}")),
    ("harmony", "plain", said("plain")),
    ("required", '[{"name": "f", "parameters": {"a": [1, "]"]}}, {"name": "g", "parameters": {}}]',
     call("f", '{"a": [1, "]"]}') + call("g", "{}")),
    ("named", '{"a": 1}', call("f", '{"a": 1}')),
    ("named", "", [CallBegin("f")]),
]  # fmt: skip


def parse(make: Callable[[], Pipeline], pieces: list[str]) -> list[Event]:
    """All events of a text that comes in these pieces."""
    parser = make()
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined(events + parser.finish())
