"""`python -m loadtest.overload`: more requests than can be served, at a rate that does not wait for answers.

Starts `nvfp4 serve --simulate`, measures its capacity with as many clients as it serves at once, then offers multiples
of it in an open loop: seeded exponential gaps, every request on a connection of its own, times counted from the instant
a request was due, whenever it could be sent. Prints, per multiple, the goodput (whole answers per second that came
within --slo seconds), the refusals and how fast they were given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loadtest.neighbours import BUSY_CORES, Neighbours
from loadtest.server_process import nvfp4_server

MAX_SEND_LAG_MS = 20.0  # a client that sends later than this measures itself
DRAIN_SECONDS = 60.0


@dataclass
class Answer:
    """One request: seconds from when it was due until it was sent, and until its answer's first and last byte."""

    due: float
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    status: int = 0
    retry_after: int | None = None
    error_event: bool = False

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error_event


class _Request(asyncio.Protocol):
    """Sends one request and notes when its answer came."""

    def __init__(self, body: bytes, answer: Answer, started: float) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: load\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        self._bytes = head.encode() + b"content-type: application/json\r\n\r\n" + body
        self._answer = answer
        self._started = started
        self._received = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._bytes)
        self._answer.sent = time.perf_counter() - self._started - self._answer.due

    def data_received(self, data: bytes) -> None:
        if not self._received:
            self._answer.first = time.perf_counter() - self._started - self._answer.due
        self._received += data

    def connection_lost(self, exc: Exception | None) -> None:
        answer = self._answer
        answer.last = time.perf_counter() - self._started - answer.due
        head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        answer.status = int(lines[0].split()[1]) if head else 0
        answer.error_event = answer.status == 200 and (b'data: {"error"' in body or b"data: [DONE]" not in body)
        for line in lines[1:]:
            if line.lower().startswith(b"retry-after:"):
                answer.retry_after = int(line.split(b":")[1])
        if not self.done.done():
            self.done.set_result(None)


@dataclass
class Run:
    """What came of one offered rate.

    goodput         whole answers within the SLO, per second
    refused_ms      p50 and p99 of the time to a 429, from when the request was due
    retry_after     least and greatest, seconds
    send_lag_ms     p99 of how late requests were sent
    """

    multiple: float
    offered: float
    seconds: float
    requests: int
    statuses: dict[str, int]
    goodput: float
    first_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    send_lag_ms: float = 0.0

    @property
    def valid(self) -> bool:
        return self.send_lag_ms <= MAX_SEND_LAG_MS


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def ask(port: int, body: bytes, answer: Answer, started: float) -> None:
    _, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Request(body, answer, started), "127.0.0.1", port
    )
    await protocol.done


async def capacity(port: int, body: bytes, clients: int, seconds: float) -> float:
    """Whole answers per second of `clients` that each ask again when answered."""
    started = time.perf_counter()
    ended = 0

    async def client() -> None:
        nonlocal ended
        while (now := time.perf_counter() - started) < seconds:
            answer = Answer(now)
            await ask(port, body, answer, started)
            if not answer.whole:
                raise RuntimeError(f"the server answered {answer.status} while its capacity was measured")
            ended += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return ended / (time.perf_counter() - started)


async def offer(port: int, body: bytes, rate: float, seconds: float, seed: int) -> list[Answer]:
    """Requests at `rate` per second for `seconds`, whatever becomes of them; all answers."""
    random_gaps, due = random.Random(seed), 0.0
    answers: list[Answer] = []
    while (due := due + random_gaps.expovariate(rate)) < seconds:
        answers.append(Answer(due))
    started = time.perf_counter()
    tasks = []
    for answer in answers:
        if (wait := answer.due - (time.perf_counter() - started)) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(ask(port, body, answer, started)))
    async with asyncio.timeout(DRAIN_SECONDS):
        await asyncio.gather(*tasks)
    return answers


def summary(multiple: float, rate: float, seconds: float, slo: float, answers: Sequence[Answer]) -> Run:
    good = [answer for answer in answers if answer.whole and answer.last <= slo and answer.due + answer.last <= seconds]
    refused = [1000 * answer.last for answer in answers if answer.status == 429]
    first = [1000 * answer.first for answer in answers if answer.whole]
    waits = [answer.retry_after for answer in answers if answer.retry_after is not None]
    names = Counter("200, error event" if answer.error_event else str(answer.status) for answer in answers)
    return Run(
        multiple,
        rate,
        seconds,
        len(answers),
        dict(sorted(names.items())),
        len(good) / seconds,
        [percentile(first, 0.5), percentile(first, 0.99)],
        [percentile(refused, 0.5), percentile(refused, 0.99)],
        [min(waits), max(waits)] if waits else [],
        percentile([1000 * answer.sent for answer in answers], 0.99),
    )


async def measure(
    port: int, multiples: Sequence[float], seconds: float, slo: float, clients: int, tokens: int, seed: int
) -> list[Run]:
    fields = {"prompt": "Say something.", "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    body = json.dumps(fields).encode()
    rate = await capacity(port, body, clients, min(seconds, 5.0))
    runs = []
    for multiple in multiples:
        answers = await offer(port, body, multiple * rate, seconds, seed)
        runs.append(summary(multiple, multiple * rate, seconds, slo, answers))
    return runs


def table(runs: Sequence[Run]) -> str:
    """Markdown."""
    lines = [
        "| offered | requests/s | answered | refused | goodput/s | first token p50 / p99, ms | 429 p50 / p99, ms "
        "| Retry-After, s | sent late p99, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        refused = run.statuses.get("429", 0)
        waits = f"{run.retry_after[0]} to {run.retry_after[1]}" if run.retry_after else ""
        cells = (
            f"{run.multiple:g} x",
            f"{run.offered:.0f}",
            f"{run.statuses.get('200', 0)}",
            f"{refused}",
            f"{run.goodput:.1f}",
            f"{run.first_ms[0]:.0f} / {run.first_ms[1]:.0f}",
            f"{run.refused_ms[0]:.1f} / {run.refused_ms[1]:.1f}" if refused else "",
            waits,
            f"{run.send_lag_ms:.1f}" + ("" if run.valid else " (invalid)"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.overload", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--multiples", default="0.5,1,2,5,10", help="of the capacity (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="per multiple (default: %(default)s)")
    parser.add_argument("--slo", type=float, default=5.0, help="seconds to a whole answer (default: %(default)s)")
    parser.add_argument(
        "--step-seconds", type=float, default=0.02, help="of the simulated engine (default: %(default)s)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-queued-requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="per answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    multiples = [float(each) for each in args.multiples.split(",")]
    flags = ["--simulate", "--simulate-step-seconds", str(args.step_seconds), "--max-num-seqs", str(args.max_num_seqs)]
    flags += ["--max-queued-requests", str(args.max_queued_requests), "--log-level", "warning"]
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as folder, nvfp4_server(flags, {}, 60, Path(folder) / "server.log") as server:
        port = int(server.url.rsplit(":", 1)[1])
        runs = asyncio.run(measure(port, multiples, args.seconds, args.slo, args.max_num_seqs, args.tokens, args.seed))
    print(table(runs))
    busy = neighbours.cores()
    if busy is not None and busy > BUSY_CORES:
        print(f"\nothers used {busy:.1f} cores meanwhile: no figures to quote")
    best = max(run.goodput for run in runs)
    print(f"\ngoodput at {runs[-1].multiple:g} x: {100 * runs[-1].goodput / best:.0f} % of the best")
    if args.output is not None:
        args.output.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
