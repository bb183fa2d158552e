"""Mistral's calls: [TOOL_CALLS] and a JSON array, or [TOOL_CALLS]name{arguments} as newer tokenizers write it."""

from __future__ import annotations

from server.tools.events import CallBegin, Content, Event
from server.tools.json_calls import MAX_NAME_CHARS, CallReader, ValueEnd
from server.tools.stepping import SteppingParser

_TAG = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
_ID = "[CALL_ID]"


class MistralTools(SteppingParser):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._content
        self._reader = CallReader()
        self._value = ValueEnd()
        self._name: list[str] = []

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def finish(self) -> list[Event]:
        if self._state == self._array:
            return [] if self._reader.has_call else [Content(_TAG + self._reader.raw)]
        if self._state == self._arguments:
            return []
        tag = "" if self._state == self._content else _TAG
        return [Content(tag + "".join(self._name) + self._cutter.rest())]

    def _content(self, events: list[Event]) -> bool:
        before, found = self._cutter.until(_TAG)
        events.append(Content(before))
        if found is not None:
            self._state = self._tagged
        return found is not None

    def _tagged(self, events: list[Event]) -> bool:
        """After the tag: an array, or a name."""
        self._cutter.skip_blanks()
        if self._cutter.is_empty:
            return False
        if (found := self._cutter.starts("[")) == "[":
            self._cutter.prepend("[")
            self._reader = CallReader(array=True)
            self._state = self._array
        elif found == "":
            self._name = []
            self._state = self._read_name
        return True

    def _array(self, events: list[Event]) -> bool:
        text = self._cutter.rest()
        found, taken = self._reader.push(text)
        events += found
        self._cutter.feed(text[taken:])
        if not (self._reader.done or self._reader.failed):
            return False
        if not self._reader.has_call:
            events.append(Content(_TAG + self._reader.raw))
        self._state = self._content
        return True

    def _read_name(self, events: list[Event]) -> bool:
        text, found = self._cutter.until("{", _ARGS, _ID, _TAG)
        self._name.append(text)
        too_long = sum(map(len, self._name)) > MAX_NAME_CHARS
        if found is None and not too_long:
            return False
        name = "".join(self._name)
        self._name = []
        if too_long or found == _TAG or not name.strip():  # no call after all
            events.append(Content(_TAG + name))
            self._cutter.prepend(found or "")
            self._state = self._content
            return True
        events.append(CallBegin(name.strip()))
        self._value = ValueEnd()
        self._state = self._skip_id if found == _ID else self._arguments
        if found == "{":
            self._cutter.prepend("{")
        return True

    def _skip_id(self, events: list[Event]) -> bool:
        _, found = self._cutter.until(_ARGS, _TAG)
        if found == _TAG:
            self._cutter.prepend(_TAG)
        if found is not None:
            self._state = self._arguments if found == _ARGS else self._content
        return found is not None

    def _arguments(self, events: list[Event]) -> bool:
        ended = self._take_value(self._value, events)
        if ended:
            self._state = self._content
        return ended
