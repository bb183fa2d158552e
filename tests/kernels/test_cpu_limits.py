"""The machine's limits: sane numbers, clear refusals. What is fast enough is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu import limits
from nvfp4_runtime.kernels.cpu.backend import NOT_BUILT, supported_isas

built = pytest.mark.skipif(not supported_isas(), reason=NOT_BUILT)
MIB = 1 << 20


@built
def test_every_limit_is_positive_and_its_percentiles_are_in_order():
    found = limits.measure_all(2, 32 * MIB)
    assert set(found) == {"read", *limits.peak_kinds()}
    for limit in found.values():
        assert 0 < limit.median <= limit.high
        assert limit.low <= limit.median
        assert limit.how


@built
def test_peaks_are_those_of_the_instructions_this_cpu_has():
    known = {"vnni", "bf16", "fma"}
    assert set(limits.peak_kinds()) <= known
    for kind in known - set(limits.peak_kinds()):
        with pytest.raises(KernelError, match="cannot be measured on this CPU"):
            limits.measure_peak(kind, 1)
    with pytest.raises(KernelError, match="'flops' cannot be measured"):
        limits.measure_peak("flops", 1)


@built
@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: limits.measure_read_bandwidth(0), "threads must be 1 to"),
        (lambda: limits.measure_read_bandwidth(5000), "threads must be 1 to"),
        (lambda: limits.measure_read_bandwidth(2, MIB), "at least 8 MiB a thread"),
        (lambda: limits.measure_read_bandwidth(1, 64 * MIB, float("nan")), "seconds must be above 0"),
        (lambda: limits.measure_peak("fma", 1, 0.0), "seconds must be above 0"),
    ],
)
def test_numbers_that_cannot_be_measured_with_are_refused(measure, message):
    with pytest.raises(KernelError, match=message):
        measure()


@built
def test_the_pipe_answers_each_line_with_all_limits():
    command = [sys.executable, "-m", "nvfp4_runtime.kernels.cpu.limits", "--pipe"]
    lines = json.dumps({"threads": 1, "bytes": 32 * MIB}) + "\n"
    done = subprocess.run(command, input=lines * 2, capture_output=True, text=True, timeout=120, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [{"read", *limits.peak_kinds()}] * 2


def test_without_the_extension_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvfp4_runtime.kernels.cpu._native", None)
    from nvfp4_runtime.kernels import cpu

    monkeypatch.delattr(cpu, "_native", raising=False)
    with pytest.raises(KernelError, match="install a C"):
        limits.measure_peak("fma", 1)
