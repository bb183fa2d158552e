"""Which device runs: what was asked for, what there is, and words for when they differ."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.engine import device as device_module
from nvfp4_runtime.engine.device import describe, resolve_device, why_no_gpu
from nvfp4_runtime.errors import ConfigError


@pytest.fixture(params=[None, "there is none"])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why no GPU can be used: None on a machine that has one."""
    monkeypatch.setattr(device_module, "why_no_gpu", lambda: request.param)
    return request.param


def test_auto_is_a_gpu_where_one_can_be_used(reason: str | None) -> None:
    assert resolve_device("auto", "auto").type == ("cuda" if reason is None else "cpu")
    assert resolve_device("auto", "reference").type == ("cuda" if reason is None else "cpu")
    assert resolve_device("cpu", "auto").type == "cpu"
    assert resolve_device("auto", "cpu").type == "cpu"


@pytest.mark.parametrize(
    ("asked", "backend", "flag"),
    [("cuda", "auto", "--device"), ("auto", "triton", "--backend"), ("auto", "blackwell", "--backend")],
)
def test_a_gpu_that_is_asked_for_and_absent_is_refused(reason: str | None, asked: str, backend: str, flag: str) -> None:
    if reason is None:
        assert resolve_device(asked, backend) == torch.device("cuda", 0)  # type: ignore[arg-type]  # of DeviceName
        return
    with pytest.raises(ConfigError, match="needs a GPU: there is none") as caught:
        resolve_device(asked, backend)  # type: ignore[arg-type]  # of DeviceName
    assert caught.value.flag == flag


@pytest.mark.parametrize(("asked", "backend"), [("cpu", "triton"), ("cpu", "blackwell"), ("cuda", "cpu")])
def test_a_backend_is_not_run_on_another_device_than_its_own(reason: str | None, asked: str, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"--backend {backend} runs on"):
        resolve_device(asked, backend)  # type: ignore[arg-type]  # of DeviceName


def test_a_pytorch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in (why_no_gpu() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no NVIDIA GPU" in (why_no_gpu() or "")


def test_a_gpu_that_cannot_run_a_kernel_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch, "ones", broken)
    expected = (
        "Old GPU cannot run PyTorch's kernels: CUDA error: no kernel image is available for execution on the device"
    )
    assert why_no_gpu() == expected


def test_the_cpu_is_described_in_a_word() -> None:
    assert describe(torch.device("cpu")) == "cpu"
