"""The blocks of Anthropic's messages: text, thinking, calls of tools and their results, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatMessage
from server.protocol.fields import MAX_STRING_CHARS, TEXT_ALONE, Text, note_unknown

Block = dict[str, Any]
_TAKEN = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


class AnthropicMessage(BaseModel):
    """One turn: text, or a list of blocks."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant"]
    content: Text | list[Block]


def chat_messages(messages: Sequence[AnthropicMessage]) -> list[ChatMessage]:
    """A chat's messages. Raises InvalidParameterError for blocks that no template shows, and results without a call."""
    found: list[ChatMessage] = []
    called: set[str] = set()
    for i, message in enumerate(messages):
        note_unknown(f"messages.{i}.", message)
        if isinstance(message.content, str):
            found.append(ChatMessage(role=message.role, content=message.content))
            called = set()
            continue
        where = f"messages.{i}.content"
        for block in message.content:
            if block.get("type") not in _TAKEN[message.role]:
                raise _wrong(
                    f"{where}: this server takes {', '.join(_TAKEN[message.role])} blocks from the {message.role} "
                    f"({TEXT_ALONE}), found a block of type {block.get('type')!r:.64}"
                )
        if message.role == "user":
            found += _user_turn(message.content, where, called)
            called = set()
        else:
            found.append(_assistant_turn(message.content, where))
            called = {call["id"] for call in found[-1].tool_calls or ()}
    if called:
        raise _wrong("tool_use blocks in the last turn: expected a user turn with their tool_result blocks after it")
    return found


def text_of(content: str | list[Block], where: str) -> str:
    """Text, or blocks of it."""
    if isinstance(content, str):
        return content
    for block in content:
        if block.get("type") != "text":
            kind = block.get("type")
            raise _wrong(
                f"{where}: expected text blocks only ({TEXT_ALONE}), found a block of type {kind!r:.64}", where
            )
    return "\n".join(_string(block, "text", where) for block in content)


def _user_turn(blocks: list[Block], where: str, called: set[str]) -> list[ChatMessage]:
    """Results of tools first, as messages of their own, then what the user says."""
    found = []
    for block in blocks:
        if block["type"] == "tool_result":
            tool_use_id = _string(block, "tool_use_id", where)
            if tool_use_id not in called:
                raise _wrong(f"{where}: no tool_use block in the turn before has the id {tool_use_id:.140}")
            content = block.get("content") or ""
            if not isinstance(content, (str, list)) or not all(isinstance(part, (str, dict)) for part in content):
                raise _wrong(f"{where}: a tool_result's content must be a string or a list of blocks")
            text = text_of(content, where)
            text = f"Error: {text}" if block.get("is_error") else text
            found.append(ChatMessage(role="tool", tool_call_id=tool_use_id, content=text))
    said = [block for block in blocks if block["type"] == "text"]
    if said or not found:
        found.append(ChatMessage(role="user", content=text_of(said, where)))
    return found


def _assistant_turn(blocks: list[Block], where: str) -> ChatMessage:
    by_type: dict[str, list[Block]] = {}
    for block in blocks:
        by_type.setdefault(block["type"], []).append(block)
    thoughts = [_string(block, "thinking", where) for block in by_type.get("thinking", ())]
    return ChatMessage(
        role="assistant",
        content=text_of(by_type.get("text", []), where),
        reasoning="\n".join(thoughts) if thoughts else None,
        tool_calls=[_call(block, where) for block in by_type.get("tool_use", ())] or None,
    )


def _call(block: Block, where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise _wrong(f"{where}: a tool_use block needs input, an object, found {arguments!r:.64}")
    function = {"name": _string(block, "name", where), "arguments": arguments}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _string(block: Block, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{where}: a {block.get('type')} block needs {name}, a string", where)
    if name in ("id", "name", "tool_use_id") and len(value) > MAX_STRING_CHARS:
        raise _wrong(f"{where}: {name} has {len(value)} characters; expected at most {MAX_STRING_CHARS}", where)
    return value


def _wrong(message: str, where: str = "messages") -> InvalidParameterError:
    return InvalidParameterError(message, where.partition(".")[0])
