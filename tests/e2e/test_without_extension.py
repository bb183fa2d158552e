"""A machine without a C++ compiler: the plain kernels serve, and whoever starts the server reads why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import REPOSITORY, Launch
from tests.tiny import tiny_nvfp4_llama

WHY = "extension not built"


@pytest.fixture
def no_extension(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python processes cannot import the extension, as where it was never compiled."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['nvfp4_runtime.kernels.cpu._native'] = None  # import raises ImportError\n"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))}


def test_version_says_so_and_how_to_get_it(no_extension: dict[str, str]) -> None:
    command = [sys.executable, "-m", "server.cli", "version"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | no_extension, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("backend cpu: "))
    assert line == f"backend cpu: {WHY} (install a C++17 compiler and run `pip install .` again)"


def test_the_plain_kernels_serve_and_one_line_says_why(
    launch: Launch, no_extension: dict[str, str], tmp_path: Path
) -> None:
    model = tiny_nvfp4_llama(tmp_path / "model")
    server = launch(str(model), "--threads", "1", "--num-kv-blocks", "32", env=no_extension)
    (line,) = (line for line in server.output().splitlines() if line.startswith("  backends"))
    assert f"cpu ({WHY}" in line
    assert "reference (" in line
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
