"""Figures by hand: failures are counted and never averaged, goodput is what kept both limits."""

from __future__ import annotations

import pytest

from loadtest.traffic.call import Outcome
from loadtest.traffic.figures import SLO, figures


def outcome(due: float, arrivals: list[float], tokens: int, failure: str | None = None) -> Outcome:
    return Outcome(
        due, sent=due, arrivals=arrivals, ended=arrivals[-1] if arrivals else due + 9.0, prompt_tokens=10,
        completion_tokens=tokens, failure=failure,
    )  # fmt: skip


def test_figures_of_a_run():
    runs = [
        outcome(0.0, [0.5, 0.6, 0.7], 3),  # good: 0.5 s, 0.1 s a token
        outcome(1.0, [3.0, 3.1, 3.2], 3),  # first token too late
        outcome(1.5, [2.0, 2.5, 3.0], 3),  # tokens too slow
        outcome(2.0, [], 0, "HTTP 429"),
        outcome(2.0, [2.1], 1),  # good: one token has no pace
    ]
    found = figures(runs, SLO(ttft=1.0, tpot=0.2))
    assert (found.requests, found.whole, found.failures) == (5, 4, {"HTTP 429": 1})
    assert found.seconds == 11.0  # the failed one ended last
    assert found.output_tokens == 10
    assert found.output_per_second == pytest.approx(10 / 11)
    assert found.goodput == pytest.approx(2 / 11)
    assert found.attainment == pytest.approx(2 / 5)
    assert found.ttft is not None
    assert found.ttft.p50 == pytest.approx(0.5)
    assert found.gap is not None
    assert found.gap.mean == pytest.approx((0.1 * 4 + 0.5 * 2) / 6)
    assert found.events_per_token == 1.0
    assert found.ttft_curve[0] == pytest.approx(0.1)
    assert found.ttft_curve[-1] == pytest.approx(2.0)


def test_several_tokens_in_one_event_show():
    found = figures([outcome(0.0, [1.0, 2.0], 8)], SLO())
    assert found.events_per_token == 0.25
    assert found.tpot is not None
    assert found.tpot.p50 == pytest.approx(1 / 7)


def test_a_run_where_everything_failed_has_no_latencies():
    found = figures([outcome(0.0, [], 0, "HTTP 503")], SLO())
    assert (found.whole, found.ttft, found.goodput, found.per_user) == (0, None, 0.0, None)


def test_no_run_at_all_is_refused():
    with pytest.raises(ValueError, match="without requests"):
        figures([], SLO())


@pytest.mark.parametrize("text", ["", "ttft", "ttft=0,tpot=1", "itl=3", "ttft=a"])
def test_an_slo_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValueError, match="expected seconds"):
        SLO.parse(text)


def test_an_slo_is_read():
    assert SLO.parse("ttft=0.3, tpot=0.025") == SLO(0.3, 0.025)
