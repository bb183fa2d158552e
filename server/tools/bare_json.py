"""Calls as JSON without tags around them: Llama 3's, and those that a grammar forces (tool_choice required, named)."""

from __future__ import annotations

from server.tools.events import CallArguments, CallBegin, Content, Event
from server.tools.json_calls import CallReader
from server.tools.stepping import SteppingParser

_PYTHON_TAG = "<|python_tag|>"


class Llama3Json(SteppingParser):
    """The whole answer is one call or several with `;` between, or it is content. <|python_tag|> may come first."""

    def __init__(self) -> None:
        super().__init__()
        self._lead: list[str] = []  # blanks and the tag: content if no call follows
        self._reader: CallReader | None = None
        self._is_content = False
        self._any_call = False

    def _step(self, events: list[Event]) -> bool:
        if self._reader is not None:
            return self._read(self._reader, events)
        if self._is_content:
            events.append(Content(self._cutter.rest()))
            return False
        text = self._cutter.rest()
        self._cutter.feed(text.lstrip())
        self._lead.append(text[: len(text) - len(text.lstrip())])
        if self._cutter.is_empty:
            return False
        match self._cutter.starts("{", "[", _PYTHON_TAG, *([";"] if self._any_call else [])):
            case None:
                return False
            case ("{" | "[") as bracket:
                self._cutter.prepend(bracket)
                self._reader = CallReader()
            case ";":
                self._lead.clear()
            case str(found) if found == _PYTHON_TAG and _PYTHON_TAG not in self._lead:
                self._lead.append(found)
            case str(found):
                self._cutter.prepend("".join(self._lead) + found)
                self._lead.clear()
                self._is_content = True
        return True

    def _read(self, reader: CallReader, events: list[Event]) -> bool:
        text = self._cutter.rest()
        found, taken = reader.push(text)
        events += found
        self._cutter.feed(text[taken:])
        if not (reader.done or reader.failed):
            return False
        if not reader.has_call:
            events.append(Content("".join(self._lead) + reader.raw))
        self._any_call = self._any_call or reader.has_call
        self._is_content = reader.failed or not reader.has_call
        self._lead.clear()
        self._reader = None
        return True

    def finish(self) -> list[Event]:
        if self._reader is not None:
            return [] if self._reader.has_call else [Content("".join(self._lead) + self._reader.raw)]
        return [Content("".join(self._lead) + self._cutter.rest())]


class ForcedCalls:
    """An array of {"name", "parameters"}: what tool_choice "required" makes the grammar allow, and nothing else."""

    def __init__(self) -> None:
        self._reader = CallReader(array=True)

    def push(self, text: str) -> list[Event]:
        return self._reader.push(text)[0]

    def finish(self) -> list[Event]:
        return []


class ForcedCall:
    """The arguments of one named tool: the whole answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[Event]:
        if self._begun:
            return [CallArguments(text)]
        self._begun = True
        return [CallBegin(self._name), CallArguments(text)]

    def finish(self) -> list[Event]:
        return [] if self._begun else [CallBegin(self._name)]
