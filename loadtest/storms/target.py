"""The server under the storm: its own process, what it says of itself (/metrics) and what the kernel says (/proc)."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.server_process import nvfp4_server
from loadtest.storms.connection import GONE, ask, head, post

IDLE_SECONDS = 5.0  # in which nothing may be left of requests whose clients went away
REFERENCE_PROMPT = "The same words, before and after."
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")


@dataclass(frozen=True)
class Footprint:
    """Of the server's process and its descendants: resident bytes, open files, threads."""

    rss_bytes: int
    num_files: int
    num_threads: int


@dataclass
class Metrics:
    """One scrape: samples by name, each (labels, value)."""

    samples: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    def total(self, name: str, labels: str = "") -> float:
        """Sum over the samples of `name` whose labels contain `labels`. KeyError where the metric is not there."""
        return sum(value for found, value in self.samples[name] if labels in found)

    def since(self, before: Metrics, name: str, labels: str = "") -> float:
        """By how much `total` grew."""
        return self.total(name, labels) - before.total(name, labels)

    def buckets(self, name: str) -> dict[float, float]:
        """Cumulative counts by upper bound."""
        found: dict[float, float] = {}
        for labels, value in self.samples[f"{name}_bucket"]:
            bound = float(labels.split('le="')[1].split('"')[0])
            found[bound] = found.get(bound, 0.0) + value
        return found


def parse_metrics(text: str) -> Metrics:
    """Prometheus' text format."""
    metrics = Metrics()
    for line in text.splitlines():
        if (match := _SAMPLE.match(line)) is not None:
            name, labels, value = match.groups()
            metrics.samples.setdefault(name, []).append((labels or "", float(value)))
    return metrics


def histogram_percentile(before: Metrics, after: Metrics, name: str, share: float) -> float:
    """The upper bound of the bucket that holds the percentile of what was observed between two scrapes."""
    old, new = before.buckets(name), after.buckets(name)
    counts = {bound: count - old.get(bound, 0.0) for bound, count in sorted(new.items())}
    total = max(counts.values())
    return next(bound for bound, count in counts.items() if count >= share * total)


@dataclass(frozen=True)
class Target:
    port: int
    pid: int
    log: Path

    async def metrics(self) -> Metrics:
        reply = await ask(self.port, head("GET", "/metrics", {"connection": "close"}))
        if reply.status != 200:
            raise RuntimeError(f"/metrics answered {reply.status}")
        return parse_metrics(reply.body.decode())

    async def seconds_to_idle(self, limit: float = 60.0) -> float:
        """Until nothing runs or waits and no KV block is held; `limit` if that does not come."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < limit:
            metrics = await self.metrics()
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "nvfp4_kv_cache_used_blocks")
            if not any(metrics.total(name) for name in names):
                return waited
            await asyncio.sleep(0.05)
        return limit

    async def greedy(self, prompt: str = REFERENCE_PROMPT, max_tokens: int = 24) -> str:
        """The greedy continuation. RuntimeError where there is none."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        reply = await ask(self.port, post("/v1/completions", body, {"connection": "close"}))
        if reply.status != 200:
            raise RuntimeError(f"a plain request was answered with {reply.status}: {reply.body[:300]!r}")
        text: str = reply.json()["choices"][0]["text"]
        return text

    async def answers(self) -> bool:
        try:
            await self.greedy(max_tokens=1)
            return True
        except (RuntimeError, *GONE):
            return False

    def processes(self) -> list[int]:
        """The server's pid and its descendants'."""
        found = [self.pid]
        for pid in found:  # grows while it is walked
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split()]
        return found

    def footprint(self) -> Footprint:
        rss = files = threads = 0
        for pid in self.processes():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            except OSError:
                continue  # it ended between the listing and the look
            fields = dict(line.split(":", 1) for line in status.splitlines())
            rss += int(fields.get("VmRSS", "0 kB").split()[0]) << 10
            threads += int(fields["Threads"])
        return Footprint(rss, files, threads)

    def log_lines(self) -> int:
        with self.log.open("rb") as lines:
            return sum(1 for _ in lines)


@contextmanager
def target(flags: Sequence[str], ready_seconds: float = 120.0) -> Iterator[Target]:
    """`nvfp4 serve FLAGS` on a free port until the block ends. RuntimeError when it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with nvfp4_server(flags, {}, ready_seconds, log) as server:
            yield Target(int(server.url.rsplit(":", 1)[1]), server.pid, log)
