"""What the parsers of model text share: text goes in, and steps take from it until no step finds enough."""

from __future__ import annotations

from abc import ABC, abstractmethod

from server.tools.cutter import Cutter
from server.tools.events import CallArguments, Event
from server.tools.json_calls import ValueEnd


class SteppingParser(ABC):
    """A `TextParser` in steps over a Cutter; what was not taken waits for more text."""

    def __init__(self) -> None:
        self._cutter = Cutter()

    def push(self, text: str) -> list[Event]:
        self._cutter.feed(text)
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    @abstractmethod
    def _step(self, events: list[Event]) -> bool:
        """Take what can be taken; whether there may be more."""

    def _take_value(self, value: ValueEnd, events: list[Event]) -> bool:
        """Take a piece of a JSON value, as arguments; whether it ended with that."""
        text = self._cutter.rest()
        if not text:
            return False
        end, ended = value.find(text, 0)
        events.append(CallArguments(text[:end]))
        self._cutter.feed(text[end:])
        return ended
