"""Every kernel compiles for GPUs that are not here, to the instructions its file promises, without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.kernels.triton.ahead import Result

KERNELS = REPOSITORY / "nvfp4_runtime" / "kernels"
SHARED_PIECES = {"common.py", "numbers.py", "kv_format.py", "quantized_rows.py"}  # called by kernels, never launched
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for room in ("triton", "blackwell", "gpu_bench")
    for path in (KERNELS / room).glob("*.py")
    if "def compilations(" in path.read_text(encoding="utf-8")
)


def compile_ahead(*modules: str) -> list[Result]:
    """In a process of its own: this one's kernels are decorated for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.ahead", *modules]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return [Result(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_every_target(module: str) -> None:
    results = compile_ahead(module)
    assert results, f"{module}.compilations() lists nothing"
    problems = [f"{r.name} for sm_{r.target}: {problem}" for r in results for problem in r.problems]
    assert not problems, "\n".join(problems)


def test_kernels_without_a_declaration_are_found() -> None:
    kernels = {path for room in ("triton", "blackwell", "gpu_bench") for path in (KERNELS / room).glob("*.py")}
    undeclared = [
        path.name
        for path in sorted(kernels)
        if "@triton.jit" in (text := path.read_text(encoding="utf-8"))
        and path.name not in SHARED_PIECES
        and "def compilations(" not in text
    ]
    assert not undeclared, f"no compilations() in {undeclared}: nobody would notice that they do not compile"
