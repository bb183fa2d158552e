"""`python -m loadtest diff OLD NEW --fail-on 5%`: what became worse from one report to the next."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.compare.report import Arrival, Cell, Interval, Report
from loadtest.compare.verdict import JUDGED, METRICS


@dataclass(frozen=True)
class Change:
    """Of one metric of one side under one load. `worse`: the share by which the median got worse; negative: better.

    apart  the intervals do not overlap
    """

    side: str
    workload: str
    arrival: Arrival
    metric: str
    old: Interval
    new: Interval
    worse: float
    apart: bool

    def fails(self, limit: float) -> bool:
        """Worse by more than `limit`, and not by chance."""
        return self.worse > limit and self.apart


def changes(old: Report, new: Report) -> list[Change]:
    """Of every cell that both have. ValueError where they have none in common."""
    before = {_key(cell): cell for cell in old.cells}
    found = []
    for cell in new.cells:
        if (other := before.get(_key(cell))) is not None:
            found += [_change(other, cell, name) for name in JUDGED if name in other.metrics and name in cell.metrics]
    if not found:
        raise ValueError("the two reports have no side and load in common: nothing can be compared")
    return found


def missing(old: Report, new: Report) -> list[str]:
    """Cells of `old` that `new` has not, or has without a valid run: nobody may lose one unseen."""
    have = {_key(cell) for cell in new.cells if cell.metrics}
    return [f"{cell.side}, {cell.workload}, {cell.arrival}" for cell in old.cells if _key(cell) not in have]


def _key(cell: Cell) -> tuple[str, str, Arrival]:
    return cell.side, cell.workload, cell.arrival


def _change(old: Cell, new: Cell, name: str) -> Change:
    before, after = old.metrics[name], new.metrics[name]
    sign = 1 if METRICS[name].more_is_better else -1
    if before.median:
        worse = sign * (1 - after.median / before.median)
    else:
        worse = 0.0 if after.median == before.median else -sign * float("inf")
    apart = after.high < before.low or after.low > before.high
    return Change(new.side, new.workload, new.arrival, name, before, after, worse, apart)


def parse_share(text: str) -> float:
    """0.05 from "5%" or "0.05". ValueError otherwise."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"expected a share such as 5%, found {text!r}")
    return value
