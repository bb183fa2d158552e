"""The GPU benchmark's parts, walked through on a CPU at tiny sizes, so that a machine with a GPU meets no slip."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from nvfp4_runtime.kernels.gpu_bench import attention, check, limits, linear, made, reciprocals
from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.registry import available_backends

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NO_GPU = "triton: no CUDA device (PyTorch sees none)"


def rehearse(measure: Any, *arguments: Any) -> list[dict[str, Any]]:
    if torch.cuda.is_available():
        pytest.skip("kernels of this process are compiled for its GPU: nothing to rehearse")
    rows: list[dict[str, Any]] = []
    measure(Setting("cpu", emit=rows.append), *arguments)
    assert not [row for row in rows if "failed" in row]
    return rows


def test_reciprocals_are_compared_bit_by_bit_and_dumped(tmp_path):
    rows = rehearse(reciprocals.measure, tmp_path / "rcp.bin")
    by_name = {row["name"]: row for row in rows}
    six = by_name["rcp.approx.ftz(6.0)"]
    assert six["bits"] == six["correctly_rounded"] == "0x3e2aaaab"
    assert by_name["units off, over all mantissas"]["counts"] == {"0": 1024}
    assert by_name["units off, G"]["off"] == 0
    assert (tmp_path / "rcp.bin").read_bytes() == bytes(1024)


def test_limits_are_found():
    rows = rehearse(limits.measure)
    assert [row["name"] for row in rows] == ["copy_bandwidth", "read_bandwidth", "bf16_rate", "launch_gap"]
    assert all(row["value"] > 0 for row in rows)


def test_linears_are_timed_beside_cublas():
    rows = rehearse(linear.measure)
    timed = {(row["backend"], row["numerics"], row["m"]) for row in rows if "seconds" in row}
    wanted = {(b, n, m) for b, n in (("cublas", "bf16"), ("triton", "w4a16"), ("triton", "w4a4")) for m in (1, 3)}
    assert timed == wanted


def test_attention_is_timed_for_every_cache():
    rows = rehearse(attention.measure)
    assert {row["kv_dtype"] for row in rows if "seconds" in row} == {"bfloat16", "fp8", "nvfp4"}


def test_every_kernel_is_checked_and_right():
    rows = rehearse(check.measure)
    wrong = [(row["name"], row.get("worst")) for row in rows if row.get("ok") is False]
    assert not wrong
    refused = {row["name"]: row["refused"] for row in rows if "refused" in row}
    assert not refused, "Triton runs all that the benchmark asks of it"
    assert len(rows) > 20


def test_a_kernel_that_computes_something_else_is_told(monkeypatch):
    rows: list[dict[str, Any]] = []
    setting = Setting("cpu", emit=rows.append)
    wrong = available_backends("reference")[0]
    monkeypatch.setattr(wrong, "silu_mul", lambda spec: lambda x: x[:, : x.shape[1] // 2])
    monkeypatch.setattr(wrong, "name", "wrong", raising=False)
    monkeypatch.setattr(check, "tested", lambda setting: [wrong])
    monkeypatch.setattr(check, "cases", check.plain_cases)
    check.measure(setting)
    assert [row["name"] for row in rows if row.get("ok") is False] == ["silu_mul"]


def test_what_fails_is_a_finding_and_the_rest_runs():
    rows: list[dict[str, Any]] = []
    setting = Setting("cpu", emit=rows.append)
    with setting.attempt({"part": "linear", "m": 1}):
        raise RuntimeError("out of shared memory")
    assert rows == [{"part": "linear", "m": 1, "failed": "RuntimeError: out of shared memory"}]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "nvfp4"])
def test_caches_hold_finite_values_only(kv_dtype):
    kv = made.cache(kv_dtype, 3, 2, 32, 0, torch.device("cpu"))
    for part in (kv.k, kv.v, kv.k_blocks, kv.v_blocks):
        assert part is None or part.dtype == torch.uint8 or bool(part.float().isfinite().all())


@pytest.mark.gpu
def test_every_kernel_is_right_on_the_gpu_at_a_models_sizes():
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    rows: list[dict[str, Any]] = []
    check.measure(Setting("cuda", emit=rows.append))
    wrong = [row for row in rows if row.get("ok") is False]
    assert not wrong, "\n".join(str(row) for row in wrong)
    refused = [row for row in rows if "refused" in row and row["backend"] == "triton"]
    assert not refused, "\n".join(str(row) for row in refused)
