"""Where the shared fixtures lie: beside the repository. Tests that need them skip, saying so, where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
FIXTURES = SHARED / "fixtures"

needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="../shared/fixtures is not there")


def needs_shared(path: str) -> pytest.MarkDecorator:
    """Skip unless ../shared/`path` exists."""
    return pytest.mark.skipif(not (SHARED / path).exists(), reason=f"../shared/{path} is not there")
