"""Parts as child processes: findings kept, faults and time limits told, nothing left running."""

from __future__ import annotations

import time

from loadtest.bench_gpu.children import Budget, run_part

MODULE = "tests.loadtest.bench_gpu.child"


def test_findings_come_back_and_other_lines_are_not_taken_for_findings():
    outcome = run_part("x", MODULE, ["good"], Budget(60), 30)
    assert outcome.trouble == ""
    assert outcome.rows == [{"part": "x", "value": 1}, {"part": "x", "value": 2}]


def test_what_was_found_before_a_fault_is_kept_and_the_fault_is_told():
    outcome = run_part("x", MODULE, ["fault"], Budget(60), 30)
    assert outcome.rows == [{"part": "x", "value": 1}]
    assert "code 3" in outcome.trouble
    assert "illegal memory access" in outcome.trouble


def test_a_part_that_hangs_is_stopped_with_its_children():
    started = time.monotonic()
    outcome = run_part("x", MODULE, ["hang"], Budget(60), 2, least=0.1)
    assert time.monotonic() - started < 20
    assert "stopped after 2 s" in outcome.trouble
    assert outcome.rows[0]["value"] == 1
    pid = outcome.rows[1]["pid"]
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet collected does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_started_when_the_budget_is_spent():
    outcome = run_part("x", MODULE, ["good"], Budget(0), 30)
    assert outcome.rows == []
    assert "not started" in outcome.trouble
