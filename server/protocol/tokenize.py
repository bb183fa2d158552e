"""The bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.fields import Int, RequestBody, ShortStr, TemplateStr, Text, note_unknown
from server.tools.request import MAX_TOOLS, Tool

_CHAT_FIELDS = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "tools",
)


class TokenizeRequest(RequestBody):
    """A prompt, or a chat in the fields of chat completions; null means the default, everywhere.

    add_special_tokens  true for a prompt, false for a chat, where it is left out
    """

    model: ShortStr | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: TemplateStr | None = None
    chat_template_kwargs: dict[ShortStr, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    def check(self) -> None:
        note_unknown("", self)
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameterError("expected either prompt or messages", "prompt")

    def as_chat(self) -> ChatCompletionRequest:
        given = {name: value for name in _CHAT_FIELDS if (value := getattr(self, name)) is not None}
        return ChatCompletionRequest(
            messages=self.messages or [], add_special_tokens=bool(self.add_special_tokens), **given
        )


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: ShortStr | None = None
    tokens: list[Int]
