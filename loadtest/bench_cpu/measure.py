"""Turns and limits: every reading of every side has the machine's limits measured right before and right after it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Limits = dict[str, float]  # "read" in bytes per second, "vnni", "bf16", "fma" in operations per second


@dataclass(frozen=True)
class Figure:
    """decode: `batch` sequences, `tokens` each after a short prompt. prefill: one prompt of `tokens`."""

    leg: str
    tokens: int
    batch: int = 1
    prompt_tokens: int = 16

    @property
    def name(self) -> str:
        return f"prefill {self.tokens}" if self.leg == "prefill" else f"decode {self.batch}"


class Side(Protocol):
    @property
    def name(self) -> str: ...

    def measure(self, figure: Figure) -> float:
        """Tokens per second, all sequences together."""
        ...


@dataclass(frozen=True)
class Reading:
    """One side's tokens/s in one round, and the mean of the limits before and after it."""

    side: str
    figure: str
    value: float
    limits: Limits


@dataclass(frozen=True)
class Summary:
    """All rounds of one side and figure. `limits` are medians; `ratios` are one per reading, if a limit applies.

    spread  lowest and highest reading
    """

    side: str
    figure: str
    value: float
    spread: tuple[float, float]
    limits: Limits
    ratio: float | None


def measure(
    sides: Sequence[Side],
    figures: Iterable[Figure],
    rounds: int,
    limits: Callable[[], Limits],
    say: Callable[[str], None],
) -> list[Reading]:
    """Every side's every figure, `rounds` times, sides in turn."""
    readings = []
    figures = list(figures)
    before = limits()
    for turn in range(rounds):
        for figure in figures:
            for side in sides:
                value = side.measure(figure)
                after = limits()
                say(f"round {turn + 1} of {rounds}: {figure.name:>12}  {side.name:28} {value:8.1f} tokens/s")
                around = {name: (before[name] + after[name]) / 2 for name in after}
                readings.append(Reading(side.name, figure.name, value, around))
                before = after
    return readings


def summarise(readings: Sequence[Reading], ratio: Callable[[Reading], float | None]) -> list[Summary]:
    """One Summary per side and figure, in order of first appearance. `ratio`: a reading's share of its limit."""
    groups: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        groups.setdefault((reading.side, reading.figure), []).append(reading)
    summaries = []
    for (side, figure), group in groups.items():
        values = [reading.value for reading in group]
        ratios = [r for reading in group if (r := ratio(reading)) is not None]
        summaries.append(
            Summary(
                side,
                figure,
                statistics.median(values),
                (min(values), max(values)),
                {name: statistics.median(r.limits[name] for r in group) for name in group[0].limits},
                statistics.median(ratios) if ratios else None,
            )
        )
    return summaries


def limit_spread(readings: Sequence[Reading]) -> dict[str, tuple[float, float, float]]:
    """Lowest, median and highest of each limit over a whole run: how much the machine itself wandered."""
    spread = {}
    for name in readings[0].limits if readings else ():
        values = [reading.limits[name] for reading in readings]
        spread[name] = (min(values), statistics.median(values), max(values))
    return spread
