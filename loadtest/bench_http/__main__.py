"""CPU time of the HTTP layer per streamed token and per request, beside a bare server-sent-events app in turns.

The server runs over the simulated engine (its own process, real scheduler, no model). What is counted is the CPU time
of the server's process alone, parsing, admission, detokenising, metrics and the set-up of every stream included; the
engine's process and the client are not. The bare app streams ready-made events on the same tick: this stack's floor.

    make bench-http            # about three minutes; BENCH="--rounds 1" for a try
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlparse

from loadtest.bench_http.cpu_time import cpu_seconds
from loadtest.bench_http.lag import lag_p99_ms, scrape
from loadtest.bench_http.raw_client import request_bytes, run_requests, run_streams
from loadtest.bench_http.readings import Short, Streamed, table
from loadtest.neighbours import BUSY_CORES, Neighbours
from loadtest.server_process import Server, nvfp4_server, running

STREAMS = (1, 64, 256, 1000)
NUM_CONNECTIONS = 64
READY_SECONDS = 60.0


@dataclass(frozen=True)
class Side:
    """A server under test: how it is asked for streams and for short answers, and whether it exports its loop's lag."""

    name: str
    server: Server
    stream: bytes
    short: bytes
    has_lag: bool

    @property
    def port(self) -> int:
        port = urlparse(self.server.url).port
        assert port is not None
        return port


def measure_streams(side: Side, num_streams: int, num_tokens: int) -> Streamed:
    before_lag = scrape(side.server.url) if side.has_lag else None
    before = cpu_seconds(side.server.pid)
    run = run_streams(side.port, side.stream, num_streams)
    used = cpu_seconds(side.server.pid) - before
    lag = None if before_lag is None else lag_p99_ms(before_lag, scrape(side.server.url))
    tokens = num_streams * num_tokens
    return Streamed(side.name, num_streams, tokens, run.seconds, used, statistics.median(run.first_ms), lag)


def measure_short(side: Side, num_requests: int) -> Short:
    before = cpu_seconds(side.server.pid)
    finished = run_requests(side.port, side.short, NUM_CONNECTIONS, num_requests)
    return Short(side.name, num_requests, finished[-1], cpu_seconds(side.server.pid) - before)


@contextmanager
def sides(step_seconds: float, num_tokens: int, scratch: Path) -> Iterator[list[Side]]:
    """Ours and the bare app, both running."""
    flags = ["--simulate", "--simulate-step-seconds", str(step_seconds), "--simulate-script", "abcdefgh "]
    flags += ["--max-num-seqs", str(max(STREAMS)), "--num-kv-blocks", str(max(STREAMS) * (num_tokens // 16 + 4))]
    flags += ["--max-num-batched-tokens", "65536"]
    body = {"model": "simulated", "prompt": "Hello", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    stream = request_bytes("/v1/completions", json.dumps(body | {"stream": True}).encode())
    short = request_bytes("/v1/completions", json.dumps(body | {"max_tokens": 1}).encode())

    def bare(port: int) -> Sequence[str]:
        module = "loadtest.bench_http.bare_sse"
        return [sys.executable, "-m", module, str(port), str(step_seconds), str(num_tokens)]

    with (
        nvfp4_server(flags, {}, READY_SECONDS, scratch / "ours.log") as ours,
        running(bare, {}, READY_SECONDS, scratch / "bare.log") as peer,
    ):
        yield [
            Side("nvfp4", ours, stream, short, True),
            Side("bare uvicorn", peer, request_bytes("/stream", b"{}"), request_bytes("/short", b"{}"), False),
        ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, scratch: Path) -> tuple[list[Streamed], list[Short]]:
    streamed: list[Streamed] = []
    short: list[Short] = []
    with sides(args.step_seconds, args.tokens, scratch) as both:
        for side in both:
            measure_streams(side, 4, args.tokens)  # imports and caches of the first requests
        for _ in range(args.rounds):
            for count in args.streams:
                for side in both:
                    streamed.append(measured := measure_streams(side, count, args.tokens))
                    say(f"{side.name:>12}: {count:4} streams, {measured.us_per_token:6.1f} us a token")
    with sides(0.0, args.tokens, scratch) as both:
        for _ in range(args.rounds):
            for side in both:
                measure_short(side, args.requests // 10)
                short.append(request := measure_short(side, args.requests))
                rate, cost = request.requests / request.seconds, 1e6 * request.cpu_seconds / request.requests
                say(f"{side.name:>12}: {rate:7.0f} requests/s, {cost:.0f} us each")
    return streamed, short


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--tokens", type=int, default=200, help="of each stream (default: 200)")
    parser.add_argument("--step-seconds", type=float, default=0.025, help="of the engine (default: 0.025)")
    parser.add_argument("--requests", type=int, default=5000, help="short ones, each round (default: 5000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    args = parse_arguments(argv)
    neighbours = Neighbours()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with tempfile.TemporaryDirectory() as scratch:
        streamed, short = run(args, Path(scratch))
    show(table(streamed, short))
    others = neighbours.cores()
    if others is not None and others > BUSY_CORES:
        show(f"Not a quiet machine: others used {others:.1f} cores meanwhile; do not quote these figures.")
    if args.json is not None:
        record = {"made_at": started, "cores_used_by_others": others, "options": vars(args) | {"json": None}}
        readings = {"streams": [asdict(s) for s in streamed], "short": [asdict(s) for s in short]}
        args.json.write_text(json.dumps(record | readings, indent=1) + "\n")


if __name__ == "__main__":
    main()
