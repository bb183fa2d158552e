"""Calls written as JSON objects, read while they arrive: {"name": ..., "arguments": {...}}, alone or in an array."""

from __future__ import annotations

import json
from enum import Enum, auto

from server.tools.events import CallArguments, CallBegin, Event

_BLANKS = " \t\r\n"
_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")
MAX_NAME_CHARS = 256


class ValueEnd:
    """Finds where a JSON value ends. Brackets and strings are followed; what stands between them is not judged."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False
        self.is_string = False

    def find(self, text: str, start: int) -> tuple[int, bool]:
        """(index after the value's last character in `text`, or its length; whether the value ends there)."""
        for i in range(start, len(text)):
            char = text[i]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return i + 1, True
            elif char == '"':
                if self._begun and self._depth == 0:
                    return i, True
                self.is_string = self.is_string or not self._begun
                self._in_string = self._begun = True
            elif char in "{[":
                self._depth += 1
                self._begun = True
            elif char in "}]":
                if self._depth == 0:
                    return i, True  # the end of what holds this value, a number or a word
                self._depth -= 1
                if self._depth == 0:
                    return i + 1, True
            elif self._depth == 0 and self._begun and (char in _BLANKS or char in ",;"):
                return i, True
            elif char not in _BLANKS:
                self._begun = True
        return len(text), False


class _State(Enum):
    START = auto()  # before an object or the array
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()  # after a value: comma or the object's end
    BETWEEN = auto()  # after an object of an array
    DONE = auto()
    FAILED = auto()


class CallReader:
    """Reads one call object, or an array of them.

    done     the last character of the object or array was taken
    failed   this is not such an object; the character that says so is not taken
    raw      what was taken, as long as no call has begun
    """

    def __init__(self, array: bool | None = None) -> None:
        """`array`: whether an array has to come; None for either."""
        self._state = _State.START
        self._array = array
        self._in_array = False
        self._raw: list[str] = []
        self.has_call = False  # one has begun
        self._new_object()

    def _new_object(self) -> None:
        self._key: list[str] = []
        self._name: str | None = None
        self._value = ValueEnd()
        self._collected: list[str] = []
        self._held: list[str] = []  # arguments that came before the name
        self._has_arguments = False

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    @property
    def failed(self) -> bool:
        return self._state is _State.FAILED

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, text: str) -> tuple[list[Event], int]:
        """Events, and how many characters were taken: all of them unless done or failed."""
        events: list[Event] = []
        at = 0
        while at < len(text) and self._state not in (_State.DONE, _State.FAILED):
            before = at
            at = self._step(text, at, events)
            if not self.has_call:
                self._raw.append(text[before:at])
        return events, at

    def _step(self, text: str, at: int, events: list[Event]) -> int:
        """Take at least one character, or fail; returns where to go on."""
        if self._state is _State.VALUE:
            return self._take_value(text, at, events)
        if self._state is _State.KEY and self._key:
            return self._take_key(text, at)
        char = text[at]
        if char not in _BLANKS:
            self._state = self._after(char, events)
        return at if self._state is _State.FAILED else at + 1

    def _after(self, char: str, events: list[Event]) -> _State:
        """The state after one character outside keys and values."""
        match self._state, char:
            case _State.START, "{" if self._in_array or self._array is not True:
                return _State.KEY
            case _State.START, "[" if not self._in_array and self._array is not False:
                self._in_array = True
                return _State.START
            case _State.START, "]" if self._in_array:
                return _State.DONE
            case _State.KEY, '"':
                self._key, self._value = ['"'], ValueEnd()
                self._value.find('"', 0)
                return _State.KEY
            case ((_State.KEY | _State.NEXT), "}"):
                return self._end_object(events)
            case _State.COLON, ":":
                self._value, self._collected = ValueEnd(), []
                return _State.VALUE
            case _State.NEXT, ",":
                return _State.KEY
            case _State.BETWEEN, ",":
                return _State.START
            case _State.BETWEEN, "]":
                return _State.DONE
        return _State.FAILED

    def _take_key(self, text: str, at: int) -> int:
        end, ended = self._value.find(text, at)
        self._key.append(text[at:end])
        if ended:
            self._key = [_string("".join(self._key)) or ""]
            self._state = _State.COLON
        return end

    def _take_value(self, text: str, at: int, events: list[Event]) -> int:
        end, ended = self._value.find(text, at)
        piece = text[at:end]
        key = self._key[0]
        if key in _ARGUMENTS and not self._value.is_string:
            self._take_arguments(piece if self._has_arguments else piece.lstrip(_BLANKS), events)
        elif key in _ARGUMENTS or key in _NAMES:
            self._collected.append(piece)
        if ended:
            self._state = self._end_value(key, events)
            self._key = []
        return end

    def _end_value(self, key: str, events: list[Event]) -> _State:
        if key in _NAMES:
            name = _string("".join(self._collected))
            if not name or len(name) > MAX_NAME_CHARS or self._name is not None:
                return _State.FAILED
            self._name, self.has_call = name, True
            self._raw.clear()
            events.append(CallBegin(name))
            events.extend(CallArguments(piece) for piece in self._held)
        elif key in _ARGUMENTS and self._value.is_string:  # JSON within a string, as some models write it
            inner = _string("".join(self._collected))
            if inner is None:
                return _State.FAILED
            self._take_arguments(inner, events)
        return _State.NEXT

    def _take_arguments(self, piece: str, events: list[Event]) -> None:
        if piece:
            self._has_arguments = True
            if self._name is None:
                self._held.append(piece)
            else:
                events.append(CallArguments(piece))

    def _end_object(self, events: list[Event]) -> _State:
        if self._name is None:
            return _State.FAILED
        if not self._has_arguments:
            events.append(CallArguments("{}"))
        self._new_object()
        return _State.BETWEEN if self._in_array else _State.DONE


def _string(text: str) -> str | None:
    """The string that a JSON literal stands for; None when it is none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
