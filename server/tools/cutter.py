"""Streamed text, cut at markers."""

from __future__ import annotations


class Cutter:
    """Takes text in pieces and gives it out up to a marker, holding back an end that may become one.

    Between calls no more is kept than the longest marker is long, as long as the reader asks until nothing comes, so
    reading is linear in the text. Markers of one search should not be inside one another.
    """

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> None:
        self._text += text

    def prepend(self, text: str) -> None:
        self._text = text + self._text

    @property
    def is_empty(self) -> bool:
        return not self._text

    def until(self, *markers: str) -> tuple[str, str | None]:
        """(text before the first marker, that marker), both taken; without one, (what cannot be part of one, None)."""
        text = self._text
        start, found = len(text), None
        for marker in markers:
            position = text.find(marker)
            if 0 <= position < start:
                start, found = position, marker
        if found is None:
            start -= max(_overlap(text, marker) for marker in markers)
        self._text = text[start + len(found or "") :]
        return text[:start], found

    def skip_blanks(self) -> None:
        self._text = self._text.lstrip()

    def starts(self, *markers: str) -> str | None:
        """The marker the text begins with, taken; "" when none does; None while it is too short to tell."""
        for marker in markers:
            if self._text.startswith(marker):
                self._text = self._text[len(marker) :]
                return marker
        return None if any(marker.startswith(self._text) for marker in markers) else ""

    def rest(self) -> str:
        """Everything, taken."""
        text, self._text = self._text, ""
        return text


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with, the whole marker excepted."""
    longest = min(len(text), len(marker) - 1)
    tail = text[len(text) - longest :]
    if marker[0] not in tail:
        return 0
    return next((n for n in range(longest, 0, -1) if marker.startswith(tail[longest - n :])), 0)
