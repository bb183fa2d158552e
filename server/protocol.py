"""Request models in vLLM's dialect. A known field that we do not honour is a 400 that names it; unknown extras pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.sampling.params import MAX_LOGPROBS, SamplingParams

logger = logging.getLogger(__name__)

MAX_STRING_CHARS = 512
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, found a boolean")
    return value


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """str, [str], [int] or [[int]]; checked in one pass, since a prompt may hold a million ids."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds in ({str}, {int}):
            return value
        if kinds == {list} and all(set(map(type, ids)) == {int} for ids in value):
            return value
        if not value or kinds == {list}:
            raise ValueError("expected at least one prompt, and at least one integer token id in each list")
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of lists of token ids")


Int = Annotated[int, BeforeValidator(_not_bool), Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, BeforeValidator(_not_bool)]
ShortStr = Annotated[str, Field(max_length=MAX_STRING_CHARS)]
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}}},
    ]
}
Prompt = Annotated[Any, PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


# Fields of vLLM's contract that are not honoured yet, with the values that ask for nothing. null always does.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "allowed_token_ids": (),
    "logprob_token_ids": (),
    "bad_words": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "session_id": (),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "stream_interval": (1,),
}
# What older clients of vLLM and OpenAI send, by the name that took its place.
_STRUCTURED = "structured_outputs took its place (not honoured yet either)"
_REPLACED = {
    "best_of": "ask for n answers",
    "functions": "tools took its place (not honoured yet either)",
    "function_call": "tool_choice took its place (not honoured yet either)",
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
}
_NOT_HONOURED |= dict.fromkeys(_REPLACED, ()) | {"best_of": (1,)}
_NOT_HONOURED_COMPLETION: dict[str, tuple[Any, ...]] = {"suffix": ("",), "prompt_embeds": ()}
_NOT_HONOURED_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),  # says nothing without tools
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_prompt_text": (False,),
    "return_assistant_tokens_mask": (False,),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat have in common. null means the default, everywhere."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: ShortStr | None = None
    max_tokens: Int | None = None
    n: Int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: dict[ShortStr, Number] | None = None
    seed: Int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[Int] = []
    include_stop_str_in_output: bool = False
    min_tokens: Int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Int | None = None
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] = "left"
    priority: Int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    user: ShortStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives beside each sampled token; None for no logprobs."""
        raise NotImplementedError  # the two endpoints spell it differently: each request class says how

    def check(self, max_n: int) -> None:
        """Refuse what can be refused without the model. Raises InvalidParameterError naming the field."""
        self._check_extras()
        if self.stream_options is not None:
            _note_unknown("stream_options.", self.stream_options)
        if not 1 <= self.n <= max_n:
            raise InvalidParameterError(f"n must be between 1 and {max_n}, got {self.n}", "n")
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError("stream_options is only allowed when stream is true", "stream_options")
        _check_num_logprobs("prompt_logprobs", self.prompt_logprobs)
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidParameterError("prompt_logprobs cannot be had with stream: true", "prompt_logprobs")
        if self.priority != 0:
            raise InvalidParameterError(
                f"priority must be 0, got {self.priority}: this server does not schedule by priority", "priority"
            )
        stop = self.stop_strings
        if len(stop) > MAX_STOP_STRINGS or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in stop):
            raise InvalidParameterError(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters", "stop"
            )

    def sampling_params(
        self, max_tokens: int, defaults: Mapping[str, float | int], prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's part of the request; `defaults` fill what the request leaves out."""

        def value(name: str, otherwise: float | int) -> Any:
            given = getattr(self, name)
            return given if given is not None else defaults.get(name, otherwise)

        params = SamplingParams(
            temperature=value("temperature", 1.0),
            top_p=value("top_p", 1.0),
            top_k=value("top_k", 0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_token_biases(self.logit_bias or {}),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        if params.temperature == 0 and self.n > 1:
            raise InvalidParameterError(f"n must be 1 when temperature is 0 (greedy), got {self.n}", "n")
        return params

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return _NOT_HONOURED

    def _check_extras(self) -> None:
        known = self._not_honoured()
        for name, value in (self.model_extra or {}).items():
            if name in known and not any(type(value) is type(allowed) and value == allowed for allowed in known[name]):
                hint = f"; {_REPLACED[name]}" if name in _REPLACED else ""
                raise InvalidParameterError(f"{name} is not supported by this server; leave it out{hint}", name)
        _note_unknown("", self, known)


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: Int | None = None
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return _NOT_HONOURED | _NOT_HONOURED_COMPLETION


class ChatMessage(BaseModel):
    """One turn. Content is text, or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: ShortStr | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: ShortStr | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def check(self, where: str) -> None:
        """Refuse content that no template here would show to the model."""
        for name in ("function_call", "audio"):
            if (self.model_extra or {}).get(name) is not None:
                raise InvalidParameterError(f"{where}.{name} is not supported by this server; leave it out", "messages")
        _note_unknown(f"{where}.", self)


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[ShortStr, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, max_n: int) -> None:
        extra = self.model_extra or {}
        if extra.get("tools") == []:
            raise InvalidParameterError("tools must hold at least one tool; leave it out for none", "tools")
        if extra.get("tool_choice") not in (None, "none") and "tools" not in extra:
            raise InvalidParameterError("tool_choice needs tools", "tool_choice")
        super().check(max_n)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError("top_logprobs needs logprobs: true", "top_logprobs")
        _check_num_logprobs("top_logprobs", self.top_logprobs)
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
        return _NOT_HONOURED | _NOT_HONOURED_CHAT


def _note_unknown(where: str, part: BaseModel, known: Iterable[str] = ()) -> None:
    for name in set(part.model_extra or ()) - set(known):
        logger.debug("ignoring the unknown request field %s%.64r", where, name)


def _check_num_logprobs(name: str, value: int | None) -> None:
    """Here rather than by SamplingParams, which has one count where requests have several."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidParameterError(f"{name} must be an integer in [0, {MAX_LOGPROBS}], got {value}", name)


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise InvalidParameterError(f"logit_bias keys must be token ids, found {key!r}", "logit_bias")
        found[int(key)] = bias
    return found
