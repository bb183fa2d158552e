"""DeepSeek's calls: V3 names a type and fences the arguments, V3.1 writes name and arguments alone."""

from __future__ import annotations

from server.tools.events import CallBegin, Content, Event
from server.tools.json_calls import MAX_NAME_CHARS, ValueEnd
from server.tools.stepping import SteppingParser

_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_CALL_BEGIN = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekTools(SteppingParser):
    """Both versions; the word before the separator tells which: V3 has "function" there."""

    markers = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEPARATOR)

    def __init__(self) -> None:
        super().__init__()
        self._state = self._content
        self._held: list[str] = []
        self._value = ValueEnd()

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def finish(self) -> list[Event]:
        return [Content(self._cutter.rest())] if self._state == self._content else []

    def _content(self, events: list[Event]) -> bool:
        before, found = self._cutter.until(_CALLS_BEGIN)
        events.append(Content(before))
        if found is not None:
            self._state = self._between
        return found is not None

    def _between(self, events: list[Event]) -> bool:
        """Between calls there is nothing but line ends."""
        _, found = self._cutter.until(_CALL_BEGIN, _CALLS_END)
        if found is not None:
            self._held = []
            self._state = self._head if found == _CALL_BEGIN else self._content
        return found is not None

    def _collect(self, *markers: str) -> tuple[str, str | None]:
        """Text up to a marker; a name that does not end is given up."""
        text, found = self._cutter.until(*markers)
        self._held.append(text)
        if found is None:
            if sum(map(len, self._held)) > MAX_NAME_CHARS:
                self._state = self._skip_call
            return "", None
        text, self._held = "".join(self._held), []
        return text, found

    def _head(self, events: list[Event]) -> bool:
        text, found = self._collect(_SEPARATOR, _CALL_END)
        if found == _SEPARATOR:
            if text.strip() == "function":
                self._state = self._name
            else:
                self._begin(text, events)
        elif found is not None:
            self._state = self._between
        return found is not None or self._state == self._skip_call

    def _name(self, events: list[Event]) -> bool:
        text, found = self._collect("\n", _CALL_END)
        if found is not None:
            self._begin(text, events)
        if found == _CALL_END:
            self._state = self._between
        return found is not None or self._state == self._skip_call

    def _begin(self, name: str, events: list[Event]) -> None:
        events.append(CallBegin(name.strip()))
        self._value = ValueEnd()
        self._state = self._before_arguments

    def _before_arguments(self, events: list[Event]) -> bool:
        """The fence, or nothing, before the JSON object."""
        _, found = self._cutter.until("{", _CALL_END)
        if found == "{":
            self._cutter.prepend("{")
        if found is not None:
            self._state = self._arguments if found == "{" else self._between
        return found is not None

    def _arguments(self, events: list[Event]) -> bool:
        ended = self._take_value(self._value, events)
        if ended:
            self._state = self._skip_call
        return ended

    def _skip_call(self, events: list[Event]) -> bool:
        _, found = self._cutter.until(_CALL_END, _CALLS_END)
        if found is not None:
            self._state = self._between if found == _CALL_END else self._content
        return found is not None
