"""The bodies of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes, and what they ask of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.fields import Int, Number, RequestBody, ShortStr, StopStr, Text, note_unknown
from server.protocol.message_blocks import AnthropicMessage, chat_messages, text_of
from server.reasoning.request import Effort
from server.tools.request import MAX_TOOLS, Tool

MIN_THINKING_BUDGET = 1024  # Anthropic's

# Known fields that are not honoured, with the values that ask for nothing. null always does.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "speed": ("standard",),
}


class AnthropicTool(BaseModel):
    """A function the model may call. `input_schema` is a JSON schema of an object."""

    model_config = ConfigDict(extra="allow")
    type: Literal["custom"] = "custom"
    name: ShortStr
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def as_chat(self) -> Tool:
        given = {
            name: value for name in ("name", "description", "strict") if (value := getattr(self, name)) is not None
        }
        return Tool.model_validate({"type": "function", "function": given | {"parameters": self.input_schema}})


class AnthropicToolChoice(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["auto", "any", "tool", "none"]
    name: ShortStr | None = None
    disable_parallel_tool_use: bool = False

    def as_chat(self) -> str | dict[str, Any]:
        if self.type == "tool":
            if self.name is None:
                raise InvalidParameterError("tool_choice of type tool needs name", "tool_choice")
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(BaseModel):
    """Whether the model may reason, and for how many tokens at most. It is shown whole, never left out."""

    model_config = ConfigDict(extra="allow")
    type: Literal["enabled", "disabled"]
    budget_tokens: Int | None = None
    display: Literal["summarized"] | None = None


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="allow")
    effort: Effort | None = None
    format: dict[str, Any] | None = None


class Metadata(BaseModel):
    model_config = ConfigDict(extra="allow")

    user_id: ShortStr | None = None


class CountTokensRequest(RequestBody):
    """A conversation. `model` is Anthropic's, so it must be given."""

    model: ShortStr
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: Text | list[dict[str, Any]] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse known fields that are not honoured. Raises InvalidParameterError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_HONOURED and value not in _NOT_HONOURED[name]:
                raise InvalidParameterError(f"{name} is not supported by this server; leave it out", name)
        note_unknown("", self, _NOT_HONOURED)

    def as_chat(self) -> ChatCompletionRequest:
        """The same conversation as a chat completion; a last turn of the assistant's is continued."""
        chat = ChatCompletionRequest(**self._chat_fields())
        if self.thinking is not None and self.thinking.type == "enabled":
            chat.ask_for_reasoning()
        return chat

    def _chat_fields(self) -> dict[str, Any]:
        messages = chat_messages(self.messages)
        continues = self.messages[-1].role == "assistant"
        if self.system is not None:
            messages.insert(0, ChatMessage(role="system", content=text_of(self.system, "system")))
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": continues,
            "add_generation_prompt": not continues,
            **self._tool_fields(),
            **self._thinking_fields(),
            **self._format_fields(),
        }

    def _tool_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        found: dict[str, Any] = {"tools": [tool.as_chat() for tool in self.tools]} if self.tools else {}
        if choice is not None and (self.tools or choice.type not in ("auto", "none")):
            found |= {
                "tool_choice": choice.as_chat(),
                "parallel_tool_calls": not choice.disable_parallel_tool_use,
            }
        return found

    def _thinking_fields(self) -> dict[str, Any]:
        thinking, effort = self.thinking, self.output_config.effort if self.output_config is not None else None
        if thinking is not None and thinking.type == "disabled":
            return {"reasoning_effort": "none"}
        found: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if thinking is not None:
            if thinking.budget_tokens is None or thinking.budget_tokens < MIN_THINKING_BUDGET:
                raise InvalidParameterError(
                    f"thinking.budget_tokens must be an integer >= {MIN_THINKING_BUDGET}, got {thinking.budget_tokens}",
                    "thinking",
                )
            found["thinking_token_budget"] = thinking.budget_tokens
        return found

    def _format_fields(self) -> dict[str, Any]:
        inner = self.output_config.format if self.output_config is not None else None
        if inner is not None and self.output_format is not None:
            raise InvalidParameterError("output_config.format and output_format: give one of them", "output_format")
        form = inner or self.output_format
        if form is None:
            return {}
        param = "output_format" if inner is None else "output_config"
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise InvalidParameterError(f"{param}: expected type json_schema and schema, an object", param)
        schema = {"name": "output", "schema": form["schema"]}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


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
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise InvalidParameterError(
                f"thinking.budget_tokens must be less than max_tokens ({self.max_tokens}), got {budget}", "thinking"
            )

    def _chat_fields(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return (
            super()._chat_fields()
            | {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences, "stream": self.stream}
            | {name: value for name, value in given.items() if value is not None}
        )
