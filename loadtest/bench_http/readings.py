"""What one run gave, and two tables of many: medians over the rounds, ours beside the bare app's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Streamed:
    """One run of N streams. `cpu_seconds` are those of the server's process; lag None: that server exports none."""

    side: str
    streams: int
    tokens: int
    seconds: float
    cpu_seconds: float
    first_ms_median: float
    lag_p99_ms: float | None

    @property
    def us_per_token(self) -> float:
        return 1e6 * self.cpu_seconds / self.tokens


@dataclass(frozen=True)
class Short:
    """Unstreamed requests for one token, closed loop."""

    side: str
    requests: int
    seconds: float
    cpu_seconds: float


def table(streamed: Sequence[Streamed], short: Sequence[Short]) -> str:
    """Markdown."""
    lines = [
        "| streams | server | CPU us per token | tokens/s | cores busy | first token, ms | loop lag p99, ms |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in dict.fromkeys(s.streams for s in streamed):
        for side in dict.fromkeys(s.side for s in streamed):
            runs = [s for s in streamed if (s.streams, s.side) == (count, side)]
            lags = [s.lag_p99_ms for s in runs if s.lag_p99_ms is not None]
            figures = (
                f"{statistics.median(s.us_per_token for s in runs):.1f}",
                f"{statistics.median(s.tokens / s.seconds for s in runs):,.0f}",
                f"{statistics.median(s.cpu_seconds / s.seconds for s in runs):.2f}",
                f"{statistics.median(s.first_ms_median for s in runs):.0f}",
                f"<= {max(lags):.0f}" if lags else "",
            )
            lines.append(f"| {count} | {side} | {' | '.join(figures)} |")
    lines += ["", "| server | short requests/s | CPU us per request |", "| --- | ---: | ---: |"]
    for side in dict.fromkeys(s.side for s in short):
        some = [s for s in short if s.side == side]
        rate = statistics.median(s.requests / s.seconds for s in some)
        cost = statistics.median(1e6 * s.cpu_seconds / s.requests for s in some)
        lines.append(f"| {side} | {rate:,.0f} | {cost:.0f} |")
    return "\n".join(lines)
