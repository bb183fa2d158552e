"""Winners are named only where intervals are apart, and only from enough valid runs."""

from __future__ import annotations

import pytest

from loadtest.compare.report import Interval
from loadtest.compare.verdict import METRICS, cells, interval, judge, verdicts, versus
from tests.loadtest.compare.made import run

FASTER, LATER = METRICS["output_per_second"], METRICS["ttft_p95"]


def test_an_interval_holds_the_median_and_of_three_repeats_reaches_over_all():
    found = interval([3.0, 1.0, 2.0])
    assert (found.low, found.median, found.high, found.repeats) == (1.0, 2.0, 3.0, 3)
    many = interval([float(i) for i in range(101)])
    assert many.median == 50
    assert 30 < many.low < 50 < many.high < 70


def test_a_winner_needs_its_whole_interval_beyond_everybodys():
    apart = {"a": Interval(10, 9, 11, 3), "b": Interval(7, 6, 8, 3), "c": Interval(5, 4, 6, 3)}
    assert judge(apart, FASTER) == ("a", "+42.9 % against b")
    assert judge(apart, LATER)[0] is None  # there the least is best, and c and b touch
    wide = apart | {"c": Interval(5, 1, 9.5, 3)}  # the third reaches into the first, though the second does not
    assert judge(wide, FASTER) == (None, "the intervals of a and c overlap")


def test_touching_intervals_have_no_winner():
    assert judge({"a": Interval(10, 9, 11, 3), "b": Interval(8, 7, 9, 3)}, FASTER)[0] is None


def test_less_is_better_where_it_is_latency():
    have = {"a": Interval(0.5, 0.4, 0.6, 3), "b": Interval(0.9, 0.7, 1.0, 3)}
    assert judge(have, LATER) == ("a", "-44.4 % against b")


def test_too_few_repeats_have_no_winner():
    have = {"a": Interval(10, 9, 11, 2), "b": Interval(5, 4, 6, 3)}
    assert judge(have, FASTER) == (None, "fewer than 3 valid repeats of a")


def test_invalid_runs_take_part_in_nothing():
    runs = [run("a", pace, visit) for visit, pace in enumerate((0.01, 0.011, 0.012))]
    (cell,) = cells([*runs, run("a", 5.0, 3, complaints=("client stalled: x",))])
    assert cell.invalid == 1
    assert cell.metrics["tpot_p50"].repeats == 3
    assert cell.metrics["tpot_p50"].high == pytest.approx(0.012)


def test_each_load_is_judged_by_itself():
    runs = [run(label, pace + 0.001 * i, i) for label, pace in (("a", 0.01), ("b", 0.05)) for i in range(3)]
    found = {verdict.metric: verdict.winner for verdict in verdicts(cells(runs))}
    assert found["output_per_second"] == found["gap_p95"] == found["e2e_p95"] == "a"
    assert found["ttft_p95"] is None  # 0.2 s both


def test_every_side_stands_against_the_first_though_nobody_wins():
    paces = {"base": 0.05, "one": 0.0101, "two": 0.01}
    runs = [run(label, pace + 0.001 * i, i) for label, pace in paces.items() for i in range(3)]
    assert {verdict.winner for verdict in verdicts(cells(runs))} == {None}  # one and two overlap
    found = {(each.side, each.metric): each for each in versus(cells(runs), "base")}
    assert found["one", "gap_p95"].better is found["two", "gap_p95"].better is True
    assert found["two", "gap_p95"].change == pytest.approx(0.011 / 0.051 - 1)
    assert found["one", "ttft_p95"].better is None
