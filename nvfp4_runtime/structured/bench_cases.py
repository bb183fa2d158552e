"""What grammar libraries are measured on: everyday constraints, and those somebody sends to hurt."""

from __future__ import annotations

import functools
import json
from typing import Any

Case = tuple[str, str]  # kind ("json", "regex", "grammar") and its text


def _json(schema: Any) -> Case:
    return "json", json.dumps(schema)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


_ORDER = _object(
    {
        "id": {"type": "integer"},
        "customer": _object({"name": {"type": "string"}, "email": {"type": "string", "format": "email"}}),
        "items": {
            "type": "array",
            "items": _object(
                {"sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "count": {"type": "integer"}}
            ),
        },
        "state": {"enum": ["new", "paid", "sent", "returned"]},
        "note": {"type": ["string", "null"]},
    }
)
_SQL = """root ::= "SELECT " columns " FROM " name where?
columns ::= name (", " name)*
where ::= " WHERE " name " = " value
value ::= [0-9]+ | "'" [^']* "'"
name ::= [a-z_] [a-z0-9_]*
"""

EVERYDAY: dict[str, Case] = {
    "any object": _json({"type": "object"}),
    "small schema": _json(_object({"name": {"type": "string"}, "age": {"type": "integer"}})),
    "order schema": _json(_ORDER),
    "regex date": ("regex", r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    "SQL grammar": ("grammar", _SQL),
}


def _doubled(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema, _object({"a": schema})]}
    return schema


@functools.cache
def hostile() -> dict[str, Case]:
    """Made when asked for: some are a megabyte."""
    words = [f"word number {i * 7919 % 20_000}" for i in range(20_000)]
    many = {f"property_{i}": {"type": "string", "maxLength": i % 50 + 1} for i in range(14_000)}
    references = {f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(40)} | {
        "n40": {"type": "null"}
    }
    return {
        "regex (.*a.{20})+": ("regex", "(.*a.{20})+"),
        "regex nested stars": ("regex", "((a*)*b*)*c"),
        "regex (a?){60}a{60}": ("regex", "([a-z]?){60}[a-z]{60}"),
        "regex a{1,100000}": ("regex", "a{1,100000}"),
        "regex ((a{1,99}){1,99}){1,99}": ("regex", "((a{1,99}){1,99}){1,99}"),
        "regex (x+x+)+y": ("regex", "(x+x+)+y"),
        r"regex (\w+\s?){1,500}": ("regex", r"(\w+\s?){1,500}"),
        "regex of 20,000 words": ("regex", "|".join(words)),
        "grammar root root": ("grammar", 'root ::= root root | "a" | ""\n'),
        "grammar nested choices": ("grammar", 'root ::= ("a" | "a" root | root "a")* "b"\n'),
        "grammar of 20,000 rules": ("grammar", "root ::= r0\n" + _rules(20_000)),
        "grammar 60 brackets": ("grammar", "root ::= " + "(" * 60 + '"a"' + ")*" * 60 + "\n"),
        "enum of 20,000": _json({"enum": words}),
        "schema of 1 MB": _json(_object(many)),
        "schema of 12 levels, doubled": _json(_doubled(12)),
        "schema of references, 2^40": _json({"$defs": references, "$ref": "#/$defs/n0"}),
        "array of 1,000,000": _json({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
        "string of 1,000,000": _json({"type": "string", "minLength": 1_000_000}),
        "pattern in a key": _json({"patternProperties": {"^(a|aa)+$": {"pattern": "^(.*x.{12}){3}$"}}}),
        "allOf of 200 objects": _json({"allOf": [_object({f"k{i}": {"type": "string"}}) for i in range(200)]}),
        "oneOf of 500 objects": _json({"oneOf": [_object({f"k{j}": {} for j in range(i % 9)}) for i in range(500)]}),
    }


def _rules(count: int) -> str:
    return "".join(f'r{i} ::= "a{i}" [a-z]* r{i + 1}\n' for i in range(count)) + f'r{count} ::= "x"\n'
