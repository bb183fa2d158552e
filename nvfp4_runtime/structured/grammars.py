"""From a StructuredSpec to a grammar in llguidance's own words: JSON of its grammar list, or Lark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nvfp4_runtime.structured.ebnf import ebnf_to_lark, looks_like_ebnf
from nvfp4_runtime.structured.literals import escaped, regex_literal
from nvfp4_runtime.structured.spec import StructuredSpec
from nvfp4_runtime.structured.structural_tag import structural_tag_to_lark

# Between two tokens of JSON. Bounded: a model that has lost its way writes blanks for ever.
BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def grammar_text(spec: StructuredSpec, special: Callable[[], Mapping[str, int]]) -> str:
    """The grammar. Raises InvalidParameterError for what can be seen without compiling.

    special  the tokenizer's special tokens: text -> id
    """
    match spec.kind:
        case "json_object":
            return _json_grammar(spec, ANY_OBJECT)
        case "json":
            return _json_grammar(spec, spec.json_value())
        case "choice":
            # one regex: as alternatives of a grammar, thousands of choices would be beyond the parser's limits
            regex = "|".join(map(escaped, spec.json_value()))
            return json.dumps({"grammars": [{"lark_grammar": f"start: {regex_literal(regex)}"}]})
        case "regex":
            return json.dumps({"grammars": [{"lark_grammar": f"start: {regex_literal(spec.value)}"}]})
        case "grammar":
            lark = ebnf_to_lark(spec.value) if looks_like_ebnf(spec.value) else spec.value
            return json.dumps({"grammars": [{"lark_grammar": lark}]})
        case "structural_tag":
            lark = structural_tag_to_lark(spec, spec.json_value(), special())
            return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _json_grammar(spec: StructuredSpec, schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise spec.refused(f"must be a JSON schema: an object, found {type(schema).__name__}")
    if spec.closed_objects:
        schema = closed(schema)
    options: dict[str, Any] = {"whitespace_flexible": spec.any_whitespace}
    if not spec.any_whitespace:
        options |= {"item_separator": ",", "key_separator": ":"}
    else:
        options["whitespace_pattern"] = spec.whitespace_pattern or BLANKS
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]})


def closed(schema: Any) -> Any:
    """`schema` with additionalProperties false in every object schema that says nothing of them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type", "object") == "object":
        found.setdefault("additionalProperties", False)
    return found
