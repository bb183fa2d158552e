"""Types of request fields that several endpoints share."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.sampling.params import MAX_LOGPROBS
from nvfp4_runtime.text.chat_template import MAX_TEMPLATE_CHARS

logger = logging.getLogger(__name__)

MAX_STRING_CHARS = 512
TEXT_ALONE = "of a model that also sees images, its text part alone is served"
MAX_STOP_CHARS = 1024
MAX_TEXT_CHARS = 8 << 20  # of one text; what a body may hold is bounded besides


class RequestBody(BaseModel):
    """A body of JSON. null means the default, everywhere; unknown fields are kept for whoever looks at them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, found a boolean")
    return value


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"expected at most {MAX_TEXT_CHARS} characters, found {len(text)}")
    return text


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """str, [str], [int] or [[int]]; checked in one pass, since a prompt may hold a million ids."""
    if isinstance(value, str):
        return _bounded(value)
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds == {str}:
            return [_bounded(text) for text in value]
        if kinds == {int}:
            return value
        if kinds == {list} and all(set(map(type, ids)) == {int} for ids in value):
            return value
        if not value or kinds == {list}:
            raise ValueError("expected at least one prompt, and at least one integer token id in each list")
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of lists of token ids")


Int = Annotated[int, BeforeValidator(_not_bool), Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[Int, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_not_bool)]
ShortStr = Annotated[str, Field(max_length=MAX_STRING_CHARS)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
StopStr = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
TemplateStr = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)]
_TEXT_SCHEMA = {"type": "string", "maxLength": MAX_TEXT_CHARS}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "minItems": 1, "items": _TEXT_SCHEMA},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}}},
    ]
}
Prompt = Annotated[Any, PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


def note_unknown(where: str, part: BaseModel, known: Iterable[str] = ()) -> None:
    for name in set(part.model_extra or ()) - set(known):
        logger.debug("ignoring the unknown request field %s%.64r", where, name)


def check_num_logprobs(name: str, value: int | None) -> None:
    """Here rather than by SamplingParams, which has one count where requests have several."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidParameterError(f"{name} must be an integer in [0, {MAX_LOGPROBS}], got {value}", name)


def token_biases(biases: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise InvalidParameterError(f"logit_bias keys must be token ids, found {key!r}", "logit_bias")
        found[int(key)] = bias
    return found
