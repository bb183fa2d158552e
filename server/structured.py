"""response_format and structured_outputs: from vLLM's fields to one StructuredSpec."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.spec import Kind, StructuredSpec

_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
MAX_PATTERN_CHARS = 256

JsonObject = Annotated[dict[str, Any], Field(json_schema_extra={"additionalProperties": True})]


class StructuredFields(BaseModel):
    """What a request says of its answer's form."""

    response_format: JsonObject | None = None
    structured_outputs: JsonObject | None = None

    def structured_spec(self) -> StructuredSpec | None:
        """The constraint asked for, if any. Raises InvalidParameterError naming the field that is wrong."""
        named = None if self.structured_outputs is None else _of_structured_outputs(self.structured_outputs)
        formatted = None if self.response_format is None else _of_response_format(self.response_format)
        if named is not None and formatted is not None:
            raise InvalidParameterError(
                "structured_outputs and response_format both say what the answer looks like; give one of them",
                "structured_outputs",
            )
        spec = named or formatted
        if spec is not None:
            spec.validate()
        return spec


def json_text(value: Any, param: str) -> str:
    """`value` as JSON text. Raises InvalidParameterError when it is nested too deep to write, or no text at all."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (RecursionError, UnicodeEncodeError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else "holds a lone surrogate"
        raise InvalidParameterError(f"{param} {reason}", param.partition(".")[0]) from error
    return text


def _of_response_format(fields: dict[str, Any]) -> StructuredSpec | None:
    match fields.get("type"):
        case "text":
            return None
        case "json_object":
            return StructuredSpec(kind="json_object", param="response_format")
        case "json_schema":
            given = fields.get("json_schema")
            if not isinstance(given, dict):
                raise _wrong("response_format.json_schema", "an object with name and schema", given)
            if not isinstance(given.get("name"), str):
                raise _wrong("response_format.json_schema.name", "a string", given.get("name"))
            schema = given.get("schema")
            if schema is None:  # as in OpenAI's: a schema may be left out, and any object will do
                return StructuredSpec(kind="json_object", param="response_format")
            param = "response_format.json_schema.schema"
            if not isinstance(schema, dict):
                raise _wrong(param, "an object", schema)
            return StructuredSpec(kind="json", value=json_text(schema, param), param=param)
        case "structural_tag":
            return StructuredSpec(
                kind="structural_tag", value=json_text(fields, "response_format"), param="response_format"
            )
        case other:
            raise _wrong("response_format.type", "text, json_object, json_schema or structural_tag", other)


def _of_structured_outputs(fields: dict[str, Any]) -> StructuredSpec:
    given = [kind for kind in _KINDS if fields.get(kind) not in (None, False)]
    for name in fields:
        if name not in _KINDS and name not in _OPTIONS and not name.startswith("_"):
            raise InvalidParameterError(
                f"structured_outputs.{name:.64} is not known; expected one of {', '.join((*_KINDS, *_OPTIONS))}",
                "structured_outputs",
            )
    if len(given) != 1:
        found = ", ".join(given) or "none of them"
        raise InvalidParameterError(
            f"structured_outputs takes exactly one of {', '.join(_KINDS)}; found {found}", "structured_outputs"
        )
    kind = given[0]
    pattern = fields.get("whitespace_pattern")
    if pattern is not None and (not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARS):
        raise _wrong(
            "structured_outputs.whitespace_pattern", f"a regex of at most {MAX_PATTERN_CHARS} characters", pattern
        )
    return StructuredSpec(
        kind=kind,
        value=_value(kind, fields[kind]),
        param=f"structured_outputs.{kind}",
        any_whitespace=not _flag(fields, "disable_any_whitespace"),
        whitespace_pattern=pattern,
        closed_objects=_flag(fields, "disable_additional_properties"),
    )


def _value(kind: Kind, value: Any) -> str:
    """The constraint as text, whatever shape its field allows."""
    param = f"structured_outputs.{kind}"
    match kind, value:
        case "json_object", True:
            return ""
        case (("json" | "structural_tag"), str()):
            return str(value)
        case (("json" | "structural_tag"), dict()):
            return json_text(value, param)
        case (("regex" | "grammar"), str()) if value:
            json_text(value, param)
            return str(value)
        case "choice", list():
            return json_text(value, param)
    expected = {
        "json_object": "true",
        "json": "a JSON schema: an object, or its text",
        "structural_tag": "an object, or its text",
        "choice": "a list of strings",
    }.get(kind, "a string that is not empty")
    raise _wrong(param, expected, value)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(f"structured_outputs.{name}", "true or false", value)
    return bool(value)


def _wrong(param: str, expected: str, found: Any) -> InvalidParameterError:
    return InvalidParameterError(f"{param} must be {expected}, got {found!r:.100}", param.partition(".")[0])
