"""Medians over repeats with bootstrap intervals, and winners only where intervals are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from loadtest.compare.report import Cell, Interval, Run, Verdict, Versus
from loadtest.traffic.figures import Spread

RESAMPLES = 10_000
MIN_REPEATS = 3


@dataclass(frozen=True)
class Metric:
    """One number of a run. `scale` turns it into `unit` for people to read."""

    name: str
    unit: str
    more_is_better: bool
    of: Callable[[Run], float | None]
    scale: float = 1.0


def _spread(name: str, share: str) -> Callable[[Run], float | None]:
    def find(run: Run) -> float | None:
        spread: Spread | None = getattr(run.figures, name)
        value: float | None = None if spread is None else getattr(spread, share)
        return value

    return find


def _joules_per_token(run: Run) -> float | None:
    tokens = run.figures.output_tokens
    return None if run.joules is None or not tokens else run.joules / tokens


METRICS = {
    each.name: each
    for each in (
        Metric("output_per_second", "tokens/s", True, lambda run: run.figures.output_per_second),
        Metric("requests_per_second", "1/s", True, lambda run: run.figures.requests_per_second),
        Metric("per_user", "tokens/s", True, lambda run: run.figures.per_user),
        Metric("goodput", "1/s", True, lambda run: run.figures.goodput),
        Metric("attainment", "%", True, lambda run: run.figures.attainment, 100),
        *(
            Metric(f"{name}_{share}", "ms", False, _spread(name, share), 1000)
            for name in ("ttft", "gap", "tpot", "e2e")
            for share in ("p50", "p95", "p99")
        ),
        Metric("joules_per_token", "J", False, _joules_per_token),
    )
}
JUDGED = ("output_per_second", "goodput", "ttft_p95", "gap_p95", "e2e_p95", "joules_per_token")


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The median and 95 % of its bootstrap. Of three repeats that is the range from least to greatest."""
    found = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(np.median(found[draws], axis=1), (2.5, 97.5))
    return Interval(float(np.median(found)), float(low), float(high), len(found))


def cells(runs: Sequence[Run]) -> list[Cell]:
    """One for each side and load, in the order of their first runs."""
    found = []
    for side, workload, arrival in dict.fromkeys((run.side, run.workload, run.arrival) for run in runs):
        mine = [run for run in runs if (run.side, run.workload, run.arrival) == (side, workload, arrival)]
        valid = [run for run in mine if run.valid]
        metrics = {}
        for name, metric in METRICS.items():
            values = [value for run in valid if (value := metric.of(run)) is not None]
            if values:
                metrics[name] = interval(values)
        found.append(Cell(side, workload, arrival, metrics, len(mine) - len(valid)))
    return found


def verdicts(found: Sequence[Cell]) -> list[Verdict]:
    """For each load and each of JUDGED that at least two sides have."""
    judged = []
    for alike in _loads(found):
        for name in JUDGED:
            have = {cell.side: cell.metrics[name] for cell in alike if name in cell.metrics}
            if len(have) >= 2:
                winner, why = judge(have, METRICS[name])
                judged.append(Verdict(alike[0].workload, alike[0].arrival, name, winner, why))
    return judged


def versus(found: Sequence[Cell], baseline: str) -> list[Versus]:
    """Every other side against `baseline`, in each of JUDGED that both have."""
    pairs = []
    for alike in _loads(found):
        first = next((cell for cell in alike if cell.side == baseline), None)
        for cell in alike:
            if first is None or cell is first:
                continue
            for name in (name for name in JUDGED if name in cell.metrics and name in first.metrics):
                ours, theirs = cell.metrics[name], first.metrics[name]
                if not theirs.median:
                    continue  # nothing is any share of nothing
                winner, _ = judge({cell.side: ours, baseline: theirs}, METRICS[name])
                change, better = ours.median / theirs.median - 1, None if winner is None else winner == cell.side
                pairs.append(Versus(cell.side, baseline, cell.workload, cell.arrival, name, change, better))
    return pairs


def _loads(found: Sequence[Cell]) -> list[list[Cell]]:
    def load(cell: Cell) -> tuple[str, str, float]:
        return cell.workload, cell.arrival.kind, cell.arrival.value

    return [list(group) for _, group in groupby(sorted(found, key=load), key=load)]


def judge(have: dict[str, Interval], metric: Metric) -> tuple[str | None, str]:
    """The side whose whole interval is better than every other's, or None."""
    few = [side for side, each in have.items() if each.repeats < MIN_REPEATS]
    if few:
        return None, f"fewer than {MIN_REPEATS} valid repeats of {', '.join(few)}"
    sign = 1 if metric.more_is_better else -1
    ordered = sorted(have, key=lambda side: -sign * have[side].median)
    best, second = have[ordered[0]], have[ordered[1]]
    # the others need not be in the order of their bounds: whoever reaches furthest into the best one's interval counts
    rivals = {side: each for side, each in have.items() if side != ordered[0]}
    reach = max(rivals, key=lambda side: rivals[side].high if sign > 0 else -rivals[side].low)
    apart = best.low > rivals[reach].high if sign > 0 else best.high < rivals[reach].low
    if not apart:
        return None, f"the intervals of {ordered[0]} and {reach} overlap"
    if second.median == 0:
        return ordered[0], f"{ordered[1]} has none"
    return ordered[0], f"{100 * (best.median / second.median - 1):+.1f} % against {ordered[1]}"
