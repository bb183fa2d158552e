"""What the death, the hang and the shutdown of a server cost its clients: `python -m loadtest.faults [--json FILE]`.

    python -m loadtest.faults [--streams 50] [--repeats 5] [--stall-timeout 3]

Starts `nvfp4 serve --simulate` for each part, so that no model's speed is measured. Its engine is killed (SIGKILL) or
stopped (SIGSTOP) while streams run; times count from that signal. Probes are polled every 5 ms, so a figure is up to
that much too long. The shutdown sends SIGTERM while streams run that can finish in time. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from loadtest.server_process import Server, nvfp4_server

POLL_SECONDS = 0.005
SIMULATED = ("--simulate", "--simulate-step-seconds", "0.005", "--max-num-seqs", "256", "--num-kv-blocks", "20000")
ENDLESS, SHORT = 4000, 300  # tokens of a stream: 20 s at least, and 1.5 s


@dataclass(frozen=True)
class Outage:
    """Seconds from the signal to the engine.

    error        the last of the streams had its error event
    not_ready    /health/ready answered 503
    restarted    it answered 200 again
    num_errors   streams that ended with an error event and [DONE]
    num_left     processes of the old engine that are still there
    """

    error: float
    not_ready: float
    restarted: float
    num_errors: int
    num_left: int


@dataclass(frozen=True)
class Drain:
    """SIGTERM under load: streams that came to their end, seconds to 503 and to the end, exit code."""

    num_whole: int
    num_streams: int
    not_ready: float
    ended: float
    exit_code: int


async def stream(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> tuple[list[str], float]:
    """The last two events of a streamed completion, and when the last came."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
    last: list[str] = []
    with suppress(httpx.RemoteProtocolError):  # a stream that was cut has no [DONE], which is counted
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    last = [*last[-1:], line]
    return last, time.monotonic()


def until_ready(probe: httpx.Client, *statuses: int) -> list[float]:
    """When /health/ready answered each of `statuses`, one after the other; within 60 s. For a thread of its own: the
    event loop has streams to read, and an engine may be replaced before that looks again."""
    found: list[float] = []
    deadline = time.monotonic() + 60
    while len(found) < len(statuses):
        if probe.get("/health/ready").status_code == statuses[len(found)]:
            found.append(time.monotonic())
            continue
        if time.monotonic() > deadline:
            raise TimeoutError(f"/health/ready did not answer {statuses[len(found)]} within 60 s")
        time.sleep(POLL_SECONDS)
    return found


async def running(client: httpx.AsyncClient, count: int) -> None:
    async with asyncio.timeout(30):
        while (await client.get("/load")).json()["server_load"] < count:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)


def engine_of(pid: int) -> int:
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(engine)


def is_left(pid: int) -> bool:
    """Whether a process is there, a zombie too."""
    return Path(f"/proc/{pid}").exists()


async def outage(server: Server, count: int, number: signal.Signals) -> Outage:
    """Send `number` to the engine while `count` streams run."""
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=5) as probe:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            streams = [asyncio.create_task(stream(client, f"stream {i}", ENDLESS)) for i in range(count)]
            await running(client, count)
            engine = engine_of(server.pid)
            os.kill(engine, number)
            sent = time.monotonic()
            not_ready, restarted = await asyncio.to_thread(until_ready, probe, 503, 200)
            ends = await asyncio.gather(*streams)
    errors = [end for end, _ in ends if len(end) == 2 and '"error"' in end[0] and end[1] == "data: [DONE]"]
    last = max(at for _, at in ends)
    return Outage(last - sent, not_ready - sent, restarted - sent, len(errors), int(is_left(engine)))


async def drain(server: Server, count: int) -> tuple[int, float, float]:
    """SIGTERM while `count` streams run: how many came to their end, seconds to 503, and to the last event."""
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=5) as probe:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            streams = [asyncio.create_task(stream(client, f"stream {i}", SHORT)) for i in range(count)]
            await running(client, count)
            os.kill(server.pid, signal.SIGTERM)
            sent = time.monotonic()
            (not_ready,) = await asyncio.to_thread(until_ready, probe, 503)
            ends = await asyncio.gather(*streams)
    whole = sum(len(end) == 2 and '"length"' in end[0] and end[1] == "data: [DONE]" for end, _ in ends)
    return whole, not_ready - sent, max(at for _, at in ends) - sent


def measure_outages(count: int, repeats: int, number: signal.Signals, stall: float, log: Path) -> list[Outage]:
    """Each with a server of its own: a second restart within ten minutes waits first."""
    found = []
    for _ in range(repeats):
        with nvfp4_server([*SIMULATED, "--stall-timeout", str(stall)], {}, 60, log) as server:
            found.append(asyncio.run(outage(server, count, number)))
    return found


def measure_drain(count: int, log: Path) -> Drain:
    with nvfp4_server([*SIMULATED, "--log-level", "info"], {}, 60, log) as server:
        whole, not_ready, ended = asyncio.run(drain(server, count))
        _, status = os.waitpid(server.pid, 0)
    return Drain(whole, count, not_ready, ended, os.waitstatus_to_exitcode(status))


def report(name: str, outages: Sequence[Outage], count: int) -> str:
    def worst(field: str) -> str:
        values = [getattr(one, field) for one in outages]
        return f"median {statistics.median(values):.3f} s, worst {max(values):.3f} s"

    return (
        f"{name}, {count} streams, {len(outages)} times\n"
        f"  error event on every stream   {worst('error')}\n"
        f"  ready 503                     {worst('not_ready')}\n"
        f"  ready 200 again               {worst('restarted')}\n"
        f"  streams with an error event   {sum(o.num_errors for o in outages)} of {count * len(outages)}\n"
        f"  old engines left              {sum(o.num_left for o in outages)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--drained-streams", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stall-timeout", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        killed = measure_outages(args.streams, args.repeats, signal.SIGKILL, 30.0, log)
        print(report("SIGKILL of the engine", killed, args.streams), flush=True)
        stopped = measure_outages(args.streams, args.repeats, signal.SIGSTOP, args.stall_timeout, log)
        print(report(f"SIGSTOP, --stall-timeout {args.stall_timeout:g}", stopped, args.streams), flush=True)
        drained = measure_drain(args.drained_streams, log)
    print(
        f"SIGTERM, {drained.num_streams} streams: {drained.num_whole} whole, 503 after {drained.not_ready:.3f} s, "
        f"last event after {drained.ended:.2f} s, exit {drained.exit_code}"
    )
    figures = {
        "SIGKILL": [asdict(o) for o in killed],
        "SIGSTOP": [asdict(o) for o in stopped],
        "SIGTERM": asdict(drained),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    outages = [*killed, *stopped]
    sound = all(o.num_errors == args.streams and not o.num_left for o in outages)
    return 0 if sound and drained.num_whole == drained.num_streams and drained.exit_code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
