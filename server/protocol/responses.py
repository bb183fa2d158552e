"""The body of POST /v1/responses, and what it asks of a chat."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from nvfp4_runtime.errors import InvalidParameterError
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.fields import Int, Number, RequestBody, ShortStr, StopStr, Text, note_unknown

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
# Known fields that are not honoured, with the values that ask for nothing. null always does.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # says nothing without tools
    "parallel_tool_calls": (True, False),
    "max_tool_calls": (),
    "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
    "prompt": (),
    "conversation": (),
    "context_management": (),
    "service_tier": ("auto", "default"),
    "stream_options": ({},),
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
)
_ITEM_ROLES = ("system", "developer", "user", "assistant")


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
        messages: list[dict[str, Any]] = []
        reasoning: list[str] = []
        for i, item in enumerate(self.input):
            if item.get("type") == "reasoning":
                reasoning.append(_reasoning_text(item, i))
                continue
            message = _message(item, i)
            if reasoning and message["role"] == "assistant":
                message["reasoning"] = "\n".join(reasoning)
                reasoning = []
            messages.append(message)
        if not messages:
            raise InvalidParameterError("input holds no message; expected at least one", "input")
        return messages

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
        return ChatCompletionRequest(
            model=self.model, messages=turns, stream=self.stream, max_completion_tokens=self.max_output_tokens, **given
        )


def _message(item: dict[str, Any], position: int) -> dict[str, Any]:
    kind, role, content = item.get("type", "message"), item.get("role"), item.get("content")
    if kind != "message":
        raise InvalidParameterError(
            f"input.{position}: this server takes items of type message and reasoning, found {kind!r:.64}", "input"
        )
    if role not in _ITEM_ROLES:
        raise InvalidParameterError(f"input.{position}.role must be one of {_ITEM_ROLES}, found {role!r:.64}", "input")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidParameterError(f"input.{position}.content must be a string or a list of parts", "input")
    return {"role": role, "content": content}


def _reasoning_text(item: dict[str, Any], position: int) -> str:
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidParameterError(f"input.{position}: a reasoning item needs parts with a text", "input")
    return "\n".join(str(text) for text in texts)
