"""Targets from findings: shares of measured limits, and "not measured" where something is missing."""

from __future__ import annotations

import pytest

from loadtest.bench_gpu.__main__ import LINEAR_SHAPES
from loadtest.bench_gpu.model import LLAMA_8B
from loadtest.bench_gpu.report import describe
from loadtest.bench_gpu.targets import Target, floor_seconds, targets

# the facts' H200: 4.3 TB/s, 790 TFLOP/s
LIMITS = [
    {"part": "limits", "name": "copy_bandwidth", "value": 4.3e12},
    {"part": "limits", "name": "bf16_rate", "value": 790e12},
]


@pytest.mark.parametrize(
    ("batch", "kv_dtype", "milliseconds"),
    [(1, "bfloat16", 1.19), (1, "fp8", 1.17), (64, "fp8", 2.16), (256, "fp8", 5.15), (256, "nvfp4", 5.04)],
)
def test_floors_are_those_of_the_published_table(batch, kv_dtype, milliseconds):
    limits = {row["name"]: row["value"] for row in LIMITS}
    found = floor_seconds(limits, LLAMA_8B, batch, 1024, kv_dtype)
    assert found is not None
    assert found * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_with_no_findings_nothing_is_claimed():
    table = targets([], LLAMA_8B, LINEAR_SHAPES)
    assert len(table) == 4 + 4 + 4 + 4 + 1 + 1 + 18
    assert {target.verdict for target in table} == {"not measured"}
    assert all("not measured" in str(target) for target in table)


def test_findings_become_shares_and_verdicts():
    decode = {"part": "end_to_end", "name": "decode", "batch": 1, "context": 1024.0, "rate": 700.0}
    rows = [
        *LIMITS,
        {
            "part": "linear",
            "backend": "triton",
            "numerics": "w4a16",
            "shape": "qkv",
            "m": 1,
            "seconds": 4e-6,
            "bytes_per_second": 3.5e12,
        },
        {
            "part": "linear",
            "backend": "triton",
            "numerics": "w4a16",
            "shape": "qkv",
            "m": 64,
            "seconds": 9e-6,
            "bytes_per_second": 1e12,
        },
        {"part": "linear", "backend": "cublas", "numerics": "bf16", "shape": "qkv", "m": 64, "seconds": 15e-6},
        decode | {"numerics": "w4a16", "kv_dtype": "bfloat16", "seconds": 1.5e-3},
        decode | {"numerics": "bf16", "kv_dtype": "bfloat16", "seconds": 3.9e-3},
    ]
    found = {target.name: target for target in targets(rows, LLAMA_8B, LINEAR_SHAPES)}
    gemv = found["W4A16 qkv M=1, share of copy bandwidth"]
    assert gemv.value == pytest.approx(3.5 / 4.3)
    assert gemv.verdict == "met"
    large = found["W4A16 qkv M=64, time over cuBLAS BF16"]
    assert large.value == pytest.approx(0.6)
    assert large.verdict == "MISSED"
    assert found["decode step, batch 1, context 1k, bfloat16 KV, over the floor"].verdict == "met"
    assert found["decode step, batch 1, BF16 weights' time over ours"].value == pytest.approx(2.6)
    assert found["prefill 2k, share of cuBLAS's BF16 rate"].value is None


def test_a_value_on_the_line_meets_it():
    assert Target("x", 0.75, True, 0.75).verdict == "met"
    assert Target("x", 1.35, False, 1.35).verdict == "met"


def test_every_finding_reads_as_a_line():
    line = describe({"part": "linear", "shape": "o", "backend": "triton", "m": 4, "seconds": 5e-6, "n": 1, "k": 1})
    assert line.split() == ["o", "triton", "M=4", "5.0", "us"]
    assert "refused: no" in describe({"part": "check", "name": "rms_norm", "refused": "no"})
    assert "WRONG" in describe({"part": "check", "name": "rms_norm", "ok": False, "worst": 9.0})
