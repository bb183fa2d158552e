"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.fields import Int, ShortStr, TemplateStr, Text, check_num_logprobs, note_unknown
from server.protocol.generation import GenerationRequest
from server.protocol.not_honoured import NOT_HONOURED, NOT_HONOURED_CHAT
from server.reasoning.request import ReasoningFields
from server.tools.request import ToolFields


class ChatMessage(BaseModel):
    """One turn. Content is text, or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[dict[str, Any]] | None = None
    name: ShortStr | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: ShortStr | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    def check(self, where: str) -> None:
        """Refuse content that no template here would show to the model."""
        for name in ("function_call", "audio"):
            if (self.model_extra or {}).get(name) is not None:
                raise InvalidParameterError(f"{where}.{name} is not supported by this server; leave it out", "messages")
        note_unknown(f"{where}.", self)


class ChatCompletionRequest(GenerationRequest, ToolFields, ReasoningFields):
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: TemplateStr | None = None
    chat_template_kwargs: dict[ShortStr, Any] | None = None
    return_prompt_text: bool = False

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, max_n: int) -> None:
        super().check(max_n)
        self.check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError("top_logprobs needs logprobs: true", "top_logprobs")
        check_num_logprobs("top_logprobs", self.top_logprobs)
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise InvalidParameterError(
                f"max_completion_tokens must be an integer >= 1, got {self.max_completion_tokens}",
                "max_completion_tokens",
            )
        for i, message in enumerate(self.messages):
            message.check(f"messages.{i}")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameterError(
                "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
            )

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return NOT_HONOURED | NOT_HONOURED_CHAT
