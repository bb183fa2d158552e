"""`python -m loadtest truth`: does the client tell the truth? Its figures beside those of whoever answered.

Two servers are asked. Clockwork (clockwork.py) does nothing but keep time, and writes down when it really sent each
event: what the client says of it is the client's own error. The simulated engine is our server with steps of a known
length; it logs the seconds from a request's first byte to its answer's first one and to its last, stamped where the
bytes are read from and written to the socket. What of the first token was HTTP's, the template's and the tokenizer's
time, beside the engine's, is the server's and not the client's error: it is shown and not judged.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.server_process import nvfp4_server, running
from loadtest.traffic.call import Conversation, Outcome
from loadtest.traffic.drive import Progress, Traffic, open_loop, run
from loadtest.traffic.watch import Condition
from loadtest.traffic.wire import Endpoint
from loadtest.traffic.workloads import at_instants, conversations, find_workload, poisson

LIMIT_P50_MS, LIMIT_P99_MS = 1.0, 5.0
SCRIPT = "The same words over and over. "  # one byte a token, and each of them visible text
WARM_CALLS = 20
Logged = dict[str, dict[str, Any]]  # what the server wrote down, by the answer's id


@dataclass(frozen=True)
class Errors:
    """Client minus server, absolute, ms."""

    what: str
    p50: float
    p99: float
    judged: bool = True

    @property
    def kept(self) -> bool:
        return not self.judged or (self.p50 <= LIMIT_P50_MS and self.p99 <= LIMIT_P99_MS)

    @classmethod
    def of(cls, what: str, differences: Sequence[float], judged: bool = True) -> Errors:
        values = 1000 * np.abs(differences)
        return cls(what, float(np.percentile(values, 50)), float(np.percentile(values, 99)), judged)


@dataclass(frozen=True)
class Truth:
    """One run. The client's own `condition` says whether its figures may be used at all."""

    server: str
    requests: int
    rate: float
    errors: tuple[Errors, ...]
    condition: Condition

    @property
    def kept(self) -> bool:
        return all(error.kept for error in self.errors)

    def text(self) -> str:
        lines = [f"{self.server}: {self.requests} requests at {self.rate:g} a second", ""]
        lines += ["| client minus server | p50, ms | p99, ms |", "| --- | ---: | ---: |"]
        lines += [f"| {error.what} | {error.p50:.2f} | {error.p99:.2f} |" for error in self.errors]
        lines += ["", *(f"invalid: {why}" for why in self.condition.complaints())]
        verdict = "within" if self.kept else "NOT within"
        return "\n".join([*lines, f"{verdict} {LIMIT_P50_MS:g} ms p50 and {LIMIT_P99_MS:g} ms p99"])


def clockwork_truth(
    rate: float, seconds: float, gap_seconds: float, tokens: int, progress: Progress | None = None
) -> Truth:
    """First events after two gaps."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "answers.jsonl"
        program = [sys.executable, "-m", "loadtest.traffic.clockwork"]
        with running(
            lambda port: [*program, str(port), str(2 * gap_seconds), str(gap_seconds), str(log)],
            {}, 30, Path(folder) / "server.log",
        ) as server:  # fmt: skip
            traffic = _traffic(Endpoint(server.url, "clockwork"), rate, seconds, tokens, progress)
        errors = against_clockwork(traffic, _logged(log, "stamps"))
    return Truth("clockwork", len(traffic.outcomes), rate, errors, traffic.condition)


def simulated_truth(
    rate: float, seconds: float, step_seconds: float, tokens: int, progress: Progress | None = None
) -> Truth:
    flags = ["--simulate", "--simulate-script", SCRIPT, "--simulate-step-seconds", str(step_seconds)]
    flags += ["--max-num-seqs", "512", "--max-num-batched-tokens", "16384", "--log-format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with nvfp4_server(flags, {}, 60, log) as server:
            traffic = _traffic(Endpoint(server.url, "simulated"), rate, seconds, tokens, progress)
        errors = against_simulated(traffic.outcomes, _logged(log, "first_byte_seconds"))
    return Truth("simulated engine", len(traffic.outcomes), rate, errors, traffic.condition)


def _traffic(endpoint: Endpoint, rate: float, seconds: float, tokens: int, progress: Progress | None) -> Traffic:
    source = conversations(find_workload(f"4/{tokens}"), "truth")
    run(open_loop(endpoint, [Conversation((next(source).calls[0],), at=0.02 * i) for i in range(WARM_CALLS)]))
    return run(open_loop(endpoint, at_instants(source, poisson(rate, seconds, "truth")), progress))


def _logged(log: Path, field: str) -> Logged:
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line) if line.startswith("{") else {}
        if field in fields:
            found[fields["id"]] = fields
    return found


def against_clockwork(traffic: Traffic, logged: Logged) -> tuple[Errors, ...]:
    """TTFT counts from when a request was due: sending it late is an error as well. RuntimeError as `_both`."""
    first, gaps = [], []
    for outcome, server in _both(traffic.outcomes, logged):
        stamps = server["stamps"]
        if len(stamps) != len(outcome.arrivals):
            raise RuntimeError(f"{len(stamps)} events were sent and {len(outcome.arrivals)} counted")
        first.append(outcome.ttft - (stamps[0] - server["arrived"]))
        sent = [after - before for before, after in itertools.pairwise(stamps)]
        gaps += [seen - true for seen, true in zip(outcome.gaps, sent, strict=True)]
    return Errors.of("time to first token", first), Errors.of("gap between tokens", gaps)


def against_simulated(outcomes: Sequence[Outcome], logged: Logged) -> tuple[Errors, ...]:
    """The chunk before the first text leaves with it, so the answer's first byte is its first token's. RuntimeError as
    `_both`."""
    first, gaps, whole, around = [], [], [], []
    for outcome, server in _both(outcomes, logged):
        first.append(outcome.ttft - server["first_byte_seconds"])
        whole.append(outcome.e2e - server["duration_seconds"])
        decode = server["duration_seconds"] - server["first_byte_seconds"]
        assert outcome.tpot is not None
        gaps.append(outcome.tpot - decode / (server["output_tokens"] - 1))
        around.append(server["first_byte_seconds"] - server["ttft_seconds"])
    return (
        Errors.of("time to first token", first),
        Errors.of("time per later token", gaps),
        Errors.of("whole answer", whole),
        Errors.of("not the client's: the server's own time to first token beyond its engine's", around, judged=False),
    )


def _both(outcomes: Sequence[Outcome], logged: Logged) -> list[tuple[Outcome, dict[str, Any]]]:
    """RuntimeError where an answer failed or the server wrote nothing down of it."""
    failed = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    unknown = [outcome.answer_id for outcome in outcomes if outcome.answer_id not in logged]
    if unknown:
        raise RuntimeError(f"the server wrote nothing down of {len(unknown)} answers, such as {unknown[0]!r}")
    return [(outcome, logged[outcome.answer_id]) for outcome in outcomes]
