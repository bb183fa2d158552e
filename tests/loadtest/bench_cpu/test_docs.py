"""Tables go where the document keeps them, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench_cpu.__main__ import SECTIONS
from loadtest.bench_cpu.docs import replace_section, write_sections

DOCUMENT = "# A\n\n<!-- bench-cpu x -->\nold\n<!-- end x -->\n\ntext\n\n<!-- bench-cpu y -->\n<!-- end y -->\n"


def test_a_section_is_replaced_and_the_rest_stays():
    once = replace_section(DOCUMENT, "x", "| new |\n")
    assert once == DOCUMENT.replace("\nold\n", "\n\n| new |\n\n")
    assert replace_section(once, "x", "| new |") == once
    assert replace_section(once, "y", "more").startswith(once.partition("<!-- end y")[0].rstrip("\n"))


def test_a_section_without_a_place_writes_nothing(tmp_path):
    path = tmp_path / "d.md"
    path.write_text(DOCUMENT)
    with pytest.raises(ValueError, match="bench-cpu z"):
        write_sections(path, {"x": "new", "z": "new"})
    assert path.read_text() == DOCUMENT


def test_our_document_has_a_place_for_every_section():
    text = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    for name in SECTIONS:
        assert "a table" in replace_section(text, name, "a table")
