"""The output of a response: a chat's deltas as items, and the events that tell of them."""

from __future__ import annotations

import secrets
from typing import Any

Event = dict[str, Any]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PART_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


class OutputItems:
    """Items in the order in which the model writes them; the newest may still be open.

    Log-probabilities belong to the text of messages: those of reasoning and calls are left out.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the open item
        self._head: dict[str, Any] = {}
        self._text: list[str] = []
        self._logprobs: list[Any] = []
        self._waiting: list[Any] = []  # log-probabilities of tokens whose text has not come yet

    def push(self, deltas: list[dict[str, Any]], logprobs: list[Any]) -> list[Event]:
        """Events for what is new; the `logprobs` are those of the tokens that it took."""
        self._waiting += logprobs
        if not deltas:
            return self._more("", self._taken()) if self._kind == "message" and self._waiting else []
        events: list[Event] = []
        for delta in deltas:
            if "content" in delta:
                events += self._begin("message") + self._more(delta["content"], self._taken())
                continue
            self._waiting.clear()
            if "reasoning" in delta:
                events += self._begin("reasoning") + self._more(delta["reasoning"])
                continue
            (call,) = delta["tool_calls"]
            if "id" in call:
                events += self._end("completed")
                events += self._begin("function_call", call_id=call["id"], name=call["function"]["name"])
            if call["function"]["arguments"]:
                events += self._more(call["function"]["arguments"])
        return events

    def finish(self, status: str) -> list[Event]:
        """The last events; the open item gets this status. An answer without anything in it has an empty message."""
        events = self._begin("message") if self._kind is None else []
        if self._kind == "message" and self._waiting:
            events += self._more("", self._taken())
        return events + self._end(status)

    def _taken(self) -> list[Any]:
        taken, self._waiting = self._waiting, []
        return taken

    @property
    def _where(self) -> dict[str, Any]:
        where = {"item_id": self._head["id"], "output_index": len(self.items)}
        return where if self._kind == "function_call" else {**where, "content_index": 0}

    def _begin(self, kind: str, **head: Any) -> list[Event]:
        """Open an item, unless the open one is of this kind."""
        if self._kind == kind:
            return []
        events = self._end("completed")
        self._kind = kind
        self._head = {"id": f"{_PREFIXES[kind]}_{secrets.token_hex(24)}", "type": kind, **head}
        added = {"type": "response.output_item.added", "output_index": len(self.items)}
        events.append({**added, "item": self._item("in_progress", [])})
        if kind != "function_call":
            events.append({"type": "response.content_part.added", **self._where, "part": self._part()})
        return events

    def _more(self, text: str, logprobs: list[Any] | None = None) -> list[Event]:
        self._text.append(text)
        self._logprobs += logprobs or []
        if self._kind == "function_call":
            return [{"type": "response.function_call_arguments.delta", **self._where, "delta": text}]
        extra = {"logprobs": logprobs or []} if self._kind == "message" else {}
        return [{"type": f"{_PART_EVENTS[self._kind or '']}.delta", **self._where, "delta": text, **extra}]

    def _end(self, status: str) -> list[Event]:
        """Close the open item, if there is one."""
        kind, text = self._kind, "".join(self._text)
        if kind is None:
            return []
        if kind == "function_call":
            done = {**self._where, "name": self._head["name"], "arguments": text}
            events: list[Event] = [{"type": "response.function_call_arguments.done", **done}]
            item = self._item(status, [])
        else:
            part = self._part()
            extra = {"logprobs": part["logprobs"]} if kind == "message" else {}
            events = [
                {"type": f"{_PART_EVENTS[kind]}.done", **self._where, "text": text, **extra},
                {"type": "response.content_part.done", **self._where, "part": part},
            ]
            item = self._item(status, [part])
        events.append({"type": "response.output_item.done", "output_index": len(self.items), "item": item})
        self.items.append(item)
        self._kind, self._text, self._logprobs = None, [], []
        return events

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        match self._kind:
            case "message":
                rest: dict[str, Any] = {"role": "assistant", "content": content}
            case "reasoning":
                rest = {"summary": [], "content": content, "encrypted_content": None}
            case _:
                rest = {"arguments": "".join(self._text)}
        return {**self._head, "status": status, **rest}
