"""Structural tags: free text in which certain tags, once begun, must go on as described. Rewritten as Lark.

Both shapes in use: `structures` and `triggers` (OpenAI's extension in vLLM), and xgrammar's `format` tree. A special
token's text stands for the token: the model's, spelled out in characters, is free text like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nvfp4_runtime.structured.ebnf import ebnf_to_lark, looks_like_ebnf
from nvfp4_runtime.structured.literals import escaped, quoted, regex_literal
from nvfp4_runtime.structured.spec import StructuredSpec

_TEXT = "/(?s:.*)/"


def structural_tag_to_lark(spec: StructuredSpec, value: Any, special: Mapping[str, int]) -> str:
    """The grammar. Raises InvalidParameterError for a shape that is not understood.

    special  the tokenizer's special tokens: text -> id
    """
    if not isinstance(value, dict):
        raise spec.refused(f"must be an object, found {type(value).__name__}")
    if "format" in value:
        return _Writer(spec, special).grammar(value["format"])
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise spec.refused("needs format, or structures and triggers")
    tags = []
    for i, one in enumerate(structures):
        if not isinstance(one, dict) or not isinstance(one.get("begin"), str) or not isinstance(one.get("end"), str):
            raise spec.refused(f"structures.{i} needs the strings begin and end")
        content = {"type": "json_schema", "json_schema": one.get("schema", {})}
        tags.append({"begin": one["begin"], "content": content, "end": one["end"]})
    return _Writer(spec, special).grammar({"type": "triggered_tags", "triggers": triggers, "tags": tags})


class _Writer:
    """Writes one grammar, rule by rule."""

    def __init__(self, spec: StructuredSpec, special: Mapping[str, int]) -> None:
        self._spec = spec
        self._special = special
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._rules: list[str] = []

    def grammar(self, root: Any) -> str:
        start = self._write(root)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """An expression of exactly this text; "" for none."""
        parts, start = [], 0
        for found in self._pattern.finditer(text):
            parts += [quoted(text[start : found.start()])] * (found.start() > start)
            parts.append(f"<[{self._special[found.group()]}]>")
            start = found.end()
        return " ".join([*parts, quoted(text[start:])] if start < len(text) else parts)

    def _up_to(self, text: str) -> str:
        """A rule of free text up to the first `text`."""
        found = self._pattern.search(text)
        if found is None:
            return self._rule(f"{_TEXT} {quoted(text)}", "[lazy]")
        # a special token is no free text, so there is nothing to be lazy about
        return self._rule(
            f"/(?s:.*){regex_literal(escaped(text[: found.start()]))[1:]} {self._literal(text[found.start() :])}"
        )

    def _write(self, node: Any) -> str:
        """The expression of a format: a name or a literal."""
        if not isinstance(node, dict):
            raise self._spec.refused("every format must be an object with a type")
        match node.get("type"):
            case "const_string":
                return self._literal(self._text(node, "value")) or '""'
            case "json_schema":
                schema = node.get("json_schema")
                if schema is True:
                    schema = {}
                if not isinstance(schema, dict):
                    raise self._spec.refused("a json_schema format needs json_schema, an object")
                return self._rule(f"%json {json.dumps(schema)}")
            case "regex":
                return self._rule(regex_literal(self._text(node, "pattern")))
            case "grammar":
                text = self._text(node, "grammar")
                return self._rule(f"%lark {{\n{ebnf_to_lark(text) if looks_like_ebnf(text) else text}\n}}")
            case "any_text":
                return self._rule(_TEXT)
            case "sequence":
                return self._rule(" ".join(self._write(item) for item in self._items(node, "elements")))
            case "or":
                return self._rule(" | ".join(self._write(item) for item in self._items(node, "elements")))
            case "tag":
                return self._tag(node)
            case "triggered_tags":
                return self._triggered(node)
            case "tags_with_separator":
                return self._separated(node)
            case other:
                raise self._spec.refused(f"has a format of type {other!r:.64}, which is not supported")

    def _tag(self, node: Any, begun: int = 0) -> str:
        """begin content end, the first `begun` characters of begin being there already."""
        if not isinstance(node, dict):
            raise self._spec.refused("every tag must be an object with begin, content and end")
        begin, end = self._text(node, "begin")[begun:], self._text(node, "end")
        content = node.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            body = self._up_to(end)
        else:
            body = f"{self._write(content)} {self._literal(end)}"
        return self._rule(f"{self._literal(begin)} {body}")

    def _triggered(self, node: dict[str, Any]) -> str:
        """Free text; after a trigger, one of the tags that begin with it."""
        tags = self._items(node, "tags")
        choices = []
        for trigger in self._items(node, "triggers"):
            if not isinstance(trigger, str) or not trigger:
                raise self._spec.refused("triggers must be strings, none of them empty")
            matching = [tag for tag in tags if isinstance(tag, dict) and str(tag.get("begin")).startswith(trigger)]
            if not matching:
                raise self._spec.refused(f"has the trigger {trigger!r:.64}, with which no tag begins")
            self._check_cut(trigger, matching)
            until = self._up_to(trigger)
            rest = self._rule(" | ".join(self._tag(tag, len(trigger)) for tag in matching))
            choices.append(self._rule(f"{until} {rest}"))
        one = self._rule(" | ".join(choices))
        if node.get("stop_after_first"):
            return one if node.get("at_least_one") else self._rule(f"{one} | {self._rule(_TEXT)}")
        return self._rule(f"{one}{'+' if node.get('at_least_one') else '*'} {self._rule(_TEXT)}")

    def _check_cut(self, trigger: str, tags: list[dict[str, Any]]) -> None:
        """A part of a special token triggers nothing: the token comes whole."""
        for tag in tags:
            for found in self._pattern.finditer(tag["begin"]):
                if found.start() < len(trigger) < found.end():
                    raise self._spec.refused(
                        f"has the trigger {trigger!r:.64}, which ends inside {found.group()!r:.64}"
                    )

    def _separated(self, node: dict[str, Any]) -> str:
        one = self._rule(" | ".join(self._tag(tag) for tag in self._items(node, "tags")))
        separator = self._text(node, "separator")
        more = "" if node.get("stop_after_first") else f" ({self._literal(separator)} {one})*"
        return self._rule(f"{one}{more}" if node.get("at_least_one") else f"({one}{more})?")

    def _items(self, node: dict[str, Any], name: str) -> list[Any]:
        items = node.get(name)
        if not isinstance(items, list) or not items:
            raise self._spec.refused(f"a {node.get('type')} format needs {name}, a list that is not empty")
        return items

    def _text(self, node: dict[str, Any], name: str) -> str:
        text = node.get(name)
        if not isinstance(text, str):
            raise self._spec.refused(f"a {node.get('type', 'tag')} format needs {name}, a string")
        return text
