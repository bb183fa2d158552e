"""A server is calibrated over HTTP, and its simulation stands beside it."""

from __future__ import annotations

import json

import pytest

from loadtest.__main__ import main
from loadtest.plan.command import read_measured
from loadtest.plan.validate import Comparison, table, together

ENGINE = "--simulate --simulate-script 'Some words. ' --simulate-step-seconds 0.01"
LIMITS = ["--max-num-seqs", "4", "--max-num-batched-tokens", "2048", "--max-context", "32"]


def test_a_simulated_engine_is_calibrated_and_validated(tmp_path, capsys):
    file, beside = tmp_path / "measured.json", tmp_path / "beside.json"
    assert main(["calibrate", "--model", ENGINE, *LIMITS, "--output", str(file)]) == 0
    found = read_measured(file)
    assert [rows for rows, _ in found.decode] == [1.0, 2.0, 4.0]
    assert all(0.01 <= seconds < 0.1 for _, seconds in found.decode)
    assert found.kv_tokens == 32768
    assert found.tokens_per_word > 3  # bytes
    flags = ["--workload", "4/30", "--concurrency", "2", "--per-user", "4", "--passes", "2", "--json", str(beside)]
    assert main(["validate", "--model", ENGINE, *LIMITS, "--measured", str(file), *flags]) == 0
    (comparison,) = json.loads(beside.read_text())
    ratio = comparison["simulated"]["tokens/s"] / comparison["measured"]["tokens/s"]
    # on a quiet machine within 0.1 (docs/loadtest.md); others may take the cores during either half
    assert 0.5 < ratio < 2
    assert "| 4/30, 2 users |" in capsys.readouterr().out


def test_errors_are_simulated_over_measured():
    measured = {"tokens/s": 100.0, "e2e p95": 1.0, "TTFT p95": 0.1, "gap p95": 0.01}
    one = Comparison("a", measured, measured | {"tokens/s": 110.0}, [], 0.0)
    two = Comparison("b", measured, measured | {"e2e p95": 0.8}, ["client stalled: x"], 0.0)
    assert one.error("tokens/s") == pytest.approx(0.1)
    assert two.error("e2e p95") == pytest.approx(-0.2)
    both = together([one, two, one])
    assert both.simulated == measured | {"tokens/s": 110.0}
    assert both.complaints == ["client stalled: x"]
    text = table([one, two])
    assert "| a | 100, 110 (+10 %) |" in text
    assert "tokens/s: error 10 % in the middle, 10 % at most" in text
    assert "invalid: b: client stalled: x" in text
