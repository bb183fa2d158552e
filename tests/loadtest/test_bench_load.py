"""The benchmark of loading, on a model of a few kilobytes: it asks while the server loads, and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import bench_load
from loadtest.bench_cpu.shapes import Shape

TINY = Shape("tiny", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=320, max_positions=512)
ENGINE = {"import", "checkpoint", "weights", "kv_cache", "warm_up", "self_test", "engine_total"}
PHASES = ENGINE | {"web", "tokenizer", "ready"}


def test_first_token_is_timed_from_exec_and_phases_and_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_load, "LOADED", TINY)
    monkeypatch.setattr(bench_load, "KV_BYTES", 1 << 20)
    file = tmp_path / "load.json"
    bench_load.main(["--starts", "1", "--threads", "1", "--cache", str(tmp_path), "--json", str(file)])
    result = json.loads(file.read_text())
    (start,) = result["starts"]
    assert set(start["phases"]) == PHASES
    assert start["listening_seconds"] < start["phases"]["ready"] < start["ttft_seconds"]
    assert start["load_seconds"] < start["phases"]["engine_total"]
    assert len(start["pss"]) == 2, "the server's process and the engine's"
    assert result["shape"]["name"] == "tiny"
    shown = capsys.readouterr().out
    assert f"{start['ttft_seconds']:6.3f} s" in shown
    for phase in PHASES:
        assert f"phase {phase} " in shown


def test_bars_that_are_missed_are_called_so() -> None:
    start = bench_load.Start(2.5, 0.1, 1.0, dict.fromkeys(PHASES, 0.1), {"1 nvfp4": 10**9, "2 engine": 10**9})
    shown = bench_load.render([start], 10**9)
    assert "MISSED: first token in 2.50 s, asked 2.0 s" in shown
    assert "MISSED: 2000 MB of memory in all, 1000 MB beside" in shown
    quick = bench_load.Start(1.5, 0.1, 1.0, dict.fromkeys(PHASES, 0.1), {"1 nvfp4": 10**8})
    assert bench_load.render([quick], 10**9).count("met:   ") == 2
