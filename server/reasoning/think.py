"""Reasoning between tags: <think> ... </think>, as DeepSeek R1, Qwen3, Nemotron and many others write it."""

from __future__ import annotations

from server.tools.events import Content, Event, Reasoning
from server.tools.stepping import SteppingParser

THINK, THINK_END = "<think>", "</think>"


class ThinkTags(SteppingParser):
    """`is_open`: the text begins inside the reasoning, because the prompt ended with the opening tag or the model
    always thinks. Otherwise it is reasoning only if the tag comes first.
    """

    markers = (THINK, THINK_END)

    def __init__(self, is_open: bool) -> None:
        super().__init__()
        self._is_open = is_open
        self._lead: list[str] = []  # blanks before the first word
        self._state = self._begin

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def finish(self) -> list[Event]:
        thinking = self._state == self._reasoning or (self._state == self._begin and self._is_open)
        text = "".join(self._lead) + self._cutter.rest()
        return [Reasoning(text) if thinking else Content(text)]

    def _begin(self, events: list[Event]) -> bool:
        text = self._cutter.rest()
        self._cutter.feed(text.lstrip())
        self._lead.append(text[: len(text) - len(text.lstrip())])
        if self._cutter.is_empty:
            return False
        found = self._cutter.starts(THINK)
        if found is None:
            return False
        lead, self._lead = "".join(self._lead), []
        self._state = self._reasoning if found or self._is_open else self._content
        if not found:
            self._cutter.prepend(lead)
        return True

    def _reasoning(self, events: list[Event]) -> bool:
        text, found = self._cutter.until(THINK_END)
        events.append(Reasoning(text))
        if found is not None:
            self._state = self._content
        return found is not None

    def _content(self, events: list[Event]) -> bool:
        events.append(Content(self._cutter.rest()))
        return False
