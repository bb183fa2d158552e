"""docs/inspect.md names every finding there is, and no other."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY

DOCTOR = REPOSITORY / "nvfp4_runtime" / "checkpoint" / "doctor"
NO_FINDINGS = {"compressed-tensors", "gpt-oss"}  # dialects


def test_every_finding_is_documented():
    sources = [*(DOCTOR / "checks").glob("*.py"), DOCTOR / "files.py", DOCTOR / "treatments.py"]
    ids = {id for path in sources for id in re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)+)"', path.read_text())} - NO_FINDINGS
    table = (REPOSITORY / "docs" / "inspect.md").read_text().split("## JSON")[0]
    documented = {id for row in table.splitlines() if row.startswith("| `") for id in _ids(row)}
    assert len(ids) > 35
    assert documented == ids


def _ids(row: str) -> list[str]:
    return re.findall(r"`([a-z0-9-]+)`", row.split("|")[1])
