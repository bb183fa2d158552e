"""What parsers of model text report, and what a parser is. Events of one text are the same however it is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call to `name` begins; calls follow one another, they are never inside each other."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the newest call's arguments."""

    text: str


Event = Content | Reasoning | CallBegin | CallArguments


class TextParser(Protocol):
    """Model text in pieces of any size, events out. Time is linear in the text, whatever it holds."""

    def push(self, text: str) -> list[Event]:
        """Events that are certain now."""
        ...

    def finish(self) -> list[Event]:
        """What was still held back; the text is over."""
        ...


class PlainText:
    """No syntax at all: everything is content."""

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def joined(events: Iterable[Event]) -> list[Event]:
    """The same news in the fewest events: neighbours of one kind as one, empty ones left out."""
    found: list[Event] = []
    parts: list[str] = []
    for event in events:
        if isinstance(event, CallBegin):
            _close(found, parts)
            found.append(event)
        elif event.text:
            if parts and type(found[-1]) is not type(event):
                _close(found, parts)
            if not parts:
                found.append(event)
            parts.append(event.text)
    _close(found, parts)
    return found


def _close(found: list[Event], parts: list[str]) -> None:
    """Give the newest event the text of all its parts."""
    if parts:
        last = found[-1]
        assert not isinstance(last, CallBegin)
        found[-1] = type(last)("".join(parts))
        parts.clear()
