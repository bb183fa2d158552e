"""EBNF as llama.cpp (GBNF) and xgrammar write it, rewritten as Lark: rules, strings, classes, groups, repetition."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nvfp4_runtime.errors import InvalidParameterError

_DEFINES = re.compile(r"^\s*[A-Za-z_][A-Za-z0-9_-]*\s*::=", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_REPEAT = re.compile(r"\{\s*(\d{1,6})\s*(,?)\s*(\d{0,6})\s*\}")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_CLASS = re.compile(r"\[(?:[^\]\\\n]|\\.)+\]")
_BLANK = re.compile(r"(?:\s|#[^\n]*|//[^\n]*)+")
_HEX = {"x": 2, "u": 4, "U": 8}


def looks_like_ebnf(text: str) -> bool:
    return _DEFINES.search(text) is not None


def ebnf_to_lark(text: str) -> str:
    """The same language in Lark; the rule `root` is where it starts.

    Raises InvalidParameterError with the line that cannot be read.
    """
    tokens = list(_tokens(text))
    rules: list[tuple[str, list[str]]] = []
    for i, (kind, token) in enumerate(tokens):
        if kind == "defines":
            if i == 0 or tokens[i - 1][0] != "name":
                raise InvalidParameterError("grammar: '::=' must follow the name of a rule", "structured_outputs")
            rules.append((tokens[i - 1][1], []))
        elif kind == "name" and i + 1 < len(tokens) and tokens[i + 1][0] == "defines":
            continue
        elif not rules:
            raise InvalidParameterError(f"grammar: found {token!r:.40} before any rule", "structured_outputs")
        else:
            rules[-1][1].append(_rule_name(token) if kind == "name" else token)
    defined = [name for name, _ in rules]
    if "root" not in defined:
        raise InvalidParameterError("grammar: there is no rule named root, where it would start", "structured_outputs")
    if len(set(defined)) < len(defined):
        twice = next(name for name in defined if defined.count(name) > 1)
        raise InvalidParameterError(f"grammar: the rule {twice!r:.64} is defined twice", "structured_outputs")
    return "\n".join(f"{_rule_name(name)}: {' '.join(body) or chr(34) * 2}" for name, body in rules) + "\n"


def _rule_name(name: str) -> str:
    """Lark's rules are lower case without dashes; what differs only in these must stay apart."""
    if name == "root":
        return "start"
    spelled = "".join(
        c if c.islower() or c.isdigit() else {"-": "_d", "_": "_u"}.get(c, f"_c{c.lower()}") for c in name
    )
    return f"r_{spelled}"


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, Lark's spelling): kind is "name", "defines" or "other"; names are as they were."""
    at = 0
    while at < len(text):
        if match := _BLANK.match(text, at):
            at = match.end()
            continue
        if text.startswith("::=", at):
            yield "defines", "::="
            at += 3
        elif match := _NAME.match(text, at):
            yield "name", match.group()
            at = match.end()
        elif match := _STRING.match(text, at):
            yield "other", _string(match.group())
            at = match.end()
        elif match := _CLASS.match(text, at):
            yield "other", _class(match.group())
            at = match.end()
        elif match := _REPEAT.match(text, at):
            low, comma, high = match.groups()
            yield "other", "{" + (f"{low},{high}" if comma else f"{low},{low}") + "}"
            at = match.end()
        elif text[at] in "|()*+?":
            yield "other", text[at]
            at += 1
        elif text[at] == ".":
            yield "other", "/(?s:.)/"
            at += 1
        else:
            line = text.count("\n", 0, at) + 1
            raise InvalidParameterError(
                f"grammar: line {line}: cannot read {text[at : at + 20]!r}", "structured_outputs"
            )


def _string(literal: str) -> str:
    """A Lark string, escapes as JSON has them."""
    out = ['"']
    for kind, char in _characters(literal[1:-1]):
        code = ord(char)
        if char in '"\\':
            out.append("\\" + char)
        elif kind == "escaped" and (code < 0x20 or code > 0x7E):
            out.append(char if code >= 0x20 else f"\\u{code:04x}")
        else:
            out.append(char)
    return "".join(out) + '"'


def _class(literal: str) -> str:
    """A character class as a regex of one character."""
    inner = literal[1:-1]
    negated = inner.startswith("^")
    out = ["/[^" if negated else "/["]
    for kind, char in _characters(inner[1:] if negated else inner):
        code = ord(char)
        if kind == "plain" and char == "-":
            out.append("-")
        elif code < 0x20 or char in "/\\[]^-&~":
            out.append(f"\\x{code:02x}" if code < 0x80 else char)
        else:
            out.append(char)
    return "".join(out) + "]/"


def _characters(text: str) -> Iterator[tuple[str, str]]:
    """("plain" or "escaped", character)."""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char != "\\":
            yield "plain", char
            continue
        char = text[at]
        at += 1
        if char in _HEX and re.fullmatch(rf"[0-9A-Fa-f]{{{_HEX[char]}}}", text[at : at + _HEX[char]]):
            code = int(text[at : at + _HEX[char]], 16)
            at += _HEX[char]
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise InvalidParameterError(f"grammar: U+{code:X} is no character", "structured_outputs")
            yield "escaped", chr(code)
        else:
            yield "escaped", {"n": "\n", "r": "\r", "t": "\t"}.get(char, char)
