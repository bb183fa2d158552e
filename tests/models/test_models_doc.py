"""docs/models.md names what the code has, and what the tests of the fallback run."""

from __future__ import annotations

import re
from pathlib import Path

from nvfp4_runtime.models import ARCHITECTURES
from nvfp4_runtime.models.vision import CLASSES
from tests.models.test_from_transformers import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()


def test_every_architecture_of_ours_has_a_row_with_the_files_that_implement_it() -> None:
    rows = dict(re.findall(r"^\| (\w+ForCausalLM) \| (models/[^|]+) \|", PAGE, re.M))
    assert set(rows) == set(ARCHITECTURES)
    for architecture, files in rows.items():
        assert files.split(",")[0].strip() == f"models/{ARCHITECTURES[architecture]}.py"
        assert all((ROOT / "nvfp4_runtime" / file.strip()).is_file() for file in files.split(","))


def test_every_vision_language_class_has_a_row_with_its_language_model() -> None:
    section = PAGE.split("## Vision-language", 1)[1].split("## Through", 1)[0]
    rows = dict(re.findall(r"^\| (\w+) \| (\w+ForCausalLM)[^|]* \|", section, re.M))
    assert rows == {name: vision.text for name, vision in CLASSES.items()}


def test_the_fallback_s_families_are_those_that_are_tested() -> None:
    listed = PAGE.split("1e-4:\n", 1)[1].split("\n\n", 1)[0]
    assert {name.strip(" .\n") for name in listed.split(",")} == set(FAMILIES)
