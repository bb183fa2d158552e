"""The assistant's message: model text through the parsers, into deltas and into the whole. One for each choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.tools.events import (
    CallArguments,
    CallBegin,
    Content,
    Event,
    PlainText,
    Reasoning,
    TextParser,
    joined,
)

Delta = dict[str, Any]


class Pipeline:
    """Reasoning is split off first; what is content goes to the tool-call parser.

    Blanks beside a call are no content: those before one are held back until it is known what follows.
    """

    def __init__(self, reasoning: TextParser | None, tools: TextParser | None) -> None:
        self._reasoning: TextParser = reasoning or PlainText()
        self._tools: TextParser = tools or PlainText()
        self._trims = tools is not None
        self._blanks: list[str] = []
        self._any_call = False
        self._after_call = False  # and nothing has been said since

    def push(self, text: str) -> list[Event]:
        return joined(self._trimmed(self._through(self._reasoning.push(text))))

    def finish(self) -> list[Event]:
        """The rest; blanks at the end of an answer without calls belong to it."""
        events = self._through(self._reasoning.finish()) + self._tools.finish()
        found = self._trimmed(events)
        if self._blanks and not self._any_call:
            found.append(Content("".join(self._blanks)))
        return joined(found)

    def _through(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._tools.push(event.text) if isinstance(event, Content) and event.text else [event]
        return found

    def _trimmed(self, events: list[Event]) -> list[Event]:
        if not self._trims:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, CallBegin):
                self._any_call = self._after_call = True
                self._blanks.clear()
            elif isinstance(event, Content):
                text = event.text.lstrip() if self._after_call else event.text
                kept = text.rstrip()
                if kept:
                    found.append(Content("".join(self._blanks) + kept))
                    self._blanks.clear()
                    self._after_call = False
                self._blanks.append(text[len(kept) :])
                continue
            found.append(event)
        return found


@dataclass
class Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def written(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": "".join(self.arguments)},
        }


class MessageWriter:
    """Collects one choice's message and says what is new of it."""

    def __init__(
        self,
        pipeline: Pipeline | None,
        call_id: Callable[[], str],
        *,
        include_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        """`max_calls`: further calls are left out (parallel_tool_calls false)."""
        self._pipeline = pipeline
        self._call_id = call_id
        self._include_reasoning = include_reasoning
        self._max_calls = max_calls
        self._dropping = False
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[Call] = []

    def push(self, text: str, last: bool) -> list[Delta]:
        """Deltas of OpenAI's shape for a piece of text; after the `last` nothing is held back."""
        if self._pipeline is None:
            self._content.append(text)
            return [{"content": text}] if text else []
        events = self._pipeline.push(text) if text else []
        if last:
            events = joined(events + self._pipeline.finish())
        return [delta for event in events if (delta := self._take(event)) is not None]

    def _take(self, event: Event) -> Delta | None:
        match event:
            case Content(text):
                self._content.append(text)
                return {"content": text}
            case Reasoning(text):
                if not self._include_reasoning:
                    return None
                self._reasoning.append(text)
                return {"reasoning": text}
            case CallBegin(name):
                self._dropping = self._max_calls is not None and len(self.calls) >= self._max_calls
                if self._dropping:
                    return None
                self.calls.append(Call(self._call_id(), name))
                return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1].written()}]}
            case CallArguments(text):
                if self._dropping:
                    return None
                self.calls[-1].arguments.append(text)
                return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": text}}]}

    def finish_reason(self, reason: str | None, named: bool) -> str | None:
        """ "tool_calls" where the model stopped to have tools called; a forced, named call ends with "stop"."""
        return "tool_calls" if reason == "stop" and self.calls and not named else reason

    def message(self, role: str, echo: str) -> dict[str, Any]:
        """The whole message: all fields, nulls included, but tool_calls only where there are some."""
        content = echo + "".join(self._content)
        calls = {"tool_calls": [call.written() for call in self.calls]} if self.calls else {}
        nothing_said = not content and (bool(self.calls) or bool(self._reasoning))
        return {
            "role": role,
            "content": None if nothing_said else content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": "".join(self._reasoning) or None,
            **calls,
        }
