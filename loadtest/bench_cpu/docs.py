"""Puts a run's tables where docs/performance.md keeps them: between two comments, one pair per section."""

from __future__ import annotations

import subprocess
from pathlib import Path


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with what stands between `<!-- bench-cpu NAME -->` and `<!-- end NAME -->` replaced by `body`.

    Raises ValueError when the comments are not there once each, in this order.
    """
    begin, end = f"<!-- bench-cpu {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the comments {begin} and {end} once each, in this order; add them to the document")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{body.strip()}\n\n{end}{rest.partition(end)[2]}"


def write_sections(document: Path, sections: dict[str, str]) -> None:
    """Replace every section in `document`; nothing is written when one has no place there."""
    text = document.read_text(encoding="utf-8")
    for name, body in sections.items():
        text = replace_section(text, name, body)
    document.write_text(text, encoding="utf-8")


def commit() -> str:
    """The commit that is measured, with "+" when files differ from it; "unknown" outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
