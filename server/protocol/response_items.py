"""The items of a Responses request: turns, calls, their results and reasoning, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.fields import MAX_STRING_CHARS

_ROLES = ("system", "developer", "user", "assistant")
Message = dict[str, Any]


def messages_of(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Messages in a chat's shape. Reasoning and calls belong to the assistant's turn they stand beside."""
    messages: list[Message] = []
    reasoning: list[str] = []
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        match kind:
            case "reasoning":
                reasoning.append(_reasoning_text(item, i))
                continue
            case "function_call" if messages and messages[-1]["role"] == "assistant" and not reasoning:
                messages[-1].setdefault("tool_calls", []).append(_call(item, i))
                continue
            case "function_call":
                message: Message = {"role": "assistant", "content": "", "tool_calls": [_call(item, i)]}
            case "function_call_output":
                content = _content(item.get("output"), f"input.{i}.output")
                message = {"role": "tool", "tool_call_id": _string(item, "call_id", i), "content": content}
            case "message":
                message = _message(item, i)
            case _:
                raise InvalidParameterError(
                    f"input.{i}: this server takes items of type message, reasoning, function_call and "
                    f"function_call_output, found {kind!r:.64}",
                    "input",
                )
        if reasoning and message["role"] == "assistant":
            message["reasoning"] = "\n".join(reasoning)
            reasoning = []
        messages.append(message)
    if not messages:
        raise InvalidParameterError("input holds no message; expected at least one", "input")
    return messages


def check_results(messages: Sequence[Message]) -> None:
    """Refuse the result of a call that nobody made before it. Raises InvalidParameterError."""
    called: set[str] = set()
    for message in messages:
        called.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] == "tool" and message["tool_call_id"] not in called:
            raise InvalidParameterError(
                f"No tool call found for function call output with call_id {message['tool_call_id']:.140}.", "input"
            )


def _message(item: dict[str, Any], position: int) -> Message:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidParameterError(f"input.{position}.role must be one of {_ROLES}, found {role!r:.64}", "input")
    return {"role": role, "content": _content(item.get("content"), f"input.{position}.content")}


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidParameterError(f"{where} must be a string or a list of parts", "input")
    return content


def _call(item: dict[str, Any], position: int) -> dict[str, Any]:
    function = {name: _string(item, name, position) for name in ("name", "arguments")}
    return {"id": _string(item, "call_id", position), "type": "function", "function": function}


def _string(item: dict[str, Any], name: str, position: int) -> str:
    value = item.get(name)
    if not isinstance(value, str) or (name != "arguments" and len(value) > MAX_STRING_CHARS):
        raise InvalidParameterError(
            f"input.{position}.{name} must be a string of at most {MAX_STRING_CHARS} characters, found {value!r:.64}",
            "input",
        )
    return value


def _reasoning_text(item: dict[str, Any], position: int) -> str:
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidParameterError(f"input.{position}: a reasoning item needs parts with a text", "input")
    return "\n".join(str(text) for text in texts)
