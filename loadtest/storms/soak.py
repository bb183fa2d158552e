"""Mixed traffic for a long time, and what of it stays: memory, open files, threads, lines in the log.

The default model serves the kinds of traffic that a public server sees: answers and streams, chats, shared
beginnings, several choices, grammars, wrong requests, clients that leave. The traffic stops once in a while and the
server is looked at when it has nothing to do, so that like is compared with like; the first half fills caches.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from loadtest.storms.connection import GONE, Connection, ask, head, post
from loadtest.storms.target import IDLE_SECONDS, Footprint, Target, target
from loadtest.storms.verdict import Verdict, slope

SECONDS, SHORT_SECONDS = 600.0, 6.0
CLIENTS = 12
ROUNDS, SHORT_ROUNDS = 20, 3  # of traffic, each with a look at its end
SETTLE_SECONDS = 1.0
MIB = 1 << 20
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class _Look:
    seconds: float
    footprint: Footprint
    log_lines: int


def _completion(draw: random.Random, **fields: Any) -> bytes:
    prompt = " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(1, 120)))
    return post("/v1/completions", {"prompt": prompt, "max_tokens": draw.randrange(1, 12)} | fields)


def _chat(draw: random.Random, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": f"Say {draw.choice(_WORDS)} and {draw.random()}"}]
    return post("/v1/chat/completions", {"messages": messages, "max_tokens": draw.randrange(1, 12)} | fields)


def _wrong(draw: random.Random) -> bytes:
    return draw.choice((
        head("GET", f"/nothing/{draw.random()}"), post("/v1/completions", {"prompt": ""}),
        post("/v1/completions", {"prompt": "x", "temperature": draw.random() - 3}),
        post("/v1/completions", {"prompt": "x", "model": f"none-{draw.random()}"}),
        head("POST", "/v1/completions", {"content-length": "9"}) + b'{"prompt"',
    ))  # fmt: skip


def _request(draw: random.Random) -> tuple[str, bytes, tuple[int, ...]]:
    """(kind, bytes, the statuses that fit)."""
    match draw.randrange(9):
        case 0:
            return "answer", _completion(draw), (200,)
        case 1:
            return "stream", _completion(draw, stream=True, stream_options={"include_usage": True}), (200,)
        case 2:
            return "chat", _chat(draw, stream=draw.random() < 0.5, temperature=draw.random() * 2), (200,)
        case 3:
            return "choices", _completion(draw, n=3, logprobs=3), (200,)
        case 4:
            beginning = f"Shared beginning {draw.randrange(4)}. " * 12
            return "shared prefix", _completion(draw, prompt=beginning + draw.choice(_WORDS)), (200,)
        case 5:
            regex = {"regex": f"{draw.randrange(10**6)}[a-z]{{1,{draw.randrange(1, 9)}}}"}
            return "grammar", _completion(draw, structured_outputs=regex), (200,)
        case 6:
            schema = {"type": "object", "properties": {f"p{draw.randrange(10**6)}": {"type": "integer"}}}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            return "schema", _chat(draw, response_format=form), (200,)
        case 7:
            return "wrong", _wrong(draw), (400, 404)
        case _:
            return "left", _completion(draw, stream=True, max_tokens=200, ignore_eos=True), ()


async def _send(port: int, kind: str, request: bytes, draw: random.Random) -> int:
    if kind != "left":
        return (await ask(port, request)).status
    connection = await Connection.open(port)
    await connection.send(request)
    await asyncio.sleep(draw.random() / 5)
    connection.close()
    return 0


async def _traffic(port: int, seconds: float, draw: random.Random) -> tuple[Counter[str], Counter[str]]:
    """(How many of each kind, what went otherwise than it should)."""
    until = time.monotonic() + seconds
    sent: Counter[str] = Counter()
    surprises: Counter[str] = Counter()

    async def client() -> None:
        while time.monotonic() < until:
            kind, request, fitting = _request(draw)
            try:
                status = await _send(port, kind, request, draw)
            except GONE as error:
                surprises[f"{kind}: {type(error).__name__}"] += 1
                continue
            sent[kind] += 1
            if status and status not in fitting:
                surprises[f"{kind}: {status}"] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sent, surprises


async def storm(server: Target, seconds: float, rounds: int, growth_mib: float) -> Verdict:
    verdict = Verdict("soak")
    draw = random.Random(0)
    text = await server.greedy()
    sent: Counter[str] = Counter()
    surprises: Counter[str] = Counter()
    looks: list[_Look] = []
    idle = 0.0
    before, started = await server.metrics(), time.monotonic()
    for _ in range(rounds):
        done, wrong = await _traffic(server.port, seconds / rounds, draw)
        sent, surprises = sent + done, surprises + wrong
        idle = max(idle, await server.seconds_to_idle())
        await asyncio.sleep(SETTLE_SECONDS)
        looks.append(_Look(time.monotonic() - started, server.footprint(), server.log_lines()))
    after = await server.metrics()
    late = looks[len(looks) // 2 :]
    growth = (late[-1].footprint.rss_bytes - late[0].footprint.rss_bytes) / MIB
    per_hour = slope([(look.seconds, look.footprint.rss_bytes / MIB) for look in late]) * 3600
    verdict.equal("requests that went otherwise than they should", surprises.total(), 0)
    verdict.at_most("RSS growth, second half, MiB", growth, growth_mib)
    verdict.at_most("files open, most in the second half less the first look's", _most(late, "num_files"), 0)
    verdict.at_most("threads, most in the second half less the first look's", _most(late, "num_threads"), 0)
    verdict.equal("lines in the log, second half", late[-1].log_lines - late[0].log_lines, 0)
    verdict.equal("answers of 5xx", after.since(before, "nvfp4_http_responses_total", '"5xx"'), 0)
    verdict.equal("engines restarted", after.since(before, "nvfp4_engine_restarts_total"), 0)
    verdict.at_most("seconds until nothing was left, worst round", idle, IDLE_SECONDS)
    verdict.equal("greedy text is the same afterwards", await server.greedy() == text, True)
    verdict.figures = {
        "requests": dict(sent), "surprises": dict(surprises),
        "RSS slope, second half, MiB an hour": round(per_hour, 1),
        "RSS, MiB, at each look": [round(look.footprint.rss_bytes / MIB, 1) for look in looks],
        "files and threads at the end": [looks[-1].footprint.num_files, looks[-1].footprint.num_threads],
    }  # fmt: skip
    return verdict


def _most(late: list[_Look], name: str) -> int:
    values = [getattr(look.footprint, name) for look in late]
    return int(max(values) - values[0])


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """seconds: of traffic (600; short: 6)."""
    # A pool of KV blocks that the first rounds fill: one that is touched bit by bit would look like a leak.
    flags = ("--max-num-seqs", "8", "--num-kv-blocks", "512", "--max-model-len", "4096", "--log-level", "warning")
    with target(flags) as server:
        if short:
            return asyncio.run(storm(server, seconds or SHORT_SECONDS, SHORT_ROUNDS, growth_mib=64))
        return asyncio.run(storm(server, seconds or SECONDS, ROUNDS, growth_mib=4))
