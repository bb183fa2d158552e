"""--machine-limits: what was configured, what was measured, and that it is measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.engine import limits
from nvfp4_runtime.engine.limits import machine_limits
from nvfp4_runtime.engine.messages import MachineLimits
from nvfp4_runtime.errors import ConfigError, KernelError

CPU = torch.device("cpu")
FOUND = MachineLimits(20e9, 300e9, "measured: so")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nvfp4"


def test_configured_limits_are_taken_as_they_are() -> None:
    assert machine_limits("40,900.5", CPU, 1, "w4a16") == MachineLimits(40e9, 900.5e9, "configured")


@pytest.mark.parametrize("text", ["fast", "40", "40,0", "-1,5", "40,inf", "1,2,3", ""])
def test_what_is_no_limit_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="GB/s,GFLOP/s") as caught:
        machine_limits(text, CPU, 1, "w4a16")
    assert caught.value.flag == "--machine-limits"


def test_it_is_measured_once_per_machine_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(limits, "_measure_cpu", lambda threads, numerics: calls.append(threads) or FOUND)
    for _ in range(3):
        assert machine_limits("measure", CPU, 2, "w4a16") == FOUND
    assert calls == [2]
    machine_limits("measure", CPU, 1, "w4a16")
    assert calls == [2, 1], "fewer threads are another machine"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": 1}', "\x00"])
def test_a_broken_cache_is_said_and_made_anew(
    content: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "_measure_cpu", lambda threads, numerics: FOUND)
    machine_limits("measure", CPU, 2, "w4a16")
    (file,) = cache.iterdir()
    file.write_text(content)
    assert machine_limits("measure", CPU, 2, "w4a16") == FOUND
    assert json.loads(file.read_text())["limits"]["how"] == FOUND.how
    assert ("made anew" in caplog.text) or content == '{"machine": 1}', "a file of another machine is no fault"


def test_a_machine_that_cannot_be_measured_has_no_limits_and_says_why(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(threads: int, numerics: str) -> MachineLimits:
        raise KernelError("the extension is not built")

    monkeypatch.setattr(limits, "_measure_cpu", refuse)
    assert machine_limits("measure", CPU, 2, "w4a16") is None
    assert "not built" in caplog.text


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
def test_this_cpu_is_measured(numerics: str) -> None:
    pytest.importorskip("nvfp4_runtime.kernels.cpu._native", reason="the native extension is not built")
    found = limits._measure_cpu(1, numerics)
    assert found.read_bytes_per_second > 1e8
    assert found.flops_per_second > 1e8
    assert "1 threads" in found.how


@pytest.mark.gpu
def test_this_gpu_is_measured() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    found = limits._measure_gpu(torch.device("cuda", 0))
    assert found.read_bytes_per_second > 1e10
    assert found.flops_per_second > 1e11
