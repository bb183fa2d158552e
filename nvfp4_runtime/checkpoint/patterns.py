"""Module patterns of quantisation configs: exact names, containers, shell patterns, regular expressions after "re:".

A checkpoint's patterns are a stranger's. Only expressions that cannot run away are evaluated; others match nothing,
and `unevaluated` lists them so that somebody hears of it. They serve cross-checks alone: the tensors decide.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache

REGEX = "re:"
_MAX_PATTERN = 500
_MAX_NAME = 300
_MAX_QUANTIFIERS = 3
_ESCAPED_OR_CLASS = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
# Repeated groups can take exponential time, back references and counted repeats much memory or time.
_RUNS_AWAY = re.compile(r"\)[*+?{]|\{|\\[1-9]|[*+?][*+]")


class Patterns:
    """Many patterns, asked often: exact names and containers by look-up, the few others one by one."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._exact: set[str] = set()
        self._shell: list[re.Pattern[str]] = []
        self._regular: list[re.Pattern[str]] = []
        self.unevaluated: list[str] = []
        for pattern in dict.fromkeys(patterns):
            if pattern.startswith(REGEX):
                if (compiled := _safe_regex(pattern.removeprefix(REGEX))) is None:
                    self.unevaluated.append(pattern)
                else:
                    self._regular.append(compiled)
                continue
            self._exact.add(pattern)
            if any(c in pattern for c in "*?["):
                if len(pattern) > _MAX_PATTERN or pattern.count("*") > 2 * _MAX_QUANTIFIERS:
                    self.unevaluated.append(pattern)
                else:
                    self._shell.append(re.compile(fnmatch.translate(pattern)))

    def match(self, module: str) -> bool:
        """Whether a pattern names `module`, a container of it, or (as a whole, regexes from the start) its path."""
        if self._exact and any(name in self._exact for name in _self_and_containers(module)):
            return True
        if len(module) > _MAX_NAME:
            return False
        return any(p.match(module) for p in self._shell) or any(p.match(module) for p in self._regular)


def compiled(patterns: Sequence[str]) -> Patterns:
    """`Patterns`, made once for each list."""
    return _compiled(tuple(patterns))


@lru_cache(maxsize=16)
def _compiled(patterns: tuple[str, ...]) -> Patterns:
    return Patterns(patterns)


def _self_and_containers(module: str) -> list[str]:
    names, end = [module], module.rfind(".")
    while end > 0 and len(names) < 32:
        names.append(module[:end])
        end = module.rfind(".", 0, end)
    return names


def _safe_regex(pattern: str) -> re.Pattern[str] | None:
    """The compiled expression, or None where it is malformed or matching could take more than polynomial time."""
    if len(pattern) > _MAX_PATTERN:
        return None
    bare = _ESCAPED_OR_CLASS.sub(lambda m: m[0] if m[0][1:2].isdigit() else "x", pattern).replace("(?", "(")
    if _RUNS_AWAY.search(bare) or len(re.findall(r"[*+?]", bare)) > _MAX_QUANTIFIERS:
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None
