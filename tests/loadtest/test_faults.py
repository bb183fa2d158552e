"""The measurement of faults, once, with few streams: it sees what it is to see."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loadtest import faults


def test_a_short_run_finds_every_stream_told_and_every_engine_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--streams", "4", "--drained-streams", "4", "--repeats", "1", "--stall-timeout", "0.5"]
    assert faults.main([*flags, "--json", str(tmp_path / "faults.json")]) == 0
    found = json.loads((tmp_path / "faults.json").read_text())
    (killed,), (stopped,) = found["SIGKILL"], found["SIGSTOP"]
    assert killed["num_errors"] == stopped["num_errors"] == 4
    assert killed["error"] < 1.0
    assert killed["not_ready"] < 1.0
    assert 0.4 < stopped["error"] < 2.0
    assert found["SIGTERM"]["num_whole"] == 4
    assert "SIGTERM, 4 streams: 4 whole" in capsys.readouterr().out


def test_a_process_that_is_not_there_is_not_left() -> None:
    assert faults.is_left(os.getpid())
    assert not faults.is_left(2**22 + 1)
