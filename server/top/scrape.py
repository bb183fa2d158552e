"""Reading a running server: /metrics as samples, what changed between two scrapes, and the precision report."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from nvfp4_runtime.errors import NVFP4Error

TIMEOUT_SECONDS = 5.0
Labels = frozenset[tuple[str, str]]


class ScrapeError(NVFP4Error):
    """The server cannot be read: where, and why."""


@dataclass(frozen=True)
class Scrape:
    """/metrics at one moment. `samples[name]`: values by their labels."""

    moment: float
    samples: dict[str, dict[Labels, float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, moment: float) -> Scrape:
        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return cls(moment, samples)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of `name` that have these labels; 0 without any."""
        wanted = frozenset(labels.items())
        return sum(value for own, value in self.samples.get(name, {}).items() if wanted <= own)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Samples of `name` by one label's values."""
        found: dict[str, float] = {}
        for own, value in self.samples.get(name, {}).items():
            key = dict(own).get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found


@dataclass(frozen=True)
class Change:
    """What happened between two scrapes. A counter that fell was reset: the server was started anew."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        return max(1e-9, self.after.moment - self.before.moment)

    def count(self, name: str, **labels: str) -> float:
        """By how much a counter grew."""
        now, then = self.after.total(name, **labels), self.before.total(name, **labels)
        return now - then if now >= then else now

    def rate(self, name: str, **labels: str) -> float:
        return self.count(name, **labels) / self.seconds

    def share(self, part: str, whole: str) -> float | None:
        """Growth of one counter in that of another; None where the other did not grow."""
        grown = self.count(whole)
        return self.count(part) / grown if grown else None

    def percentile(self, name: str, q: float) -> float | None:
        """The value below which a share `q` of a histogram's new observations lie, linear within its bucket.

        None without new observations; the last finite bound where they lie beyond it.
        """
        now, then = (self._buckets(scrape, name) for scrape in (self.after, self.before))
        grown = [(bound, max(0.0, count - then.get(bound, 0.0))) for bound, count in sorted(now.items())]
        if not grown or grown[-1][1] == 0:
            return None
        rank = q * grown[-1][1]
        for (low, below), (high, upto) in pairwise([(0.0, 0.0), *grown]):
            if upto >= rank and upto > below:
                return low if high == float("inf") else low + (high - low) * (rank - below) / (upto - below)
        return None

    def finest(self, name: str) -> float:
        """A histogram's first bound: below it, it tells nothing apart. 0 where there is no such histogram."""
        return min(self._buckets(self.after, name), default=0.0)

    @staticmethod
    def _buckets(scrape: Scrape, name: str) -> dict[float, float]:
        return {float(bound): count for bound, count in scrape.by(f"{name}_bucket", "le").items()}


class Server:
    """A server by its URL; `key` is sent as its API key. Goes through no proxy."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def scrape(self) -> Scrape:
        text = self._get("/metrics")
        try:
            return Scrape.parse(text.decode("utf-8"), time.monotonic())
        except ValueError as error:
            raise ScrapeError(f"{self.url}/metrics is not in Prometheus' text format: {error}") from error

    def precision(self) -> dict[str, Any]:
        try:
            found = json.loads(self._get("/v1/precision"))
        except ValueError as error:
            raise ScrapeError(f"{self.url}/v1/precision is no JSON: {error}") from error
        if not isinstance(found, dict) or found.get("object") != "precision_report":
            raise ScrapeError(f"{self.url}/v1/precision is no precision report: is this an nvfp4 server?")
        return found

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            hint = "; give its key with --api-key-file" if error.code == 401 else ""
            raise ScrapeError(f"{self.url}{path} answered {error.code}{hint}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ScrapeError(f"{self.url}{path}: {getattr(error, 'reason', None) or error}") from error
