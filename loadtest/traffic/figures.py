"""Figures of one run. Failed requests are counted and never averaged in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from loadtest.traffic.call import Outcome

CURVE_POINTS = 101  # of a distribution, from its least to its greatest value


class SLO(msgspec.Struct, frozen=True):
    """What a request must keep to count as good: seconds to its first token, and mean seconds per later one."""

    ttft: float = 1.0
    tpot: float = 0.05

    def kept(self, outcome: Outcome) -> bool:
        if outcome.failure is not None:
            return False
        return outcome.ttft <= self.ttft and (outcome.tpot is None or outcome.tpot <= self.tpot)

    @classmethod
    def parse(cls, text: str) -> SLO:
        """From "ttft=1,tpot=0.05". ValueError says what was found and expected."""
        fields = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                fields[name.strip()] = float(value)
            except ValueError:
                fields = {"": 0.0}
        if not fields or set(fields) - {"ttft", "tpot"} or min(fields.values()) <= 0:
            raise ValueError(f"expected seconds as in ttft=1,tpot=0.05, found {text!r}")
        return cls(**fields)


class Spread(msgspec.Struct, frozen=True):
    """Of a quantity in seconds over a run's requests. None: another tool's file does not say."""

    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        found = np.percentile(values, (50, 90, 95, 99))
        return cls(float(np.mean(values)), *(float(value) for value in found))


class Figures(msgspec.Struct, frozen=True):
    """One run.

    seconds            from the first instant a request was due to the last answer's end
    output_per_second  tokens of whole answers, by the server's usage
    per_user           tokens a second that one user sees: 1 / mean TPOT
    goodput            whole answers a second that kept the SLO; None: another tool's file does not say
    attainment         share of all requests that kept it
    events_per_token   1 where every token came in an event of its own; else gaps are between events, not tokens
    ttft, gap, tpot, e2e    to the first token; between events; per later token of an answer; to the last byte
    ttft_curve, gap_curve   quantiles at equal steps, for plots
    short_answers      whole answers of fewer tokens than were asked for
    """

    requests: int
    failures: dict[str, int]
    seconds: float
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    requests_per_second: float
    output_per_second: float
    per_user: float | None
    goodput: float | None
    attainment: float | None
    events_per_token: float | None
    ttft: Spread | None
    gap: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    ttft_curve: list[float]
    gap_curve: list[float]
    short_answers: int = 0

    @property
    def whole(self) -> int:
        return self.requests - sum(self.failures.values())


def figures(outcomes: Sequence[Outcome], slo: SLO) -> Figures:
    """ValueError without a single outcome."""
    if not outcomes:
        raise ValueError("a run without requests has no figures")
    whole = [outcome for outcome in outcomes if outcome.failure is None]
    seconds = max(outcome.ended for outcome in outcomes) - min(outcome.due for outcome in outcomes)
    tokens = sum(outcome.completion_tokens or 0 for outcome in whole)
    gaps = [gap for outcome in whole for gap in outcome.gaps]
    tpots = [tpot for outcome in whole if (tpot := outcome.tpot) is not None]
    ttfts = [outcome.ttft for outcome in whole]
    good = sum(slo.kept(outcome) for outcome in whole)
    cached = [outcome.cached_tokens for outcome in whole if outcome.cached_tokens is not None]
    return Figures(
        requests=len(outcomes),
        failures=dict(Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)),
        seconds=seconds,
        prompt_tokens=sum(outcome.prompt_tokens or 0 for outcome in whole),
        cached_tokens=sum(cached) if cached else None,
        output_tokens=tokens,
        requests_per_second=len(whole) / seconds,
        output_per_second=tokens / seconds,
        per_user=1 / float(np.mean(tpots)) if tpots and np.mean(tpots) > 0 else None,
        goodput=good / seconds,
        attainment=good / len(outcomes),
        events_per_token=sum(len(outcome.arrivals) for outcome in whole) / tokens if tokens else None,
        ttft=Spread.of(ttfts),
        gap=Spread.of(gaps),
        tpot=Spread.of(tpots),
        e2e=Spread.of([outcome.e2e for outcome in whole]),
        ttft_curve=curve(ttfts),
        gap_curve=curve(gaps),
        short_answers=sum((outcome.completion_tokens or 0) < outcome.max_tokens for outcome in whole),
    )


def curve(values: Sequence[float]) -> list[float]:
    if not values:
        return []
    return [round(float(value), 6) for value in np.quantile(values, np.linspace(0, 1, CURVE_POINTS))]
