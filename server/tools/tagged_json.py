"""Families that write calls as JSON between tags: Hermes and Qwen, Nemotron."""

from __future__ import annotations

from server.tools.events import Content, Event
from server.tools.json_calls import CallReader
from server.tools.stepping import SteppingParser


class TaggedJson(SteppingParser):
    """`begin` JSON `end`, with content around it; the JSON is one call or an array of them.

    What looks like a call and is none stays content, tag and all. `end` may be missing: the next `begin` will do.
    """

    def __init__(self, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        super().__init__()
        self._reader: CallReader | None = None
        self._after_call = False  # where only `end`, or another `begin`, is expected

    def _step(self, events: list[Event]) -> bool:
        if self._reader is not None:
            return self._read(self._reader, events)
        if self._after_call:
            self._cutter.skip_blanks()
            found = self._cutter.starts(self._end, self._begin)
            if found is None:
                return False
            self._after_call = False
        else:
            before, found = self._cutter.until(self._begin)
            events.append(Content(before))
        if found == self._begin:
            self._reader = CallReader()
        return found is not None

    def _read(self, reader: CallReader, events: list[Event]) -> bool:
        text = self._cutter.rest()
        found, taken = reader.push(text)
        events += found
        self._cutter.feed(text[taken:])
        if not (reader.done or reader.failed):
            return False
        if not reader.has_call:  # no call after all
            events.append(Content(self._begin + reader.raw))
        self._after_call = reader.has_call
        self._reader = None
        return True

    def finish(self) -> list[Event]:
        reader, self._reader = self._reader, None
        if reader is not None:
            return [] if reader.has_call else [Content(self._begin + reader.raw)]
        return [Content(self._cutter.rest())]
