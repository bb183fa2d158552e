"""The event loop's lag as the server itself exports it: a histogram of how late its timer fires."""

from __future__ import annotations

import re

import httpx

_BUCKET = re.compile(r'^nvfp4_event_loop_lag_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)


def scrape(url: str) -> dict[float, float]:
    """Cumulative counts by upper bound in seconds. Raises RuntimeError when the server has no such metric."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    counts = {float(bound): float(count) for bound, count in _BUCKET.findall(text)}
    if not counts:
        raise RuntimeError("the server exports no nvfp4_event_loop_lag_seconds")
    return counts


def lag_p99_ms(before: dict[float, float], after: dict[float, float]) -> float | None:
    """The upper bound, in ms, of the bucket that holds the 99th percentile between two scrapes; None without timers."""
    grown = sorted((bound, after[bound] - before.get(bound, 0.0)) for bound in after)
    total = grown[-1][1]
    if total <= 0:
        return None
    return next(1000 * bound for bound, count in grown if count >= 0.99 * total)
