"""Rows of a reproduction: what was claimed, how we looked, what we found, and whether that is the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduces", "in part", "does not reproduce", "cannot be measured here"]


@dataclass(frozen=True)
class Row:
    claim: str
    protocol: str
    ours: str
    verdict: Verdict


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| claim | protocol | ours | verdict |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {r.claim} | {r.protocol} | {r.ours} | {r.verdict} |" for r in rows)])
