"""The client's figures are those of servers that know when they sent what."""

from __future__ import annotations

import pytest

from loadtest.neighbours import Neighbours
from loadtest.traffic.call import Outcome
from loadtest.traffic.drive import Traffic
from loadtest.traffic.truth import (
    LIMIT_P50_MS,
    Errors,
    against_clockwork,
    against_simulated,
    clockwork_truth,
    simulated_truth,
)
from loadtest.traffic.watch import Condition

GOOD = Condition(1.0, 2.0, 1.0, 0.1)


def test_errors_of_the_client_are_found():
    outcome = Outcome(due=1.0, sent=1.002, arrivals=[1.503, 1.601], ended=1.7, completion_tokens=2, answer_id="a")
    server = {"a": {"id": "a", "arrived": 1.002, "stamps": [1.502, 1.602]}}
    first, gap = against_clockwork(Traffic([outcome], GOOD), server)
    assert first.p50 == pytest.approx(3.0)  # sent 2 ms late, seen 1 ms late
    assert gap.p50 == pytest.approx(2.0)
    logged = {"a": {"ttft_seconds": 0.4, "first_byte_seconds": 0.5, "duration_seconds": 0.6, "output_tokens": 2}}
    first, gap, whole, around = against_simulated([outcome], logged)
    assert first.p50 == pytest.approx(3.0)  # of them 2 ms late on its way
    assert gap.p50 == pytest.approx(2.0)
    assert whole.p50 == pytest.approx(100.0)
    assert around.p50 == pytest.approx(100.0)
    assert around.kept  # the server's own, whatever it is
    assert not whole.kept


def test_errors_beyond_either_limit_are_not_kept():
    assert Errors("x", 0.9, 4.9).kept
    assert not Errors("x", 1.1, 4.9).kept
    assert not Errors("x", 0.9, 5.1).kept


def test_an_answer_that_failed_or_that_the_server_does_not_know_ends_it():
    with pytest.raises(RuntimeError, match="1 requests failed, the first with: HTTP 500"):
        against_simulated([Outcome(0.0, failure="HTTP 500")], {})
    with pytest.raises(RuntimeError, match="wrote nothing down of 1 answers"):
        against_simulated([Outcome(0.0, answer_id="b")], {})


@pytest.mark.parametrize("measure", [clockwork_truth, simulated_truth])
def test_the_client_tells_the_truth(measure):
    """At the full rate and length: `python -m loadtest truth` (docs/loadtest.md). Here the machine may be busy."""
    for _ in range(3):
        neighbours = Neighbours()
        found = measure(rate=20, seconds=1.5, gap_seconds=0.01, tokens=6) if measure is clockwork_truth else measure(
            rate=20, seconds=1.5, step_seconds=0.01, tokens=6
        )  # fmt: skip
        gap = found.errors[1]
        assert found.requests > 10
        # what it sees between tokens is the server's pace, whoever else is on the machine
        if found.errors[0].p50 <= 5 * LIMIT_P50_MS and gap.p50 <= LIMIT_P50_MS:
            return
    busy = neighbours.cores() or 0.0
    if busy > 0.5 or found.condition.complaints():
        pytest.skip(f"others use {busy:.1f} cores of this machine: client and server wait for them, not for each other")
    raise AssertionError(found.text())
