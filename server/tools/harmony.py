"""gpt-oss's harmony format: messages on channels, told apart by special tokens. Reasoning, content and calls in one."""

from __future__ import annotations

from server.tools.cutter import Cutter
from server.tools.events import CallArguments, CallBegin, Content, Event, Reasoning

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_CONSTRAIN = "<|constrain|>"
_RECIPIENT = " to="
MAX_HEADER_CHARS = 1024
FINAL = f"{_CHANNEL}final{_MESSAGE}"  # from here on the answer itself
ANALYSIS = f"{_CHANNEL}analysis{_MESSAGE}"
END = _ENDS[0]
REPLY = f"{_START}assistant"


class Harmony:
    """analysis is reasoning, final is content, and so is commentary unless it is addressed to a function.

    Text outside any message is content too: a model that does not know the format is still heard.
    """

    markers = (_START, _CHANNEL, _MESSAGE, *_ENDS, _CONSTRAIN)

    def __init__(self) -> None:
        self._cutter = Cutter()
        self._begun = False
        self._in_header = False
        self._header: list[str] = []
        self._kind: type[Content] | type[Reasoning] | type[CallArguments] = Content

    def push(self, text: str) -> list[Event]:
        self._cutter.feed(text)
        events: list[Event] = []
        while self._begun or self._begin_text():
            if not (self._read_header(events) if self._in_header else self._read_body(events)):
                break
        return events

    def finish(self) -> list[Event]:
        return [] if self._in_header else [self._kind(self._cutter.rest())]

    def _begin_text(self) -> bool:
        """The prompt ends inside a header, and a call may go on with it: " to=functions.name"."""
        found = None if self._cutter.is_empty else self._cutter.starts(_RECIPIENT)
        if found is None:
            return False
        self._begun = True
        if found:
            self._in_header, self._header = True, [found]
        return True

    def _read_body(self, events: list[Event]) -> bool:
        text, found = self._cutter.until(_START, _CHANNEL, *_ENDS)
        events.append(self._kind(text))
        if found in (_START, _CHANNEL):
            self._in_header, self._header = True, [found or ""]
        if found is not None:
            self._kind = Content
        return found is not None

    def _read_header(self, events: list[Event]) -> bool:
        text, found = self._cutter.until(_MESSAGE, *_ENDS)
        self._header.append(text)
        too_long = sum(map(len, self._header)) > MAX_HEADER_CHARS
        if found is None and not too_long:
            return False
        self._in_header = False
        if found == _MESSAGE and not too_long:
            self._begin("".join(self._header), events)
        return True

    def _begin(self, header: str, events: list[Event]) -> None:
        """A message with this header: its channel, and to whom it goes."""
        _, _, after = header.partition(_CHANNEL)
        channel = after.split("<", 1)[0].split()[:1]
        words = header.replace(_CHANNEL, " ").replace(_CONSTRAIN, " ").split()
        recipient = next((word[3:] for word in words if word.startswith("to=")), None)
        self._kind = Reasoning if channel == ["analysis"] else Content
        if recipient is not None and recipient not in ("assistant", "user", "all"):
            events.append(CallBegin(recipient.removeprefix("functions.")))
            self._kind = CallArguments
