"""What a request asks of its output's form. Imports nothing of the library; crosses the wire inside SamplingParams."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from nvfp4_runtime.errors import InvalidParameterError

Kind = Literal["json_object", "json", "regex", "choice", "grammar", "structural_tag"]
MAX_SPEC_BYTES = 1 << 20
MAX_DEPTH = 64  # of brackets: parsers of grammars recurse
MAX_CHOICES = 10_000
MAX_BRACKETS = 1 << 17  # looked at one by one, some 5 ms for so many
_IS_OPEN = bytes.maketrans(b"([{)]}", b"\1\1\1\0\0\0")
_NO_BRACKETS = bytes(set(range(256)) - set(b"([{)]}"))


class ReasoningSpan(msgspec.Struct, frozen=True, array_like=True):
    """Reasoning comes first, and no grammar applies to it.

    start    the tag that may open it, "" for none; where the tag is a token, it is allowed beside the grammar at first
    end      the text that ends it; the grammar begins with the next token
    is_open  the output begins inside it
    """

    start: str
    end: str
    is_open: bool


class StructuredSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One constraint on the text of an answer.

    value               a JSON schema, a list of choices or a structural tag as JSON text; a regex; a grammar (Lark, or
                        EBNF as llama.cpp and xgrammar write it); "" for json_object
    param               the request's field, for errors
    any_whitespace      JSON may hold blanks between its tokens; False: none at all
    whitespace_pattern  a regex for those blanks
    closed_objects      objects take no properties but those their schema names
    """

    kind: Kind
    value: str = ""
    param: str = "structured_outputs"
    any_whitespace: bool = True
    whitespace_pattern: str | None = None
    closed_objects: bool = False
    reasoning: ReasoningSpan | None = None

    def validate(self) -> None:
        """Refuse what no compiler should see: too long, or nested too deep. Raises InvalidParameterError."""
        size = len(self.value.encode("utf-8", "surrogatepass"))
        if size > MAX_SPEC_BYTES:
            raise self.refused(f"has {size} bytes; expected at most {MAX_SPEC_BYTES}")
        if (depth := nesting(self.value)) > MAX_BRACKETS:
            raise self.refused(f"has {depth} brackets; expected at most {MAX_BRACKETS}")
        if depth > MAX_DEPTH:
            raise self.refused(f"is nested {depth} brackets deep; expected at most {MAX_DEPTH}")
        if self.kind == "choice":
            choices = self.json_value()
            ok = isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)
            if not ok or len(choices) > MAX_CHOICES:
                raise self.refused(f"must be a list of 1 to {MAX_CHOICES} strings, none of them empty")

    def json_value(self) -> Any:
        """`value`, decoded. Raises InvalidParameterError when it is not JSON."""
        try:
            return json.loads(self.value)
        except (ValueError, RecursionError) as error:
            raise self.refused(f"is not valid JSON: {error}") from error

    def refused(self, why: str) -> InvalidParameterError:
        return InvalidParameterError(f"{self.param} {why}", self.field)

    @property
    def field(self) -> str:
        """The request's field that holds this constraint."""
        return self.param.partition(".")[0]

    @property
    def grammar_key(self) -> bytes:
        """Specs with the same key compile to the same grammar."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self, reasoning=None, param=""))


def nesting(text: str) -> int:
    """The most brackets open at once, of any kind; brackets in strings count, which errs on the safe side.

    Of a text with more than MAX_BRACKETS brackets their number: the event loop waits while they are looked at.
    """
    brackets = text.encode("utf-8", "surrogatepass").translate(_IS_OPEN, _NO_BRACKETS)
    if len(brackets) > MAX_BRACKETS:
        return len(brackets)
    depth = deepest = 0
    for is_open in brackets:
        if is_open:
            depth += 1
            if depth > deepest:
                deepest = depth
        elif depth:
            depth -= 1
    return deepest
