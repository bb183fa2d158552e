"""The Triton backend as this machine has it: on its GPU, else under the interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nvfp4_runtime.kernels.triton.backend import TritonBackend


@pytest.fixture(scope="session")
def triton_backend() -> TritonBackend:
    """The backend, or a skip with its reason. Shapes stay below some 256 a side: the interpreter is slow."""
    found = TritonBackend()
    if found.missing is not None:
        pytest.skip(f"triton: {found.missing}")
    return found


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Test modules here import kernels, and with them triton; without the package only one test says so."""
    missing = importlib.util.find_spec("triton") is None
    return True if missing and collection_path.name not in ("test_backend.py", "conftest.py") else None
