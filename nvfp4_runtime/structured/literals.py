"""Strings and regexes as Lark spells them."""

from __future__ import annotations

import json

_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~")


def quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def regex_literal(regex: str) -> str:
    """A Lark regex; line ends and slashes escaped, for they would end it."""
    escaped: list[str] = []
    after_backslash = False
    for char in regex:
        if after_backslash:
            escaped.append({"\n": "n", "\r": "r"}.get(char, char))
            after_backslash = False
        elif char == "\\":
            escaped.append(char)
            after_backslash = True
        else:
            escaped.append({"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(char, char))
    return f"/{''.join(escaped)}/"


def escaped(text: str) -> str:
    """A regex of `text` alone."""
    return "".join(f"\\{char}" if char in _SPECIAL else char for char in text)
