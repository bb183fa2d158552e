"""Qwen3-Coder's and Nemotron 3's calls: XML-like, with one element per parameter, typed by the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.tools.events import CallArguments, CallBegin, Content, Event
from server.tools.json_calls import MAX_NAME_CHARS
from server.tools.stepping import SteppingParser

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3Coder(SteppingParser):
    """`schemas` maps a tool's name to the JSON schema of its parameters; it tells "5" from 5."""

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        super().__init__()
        self._state = self._content
        self._held: list[str] = []
        self._function = ""
        self._parameter = ""
        self._num_parameters = 0

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def finish(self) -> list[Event]:
        if self._state == self._content:
            return [Content(self._cutter.rest())]
        if self._state == self._open:
            return [Content(_CALL + "".join(self._held) + self._cutter.rest())]
        return []  # a call cut short stays as far as it came

    def _content(self, events: list[Event]) -> bool:
        """Some models leave <tool_call> out."""
        before, found = self._cutter.until(_CALL, _FUNCTION)
        events.append(Content(before))
        self._held = []
        if found is not None:
            self._state = self._open if found == _CALL else self._function_name
        return found is not None

    def _open(self, events: list[Event]) -> bool:
        """After <tool_call>: the function, or content that only looked like a call."""
        text = self._cutter.rest()
        self._held.append(text[: len(text) - len(text.lstrip())])
        self._cutter.feed(text.lstrip())
        if self._cutter.is_empty:
            return False
        found = self._cutter.starts(_FUNCTION)
        if found == "":
            events.append(Content(_CALL + "".join(self._held)))
            self._state = self._content
        elif found is not None:
            self._held = []
            self._state = self._function_name
        return found is not None

    def _name(self) -> str | None:
        """A name up to its bracket; "" when it is none."""
        text, found = self._cutter.until(">")
        self._held.append(text)
        if found is None and sum(map(len, self._held)) <= MAX_NAME_CHARS:
            return None
        name = "".join(self._held).strip()
        self._held = []
        return name if found is not None else ""

    def _function_name(self, events: list[Event]) -> bool:
        name = self._name()
        if name is not None:
            self._function, self._num_parameters = name, 0
            self._state = self._between if name else self._after
            if name:
                events.append(CallBegin(name))
        return name is not None

    def _between(self, events: list[Event]) -> bool:
        """Between parameters."""
        _, found = self._cutter.until(_PARAMETER, _FUNCTION_END, _CALL_END)
        if found == _PARAMETER:
            self._state = self._parameter_name
        elif found is not None:
            events.append(CallArguments("}" if self._num_parameters else "{}"))
            self._state = self._after if found == _FUNCTION_END else self._content
        return found is not None

    def _parameter_name(self, events: list[Event]) -> bool:
        name = self._name()
        if name is not None:
            self._parameter = name
            self._state = self._value
        return name is not None

    def _value(self, events: list[Event]) -> bool:
        text, found = self._cutter.until(_PARAMETER_END, _FUNCTION_END)
        self._held.append(text)
        if found is None:
            return False
        value = "".join(self._held).removeprefix("\n").removesuffix("\n")
        self._held = []
        if found == _FUNCTION_END:  # the parameter's own end was left out
            self._cutter.prepend(_FUNCTION_END)
        if self._parameter:
            schema = _property(self._schemas.get(self._function), self._parameter)
            opening = ", " if self._num_parameters else "{"
            events.append(CallArguments(f"{opening}{json.dumps(self._parameter)}: {typed(value, schema)}"))
            self._num_parameters += 1
        self._state = self._between
        return True

    def _after(self, events: list[Event]) -> bool:
        """After the function: </tool_call>, if it is there."""
        text = self._cutter.rest()
        self._cutter.feed(text.lstrip())
        if self._cutter.is_empty:
            return False
        found = self._cutter.starts(_CALL_END)
        if found is not None:
            self._state = self._content
        return found is not None


def _property(schema: Any, name: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(name) if isinstance(properties, Mapping) else None


def typed(value: str, schema: Any) -> str:
    """The parameter's text as JSON: a string where the schema wants one, else whatever JSON it is."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if kinds == ["string"] or (isinstance(schema, Mapping) and not kinds and _all_strings(schema.get("enum"))):
        return json.dumps(value, ensure_ascii=False)
    try:
        parsed = json.loads(value.strip(), parse_constant=_not_json)
    except (ValueError, RecursionError):
        parsed = {"True": True, "False": False, "None": None}.get(value.strip(), value)  # as Python would say it
    if "string" in kinds and not isinstance(parsed, str) and not _fits(parsed, kinds):
        parsed = value
    return json.dumps(parsed, ensure_ascii=False)


def _fits(value: Any, kinds: list[Any]) -> bool:
    names = {dict: "object", list: "array", bool: "boolean", type(None): "null", int: "integer", float: "number"}
    name = names.get(type(value), "string")
    return name in kinds or (name == "integer" and "number" in kinds)


def _all_strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _not_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
