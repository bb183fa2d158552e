"""Every kernel compiles for GPUs that are not here, to the instructions its file promises, without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.conftest import REPOSITORY
from tests.kernels.triton.ahead import Result

KERNELS = REPOSITORY / "nvfp4_runtime" / "kernels"
SHARED_PIECES = {"common.py", "gemm_pieces.py", "kv_format.py", "numbers.py", "quantized_rows.py"}  # never launched
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for room in ("triton", "blackwell", "gpu_bench")
    for path in (KERNELS / room).glob("*.py")
    if "def compilations(" in path.read_text(encoding="utf-8")
)


def without_interpreter(*command: str) -> str:
    """The output of a Python module in a process of its own: this one's kernels are decorated for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    whole = [sys.executable, "-m", *command]
    done = subprocess.run(whole, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout if done.stdout else done.stderr


def compile_ahead(module: str) -> list[Result]:
    lines = without_interpreter("tests.kernels.triton.ahead", module).splitlines()
    return [Result(**json.loads(line)) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Two compilers at a time."""
    with ThreadPoolExecutor(max_workers=2) as executor:
        yield executor


@pytest.fixture(scope="module")
def compiled(pool: ThreadPoolExecutor, request: pytest.FixtureRequest) -> dict[str, Future[list[Result]]]:
    """The results of every module whose test was selected, as they come."""
    selected = {item.name for item in request.session.items}
    wanted = [module for module in MODULES if any(f"[{module}]" in name for name in selected)]
    return {module: pool.submit(compile_ahead, module) for module in wanted}


@pytest.fixture(scope="module")
def launched(pool: ThreadPoolExecutor) -> Future[str]:
    """The names of the kernels that layers launched on a Hopper that is not there."""
    return pool.submit(without_interpreter, "tests.kernels.triton.call_sites", "90")


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_every_target(compiled: dict[str, Future[list[Result]]], module: str) -> None:
    results = compiled[module].result()
    assert results, f"{module}.compilations() lists nothing"
    problems = [f"{r.name} for sm_{r.target}: {problem}" for r in results for problem in r.problems]
    assert not problems, "\n".join(problems)


def test_the_layers_launch_what_compiles(launched: Future[str]) -> None:
    output = launched.result()
    expected = {"gemm", "add_splits", "write_out", "quantize", "grouped_gemm", "rms_norm_kernel", "choose_kernel"}
    expected |= {"causal_conv_kernel", "keep_last_kernel", "selective_scan_kernel", "delta_rule_kernel"}
    assert expected <= set(output.split()), output


def test_kernels_without_a_declaration_are_found() -> None:
    kernels = {path for room in ("triton", "blackwell", "gpu_bench") for path in (KERNELS / room).glob("*.py")}
    undeclared = [
        path.name
        for path in sorted(kernels)
        if "\n@triton.jit" in (text := path.read_text(encoding="utf-8"))
        and path.name not in SHARED_PIECES
        and "def compilations(" not in text
    ]
    assert not undeclared, f"no compilations() in {undeclared}: nobody would notice that they do not compile"
