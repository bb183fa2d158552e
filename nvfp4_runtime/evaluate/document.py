"""Tables for documents: Markdown, and the place between two comments where one is kept up to date."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from nvfp4_runtime.errors import ConfigError


def markdown_table(rows: Sequence[Sequence[str]], left: int) -> str:
    """The first row is the head; columns from `left` on are set to the right."""
    head, *body = rows
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def replace_section(document: Path, name: str, body: str) -> None:
    """Put `body` between `<!-- NAME -->` and `<!-- end NAME -->`.

    Raises ConfigError when the comments are not in the document once each, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{document} cannot be read: {error.strerror or error}", "--docs") from error
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"expected the comments {begin} and {end} once each, in this order, in {document}", "--docs")
    before, _, rest = text.partition(begin)
    document.write_text(f"{before}{begin}\n\n{body.strip()}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def commit() -> str:
    """The commit that is measured, with "+" when files differ from it; "unknown" outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
