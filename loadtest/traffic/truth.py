"""`python -m loadtest truth`: does the client tell the truth? Asked of a server whose every step takes a known time.

`nvfp4 serve --simulate` logs, for every answer, how long its first token and the whole took by the server's own clock.
The client's figures for the same answers, found by their ids, may differ by what a request needs to get there and back.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.server_process import nvfp4_server
from loadtest.traffic.call import Conversation, Outcome
from loadtest.traffic.drive import Progress, Traffic, open_loop, run
from loadtest.traffic.watch import Condition
from loadtest.traffic.wire import Endpoint
from loadtest.traffic.workloads import at_instants, conversations, find_workload, poisson

LIMIT_P50_MS, LIMIT_P99_MS = 1.0, 5.0
SCRIPT = "The same words over and over. "  # one byte a token, and each of them visible text


@dataclass(frozen=True)
class Errors:
    """Client minus server, absolute, ms."""

    what: str
    p50: float
    p99: float

    @property
    def kept(self) -> bool:
        return self.p50 <= LIMIT_P50_MS and self.p99 <= LIMIT_P99_MS

    @classmethod
    def of(cls, what: str, differences: Sequence[float]) -> Errors:
        values = 1000 * np.abs(differences)
        return cls(what, float(np.percentile(values, 50)), float(np.percentile(values, 99)))


@dataclass(frozen=True)
class Truth:
    """One run. The client's own `condition` says whether its figures may be used at all."""

    requests: int
    rate: float
    errors: tuple[Errors, ...]
    condition: Condition

    @property
    def kept(self) -> bool:
        return all(error.kept for error in self.errors)

    def text(self) -> str:
        lines = [
            f"{self.requests} requests at {self.rate:g} a second",
            "| | p50, ms | p99, ms |",
            "| --- | ---: | ---: |",
        ]
        lines += [f"| {error.what} | {error.p50:.2f} | {error.p99:.2f} |" for error in self.errors]
        lines += ["", *(f"invalid: {why}" for why in self.condition.complaints())]
        verdict = "within" if self.kept else "NOT within"
        lines.append(f"{verdict} {LIMIT_P50_MS:g} ms p50 and {LIMIT_P99_MS:g} ms p99")
        return "\n".join(line for line in lines if line or lines.index(line) != len(lines) - 2)


def simulated_traffic(
    rate: float, seconds: float, step_seconds: float, tokens: int, progress: Progress | None = None
) -> tuple[Traffic, dict[str, dict[str, float]]]:
    """A run at a simulated engine, and the server's log lines about it by answer id."""
    flags = ["--simulate", "--simulate-script", SCRIPT, "--simulate-step-seconds", str(step_seconds)]
    flags += ["--max-num-seqs", "512", "--max-num-batched-tokens", "16384", "--log-format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with nvfp4_server(flags, {}, 60, log) as server:
            source = conversations(find_workload(f"4/{tokens}"), "truth")
            warm = [Conversation((next(source).calls[0],), at=0.02 * i) for i in range(20)]
            endpoint = Endpoint(server.url, "simulated")
            run(open_loop(endpoint, warm))
            traffic = run(open_loop(endpoint, at_instants(source, poisson(rate, seconds, "truth")), progress))
        return traffic, _logged(log)


def _logged(log: Path) -> dict[str, dict[str, float]]:
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line) if line.startswith("{") else {}
        if "ttft_seconds" in fields:
            found[fields["id"]] = fields
    return found


def compare(outcomes: Sequence[Outcome], logged: dict[str, dict[str, float]]) -> tuple[Errors, ...]:
    """RuntimeError where an answer failed or the server knows nothing of it."""
    failed = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    unknown = [outcome.answer_id for outcome in outcomes if outcome.answer_id not in logged]
    if unknown:
        raise RuntimeError(f"the server's log has no line for {len(unknown)} answers, such as {unknown[0]}")
    first, gaps, whole = [], [], []
    for outcome in outcomes:
        server = logged[outcome.answer_id]
        first.append(outcome.ttft - server["ttft_seconds"])
        whole.append(outcome.e2e - server["duration_seconds"])
        decode = server["duration_seconds"] - server["ttft_seconds"]
        assert outcome.tpot is not None
        gaps.append(outcome.tpot - decode / (server["output_tokens"] - 1))
    return Errors.of("time to first token", first), Errors.of("time per later token", gaps), Errors.of("whole", whole)


def measure(rate: float, seconds: float, step_seconds: float, tokens: int, progress: Progress | None = None) -> Truth:
    traffic, logged = simulated_traffic(rate, seconds, step_seconds, tokens, progress)
    return Truth(len(traffic.outcomes), rate, compare(traffic.outcomes, logged), traffic.condition)
