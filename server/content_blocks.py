"""The content of one of Anthropic's messages: a chat's deltas as blocks, and the events that tell of them."""

from __future__ import annotations

import json
from typing import Any

Event = dict[str, Any]


class ContentBlocks:
    """Blocks in the order in which the model writes them; the newest may still be open.

    content  the finished ones
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._num_begun = 0
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []

    def push(self, deltas: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            if "content" in delta:
                events += self._begin({"type": "text", "text": ""})
                events += self._more({"type": "text_delta"}, "text", delta["content"])
            elif "reasoning" in delta:
                events += self._begin({"type": "thinking", "thinking": "", "signature": ""})
                events += self._more({"type": "thinking_delta"}, "thinking", delta["reasoning"])
            else:
                (call,) = delta["tool_calls"]
                if "id" in call:
                    events += self._end()
                    block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                    events += self._begin(block)
                if call["function"]["arguments"]:
                    events += self._more({"type": "input_json_delta"}, "partial_json", call["function"]["arguments"])
        return events

    def finish(self) -> list[Event]:
        return self._end()

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        """Open a block, unless the open one is of its type."""
        if self._open is not None and self._open["type"] == block["type"]:
            return []
        events = self._end()
        self._open = block
        events.append({"type": "content_block_start", "index": self._num_begun, "content_block": block})
        self._num_begun += 1
        return events

    def _more(self, delta: dict[str, Any], name: str, text: str) -> list[Event]:
        self._text.append(text)
        return [{"type": "content_block_delta", "index": self._num_begun - 1, "delta": {**delta, name: text}}]

    def _end(self) -> list[Event]:
        """Close the open block, if there is one."""
        if self._open is None:
            return []
        block, text = self._open, "".join(self._text)
        value = _json_or_nothing(text) if block["type"] == "tool_use" else text
        self.content.append({**block, "input" if block["type"] == "tool_use" else block["type"]: value})
        self._open, self._text = None, []
        return [{"type": "content_block_stop", "index": self._num_begun - 1}]


def _json_or_nothing(text: str) -> Any:
    """A call's arguments; {} where max_tokens cut them short, as a reader of the stream has to take them too."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
