"""The bodies of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes, and what they ask of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.fields import Int, Number, RequestBody, ShortStr, StopStr, Text, note_unknown

# Known fields that are not honoured, with the values that ask for nothing. null always does.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),  # says nothing without tools
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_format": (),
    "output_config": ({},),
    "speed": ("standard",),
}


class AnthropicMessage(BaseModel):
    """One turn: text, or a list of blocks."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant"]
    content: Text | list[dict[str, Any]]


class Metadata(BaseModel):
    model_config = ConfigDict(extra="allow")

    user_id: ShortStr | None = None


class CountTokensRequest(RequestBody):
    """A conversation. `model` is Anthropic's, so it must be given."""

    model: ShortStr
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: Text | list[dict[str, Any]] | None = None

    def check(self) -> None:
        """Refuse known fields that are not honoured. Raises InvalidParameterError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_HONOURED and value not in _NOT_HONOURED[name]:
                raise InvalidParameterError(f"{name} is not supported by this server; leave it out", name)
        note_unknown("", self, _NOT_HONOURED)

    def as_chat(self) -> ChatCompletionRequest:
        """The same conversation as a chat completion; a last turn of the assistant's is continued."""
        return ChatCompletionRequest(**self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        messages = [_chat_message(message, i) for i, message in enumerate(self.messages)]
        continues = self.messages[-1].role == "assistant"
        if self.system is not None:
            messages.insert(0, ChatMessage(role="system", content=_text(self.system, "system")))
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": continues,
            "add_generation_prompt": not continues,
        }


class MessagesRequest(CountTokensRequest):
    max_tokens: Int
    stop_sequences: list[StopStr] = Field([])
    stream: bool = False
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    metadata: Metadata | None = None
    timeout: Number | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None

    def check(self) -> None:
        super().check()
        if self.temperature is not None and not 0 <= self.temperature <= 1:
            raise InvalidParameterError(
                f"temperature must be a number in [0, 1], got {self.temperature}", "temperature"
            )

    def _chat_fields(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return (
            super()._chat_fields()
            | {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences, "stream": self.stream}
            | {name: value for name, value in given.items() if value is not None}
        )


def _chat_message(message: AnthropicMessage, position: int) -> ChatMessage:
    note_unknown(f"messages.{position}.", message)
    if isinstance(message.content, str):
        return ChatMessage(role=message.role, content=message.content)
    where = f"messages.{position}.content"
    thought = [block for block in message.content if block.get("type") == "thinking"]
    said = [block for block in message.content if block.get("type") != "thinking"]
    reasoning = "\n".join(_string(block, "thinking", where) for block in thought) if thought else None
    return ChatMessage(role=message.role, content=_text(said, where), reasoning=reasoning)


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.get("type") != "text":
            raise InvalidParameterError(
                f"{where}: this server takes text blocks only, found a block of type {block.get('type')!r:.64}",
                where.partition(".")[0],
            )
    return "\n".join(_string(block, "text", where) for block in content)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidParameterError(f"{where}: a {name} block needs a string", where.partition(".")[0])
    return value
