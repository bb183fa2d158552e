"""The native backend as an object: what it accepts, what it refuses and why, what it says about itself."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.cpu import backend as module
from nvfp4_runtime.kernels.ops import ActivationSpec, LinearSpec, NormSpec, OpSpec, PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import available_backends
from tests.kernels.conftest import cpu_backend

SPECS: list[OpSpec] = [
    LinearSpec(64, 64, "nvfp4", "w4a16", "bfloat16", "bfloat16"),
    LinearSpec(64, 64, "nvfp4", "w4a4", "float32", "float32"),
    LinearSpec(64, 64, "bf16", None, "bfloat16", "float32"),
    NormSpec(64, "bfloat16", "bfloat16"),
    ActivationSpec(64, "bfloat16", "bfloat16"),
    RopeSpec(4, 2, 64, 64, True, "fp8", "bfloat16"),
    PagedAttentionSpec(4, 2, 64, None, "bfloat16", "float32", "float32"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_every_op_is_accepted(spec: OpSpec) -> None:
    assert cpu_backend().refuses(spec) is None


REFUSED: list[tuple[OpSpec, str]] = [
    (NormSpec(64, "float16", "float16"), "activations are bfloat16 or float32"),
    (LinearSpec(64, 64, "bf16", None, "bfloat16", "float16"), "results are bfloat16 or float32"),
    (LinearSpec(64, 64, "nvfp4", None, "bfloat16", "bfloat16"), "w4a16, w4a8, w4a4"),
    (RopeSpec(4, 2, 1024, 64, False, "fp8", "bfloat16"), "head_dim is at most 512"),
    (RopeSpec(4, 2, 64, 63, False, "fp8", "bfloat16"), "rotary_dim must be even"),
    (PagedAttentionSpec(5, 2, 64, None, "bfloat16", "bfloat16", "bfloat16"), "do not divide"),
    (PagedAttentionSpec(4, 2, 64, 0, "bfloat16", "bfloat16", "bfloat16"), "a window is at least 1"),
]


@pytest.mark.parametrize(("spec", "reason"), REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(spec: OpSpec, reason: str) -> None:
    found = cpu_backend().refuses(spec)
    assert found is not None
    assert reason in found


def test_without_the_extension_every_op_is_refused_with_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_native", None)
    monkeypatch.setattr(module, "_missing", "No module named '_native'", raising=False)
    backend = module.CPUBackend()
    assert {backend.refuses(spec) for spec in SPECS} == {"extension not built"}
    with pytest.raises(ConfigError, match=r"run `pip install \.` again \(No module named '_native'\)"):
        available_backends("cpu")
    assert backend.describe() == {"status": module.NOT_BUILT}
    assert module.supported_isas() == []


def test_describe_names_isa_threads_and_version(isa: str) -> None:
    facts: dict[str, Any] = cpu_backend(isa, threads=3).describe()
    assert facts["isa"] == isa
    assert facts["threads"] == "3"
    assert facts["version"]


def test_an_isa_the_machine_lacks_and_no_threads_are_config_errors() -> None:
    cpu_backend()
    with pytest.raises(ConfigError, match="cannot run ISA variant 'altivec'"):
        module.CPUBackend(isa="altivec")
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        module.CPUBackend(threads=0)


def test_default_threads_are_the_physical_cores_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_backend().row_invariant
    assert 1 <= module.CPUBackend().threads == module.physical_cores()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert module.physical_cores() == 1
