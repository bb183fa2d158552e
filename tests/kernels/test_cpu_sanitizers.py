"""`make test-asan` is worth something: what a kernel must not do is caught there. Skipped in every other run."""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.kernels.cpu.backend import _native
from tests.kernels.conftest import cpu_backend

MAPS = Path("/proc/self/maps")

pytestmark = pytest.mark.skipif(
    not MAPS.exists() or "libasan" not in MAPS.read_text(),
    reason="this process runs without a sanitizer: make test-asan",
)


def report_of(work: Callable[[], None]) -> str:
    """What a forked child says on stderr while it runs `work`, with its exit status."""
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 2)
            torch.set_num_threads(1)  # see guarded.survives
            try:
                work()
            except Exception:  # noqa: BLE001 - printed, and the status says so
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        stderr.seek(0)
        return f"exit {os.waitstatus_to_exitcode(status)}: " + stderr.read().decode(errors="replace")


@pytest.mark.parametrize("argument", ["x", "out"])
def test_one_row_too_many_is_reported_in_every_isa(isa: str, argument: str) -> None:
    """The same call twice, the second time with one row more than one of its tensors has."""
    context, width = cpu_backend(isa, 1)._context, 40
    rows = {"x": 3, "out": 3}
    rows[argument] -= 1

    def call(num_rows: int) -> None:
        x = torch.ones(rows["x"], 2 * width)
        out = torch.empty(rows["out"], width)
        context.silu_mul(x.data_ptr(), out.data_ptr(), 0, 0, num_rows, width)

    assert report_of(lambda: call(2)) == "exit 0: "
    found = report_of(lambda: call(3))
    kind = "READ" if argument == "x" else "WRITE"
    assert re.search(rf"AddressSanitizer: heap-buffer-overflow[\s\S]*{kind} of size", found), found[:2000]
    assert "csrc/" in found


def test_signed_overflow_is_reported() -> None:
    """csrc rounds K up; the largest int overflows. checks.py never lets it through."""
    context = cpu_backend()._context
    weight = _native.PlainWeight(0, 0, 0, 0, 2**31 - 1)
    found = report_of(lambda: context.linear(weight, 0, 0, 0, 0, 0))
    assert "signed integer overflow" in found, found[:2000]
