"""The body of POST /v1/responses, and what it asks of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.fields import Count, Int, Number, RequestBody, ShortStr, StopStr, Text, note_unknown
from server.protocol.response_items import messages_of
from server.reasoning.request import EFFORTS
from server.structured import JsonObject
from server.tools.request import MAX_TOOLS, Tool

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
# Known fields that are not honoured, with the values that ask for nothing. null always does.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "max_tool_calls": (),  # counts calls of OpenAI's own tools
    "truncation": ("disabled",),
    "prompt": (),
    "conversation": (),
    "context_management": (),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
}
# Sampling fields of vLLM that go to the chat as they are.
_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "cache_salt",
    "priority",
    "user",
    "structured_outputs",
    "chat_template_kwargs",
    "thinking_token_budget",
    "include_reasoning",
)


class ResponsesTool(BaseModel):
    """A function the model may call. `parameters` is a JSON schema of an object; none: it takes nothing."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    name: ShortStr
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_chat(self) -> Tool:
        given = {name: value for name in _FUNCTION if (value := getattr(self, name)) is not None}
        return Tool.model_validate({"type": "function", "function": given})

    def written(self) -> dict[str, Any]:
        """As a response repeats it."""
        return {"type": "function", **{name: getattr(self, name) for name in _FUNCTION}}


class ResponsesToolChoice(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    name: ShortStr


_FUNCTION = ("name", "description", "parameters", "strict")


class ResponsesRequest(RequestBody):
    """OpenAI's fields, and vLLM's sampling fields. null means the default, everywhere."""

    model: ShortStr | None = None
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: Text | None = None
    previous_response_id: ShortStr | None = None
    store: bool = True
    stream: bool = False
    background: bool = False
    max_output_tokens: Int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: Int | None = None
    include: list[ShortStr] = Field([])
    metadata: dict[ShortStr, ShortStr] = Field({})
    user: ShortStr | None = None
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Int | None = None
    stop: StopStr | list[StopStr] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[ShortStr, Number] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    priority: Int | None = None
    timeout: Number | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    text: dict[str, Any] = Field({})
    reasoning: dict[str, Any] = Field({})
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice = "auto"
    parallel_tool_calls: bool = True
    structured_outputs: JsonObject | None = None
    chat_template_kwargs: dict[ShortStr, Any] | None = None
    thinking_token_budget: Count | None = None
    include_reasoning: bool | None = None

    @property
    def effort(self) -> str | None:
        """`reasoning.effort`. Raises InvalidParameterError where it is none."""
        effort = self.reasoning.get("effort")
        if effort is not None and effort not in EFFORTS:
            raise InvalidParameterError(
                f"reasoning.effort must be one of {', '.join(EFFORTS)}, found {effort!r:.64}", "reasoning"
            )
        return effort

    @property
    def tool_choice_written(self) -> str | dict[str, Any]:
        """As a response repeats it."""
        choice = self.tool_choice
        return choice if isinstance(choice, str) else {"type": "function", "name": choice.name}

    @property
    def text_format(self) -> dict[str, Any]:
        """`text.format`: what form the answer has. A JSON schema's name and schema stand in it, not below it."""
        given = self.text.get("format")
        if given is None:
            return {"type": "text"}
        if not isinstance(given, dict):
            raise InvalidParameterError(f"text.format must be an object, found {given!r:.64}", "text")
        return given

    def check(self) -> None:
        """Refuse what is not honoured and what does not go together. Raises InvalidParameterError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_HONOURED and value not in _NOT_HONOURED[name]:
                raise InvalidParameterError(f"{name}: {value!r:.100} is not supported by this server", name)
        note_unknown("", self, _NOT_HONOURED)
        for name, value in self.reasoning.items():
            if name != "effort" and value is not None:
                raise InvalidParameterError(f"reasoning.{name:.64} is not supported by this server", "reasoning")
        if self.text.get("verbosity") is not None:
            raise InvalidParameterError("text.verbosity is not supported by this server; leave it out", "text")
        if unknown := [name for name in self.include if name != LOGPROBS]:
            raise InvalidParameterError(f"include: {unknown[0]!r:.64} is not supported; {LOGPROBS} is", "include")
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise InvalidParameterError(f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")
        if self.background and not self.store:
            raise InvalidParameterError("background needs store: true, or nobody could get the response", "background")
        if self.background and self.stream:
            raise InvalidParameterError("background and stream cannot be had together", "background")
        if len(self.metadata) > MAX_METADATA:
            raise InvalidParameterError(
                f"metadata takes at most {MAX_METADATA} pairs, got {len(self.metadata)}", "metadata"
            )

    def new_messages(self) -> list[dict[str, Any]]:
        """The turns in `input`."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)

    def as_chat(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        """The chat that answers `messages`."""
        turns = [ChatMessage(**message) for message in messages]
        if self.instructions is not None:
            turns.insert(0, ChatMessage(role="system", content=self.instructions))
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        if LOGPROBS in self.include:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        form = self.text_format
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        given["response_format"] = form
        if self.effort is not None:
            given["reasoning_effort"] = self.effort
        if self.tools:
            given |= {"tools": [tool.as_chat() for tool in self.tools], "parallel_tool_calls": self.parallel_tool_calls}
        if isinstance(self.tool_choice, ResponsesToolChoice):
            given["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tools or self.tool_choice == "required":  # auto and none say nothing without tools
            given["tool_choice"] = self.tool_choice
        return ChatCompletionRequest(
            model=self.model, messages=turns, stream=self.stream, max_completion_tokens=self.max_output_tokens, **given
        )
