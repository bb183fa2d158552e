"""What the Blackwell backend takes and what it leaves to others, on machines that are described to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.blackwell import capability
from nvfp4_runtime.kernels.blackwell.backend import BlackwellBackend
from nvfp4_runtime.kernels.ops import LinearSpec, NormSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import PREFERENCE, Kernels
from tests.kernels.conftest import random_nvfp4

SPEC = LinearSpec(64, 64, "nvfp4", "w4a4", "bfloat16", "bfloat16")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A function that describes the GPU: its capability, and Triton's version or None."""

    def describe(found: tuple[int, int], triton: str | None = "3.6.0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None if triton is None else object())
        monkeypatch.setattr(capability.metadata, "version", lambda name: triton)

    return describe


def test_without_a_gpu_it_says_what_it_needs():
    reason = BlackwellBackend(torch.device("cpu")).refuses(SPEC)
    assert "10.0, 10.3, 12.0, 12.1" in reason


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (9, 0), (11, 0), (10, 1), (12, 2)])
def test_capability_is_a_set_and_not_a_ladder(machine, found):
    machine(found)
    assert f"found {found[0]}.{found[1]}" in capability.refuses_machine(torch.device("cuda"))


@pytest.mark.parametrize("found", [(10, 0), (10, 3), (12, 0), (12, 1)])
def test_machines_of_the_set_are_taken(machine, found):
    machine(found)
    assert capability.refuses_machine(torch.device("cuda")) is None


def test_without_triton_it_says_so(machine):
    machine((10, 0), triton=None)
    assert "triton" in capability.refuses_machine(torch.device("cuda"))


@pytest.mark.parametrize(
    ("found", "triton", "own_kernel"),
    [(100, "3.6.0", True), (120, "3.7.1", True), (121, "3.6.0", False), (121, "3.8.0", False), (121, "3.10.0", True)],
)
def test_few_rows_have_their_own_kernel_where_triton_compiles_it(machine, found, triton, own_kernel):
    machine((found // 10, found % 10), triton)
    tile, reason = capability.tile_for(found)
    assert (tile is not None) is own_kernel
    assert own_kernel or "needs triton >= 3.9" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"numerics": "w4a16"}, "w4a4"),
        ({"weight": "bf16", "numerics": None}, "w4a4"),
        ({"dtype": "float32"}, "bfloat16"),
        ({"out_dtype": "float16"}, "float16"),
    ],
)
def test_other_arithmetic_is_refused_with_a_reason(machine, change, reason):
    machine((10, 0))
    assert reason in BlackwellBackend(torch.device("cuda")).refuses(dataclasses.replace(SPEC, **change))


def test_other_ops_are_refused_and_asking_anyway_raises():
    backend, spec = BlackwellBackend(torch.device("cpu")), NormSpec(64, "bfloat16", "bfloat16")
    assert backend.refuses(spec) is not None
    with pytest.raises(KernelError, match="rms_norm"):
        backend.rms_norm(spec)


def test_a_machine_whose_product_fails_is_refused(machine, monkeypatch):
    machine((12, 1))
    monkeypatch.setattr("nvfp4_runtime.kernels.blackwell.probe.check", lambda make, m, device: f"wrong at M={m}")
    backend = BlackwellBackend(torch.device("cuda"))
    assert backend.refuses(SPEC) == "wrong at M=128"
    assert backend.describe() == {"status": "wrong at M=128"}


@pytest.fixture
def accepting(machine, monkeypatch: pytest.MonkeyPatch) -> BlackwellBackend:
    """The backend on a machine that passed the probe; its linears are made up."""
    machine((10, 0))
    monkeypatch.setattr("nvfp4_runtime.kernels.blackwell.probe.check", lambda make, m, device: None)
    monkeypatch.setattr(BlackwellBackend, "_make", lambda self, weight, few, spec=None: "a layer")
    return BlackwellBackend(torch.device("cuda"))


@pytest.mark.parametrize(
    ("numerics", "input_scale", "chosen"),
    [
        ("w4a4", 0.01, "blackwell"),
        ("w4a16", 0.01, "reference"),
        ("auto", 0.01, "reference"),
        ("auto", None, "reference"),
    ],
)
def test_layers_go_to_it_when_w4a4_is_asked_for(accepting, numerics, input_scale, chosen):
    kernels = Kernels([accepting, ReferenceBackend()], "bfloat16", numerics, "bfloat16")
    kernels.linear("qkv_proj", random_nvfp4(64, 64, seed=0, input_scale=input_scale))
    kernels.rms_norm(64)
    assert [choice.backend for choice in kernels.choices] == [chosen, "reference"]
    assert kernels.choices[0].numerics == ("w4a4" if numerics == "w4a4" else "w4a16")
    assert chosen == "blackwell" or "blackwell: multiplies NVFP4 by NVFP4 (w4a4) only" in kernels.choices[0].reason


def test_it_is_asked_before_triton_on_a_gpu():
    assert PREFERENCE["cuda"] == ("blackwell", "triton", "reference")
