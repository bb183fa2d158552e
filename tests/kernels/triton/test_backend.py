"""What the Triton backend refuses, and in which words; these run without triton and without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.ops import GroupedLinearSpec, LinearSpec, NormSpec, QuantizeSpec
from nvfp4_runtime.kernels.registry import PREFERENCE, available_backends
from nvfp4_runtime.kernels.triton import backend as module
from nvfp4_runtime.kernels.triton.backend import NO_DEVICE, NOT_INSTALLED, TritonBackend
from nvfp4_runtime.nvfp4 import codec, fp8
from nvfp4_runtime.nvfp4.weight import DenseWeight
from tests.kernels.conftest import random_tensor, same_bits

LINEAR = LinearSpec(64, 64, "nvfp4", "w4a16", "bfloat16", "bfloat16")


def test_without_the_package_everything_is_refused_and_the_remedy_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    backend = TritonBackend()
    assert backend.refuses(LINEAR) == NOT_INSTALLED
    assert backend.describe() == {"status": NOT_INSTALLED}
    with pytest.raises(ConfigError, match="pip install"):
        available_backends("triton")


def test_without_a_gpu_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonBackend().refuses(LINEAR) == NO_DEVICE


def test_a_gpu_that_nobody_compiled_for_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "found 7.5" in str(TritonBackend().refuses(LINEAR))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LinearSpec(64, 64, "nvfp4", "w4a8", "bfloat16", "bfloat16"), "w4a16 or w4a4"),
        (LinearSpec(64, 64, "fp8", "w4a4", "bfloat16", "bfloat16", (1, 64)), "no choice of numerics"),
        (LinearSpec(64, 64, "fp8", None, "bfloat16", "bfloat16"), "block of their scales"),
        (GroupedLinearSpec(2, 64, 64, "fp8", None, "bfloat16", "bfloat16", (8, 24)), "every multiple of 32"),
        (LinearSpec(64, 64, "bf16", None, "float16", "bfloat16"), "asked for float16"),
        (NormSpec(64, "bfloat16", "float16"), "results are"),
    ],
)
def test_what_it_does_not_run_is_refused_with_the_reason(triton_backend: TritonBackend, spec, words: str) -> None:
    assert words in str(triton_backend.refuses(spec))


def test_weights_quantised_at_load_are_those_of_the_format(triton_backend: TritonBackend) -> None:
    weight = DenseWeight(random_tensor(48, 64, seed=1), bias=random_tensor(48, seed=2))
    made = triton_backend.quantize(weight, QuantizeSpec(48, 64, "bf16", "fp8"))
    codes, scale = fp8.quantize_rows(weight.weight)
    assert same_bits(made.codes.cpu(), codes)
    assert same_bits(made.scale.cpu(), scale)
    four = triton_backend.quantize(weight, QuantizeSpec(48, 64, "bf16", "nvfp4"))
    packed, block_scale = codec.quantize(weight.weight, codec.weight_scale_2(weight.weight.abs().max()))
    assert same_bits(four.packed.cpu(), packed)
    assert same_bits(four.block_scale.cpu(), block_scale)
    assert float(triton_backend.largest(weight.weight)) == float(weight.weight.abs().max())


def test_importing_the_backend_brings_no_triton() -> None:
    code = "import sys, nvfp4_runtime.kernels.triton.backend; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_gpu_s_backends_are_triton_then_the_reference() -> None:
    assert tuple(backend.name for backend in available_backends(device="cuda")) == PREFERENCE["cuda"]
    assert PREFERENCE["cuda"][-2:] == ("triton", "reference")
    assert "triton" not in PREFERENCE["cpu"], "the interpreter is for tests that ask for it by name"
