"""Clients that leave, in eight ways and in every state a request can be in.

The pool of KV blocks is small and the step slow enough that requests queue, are cut into chunks and are preempted while
clients leave. Rounds end with the server idle; what a round leaves behind is counted there: KV blocks exactly, and once
more by a request that needs all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from loadtest.storms.connection import GONE, Connection, ask, head, post
from loadtest.storms.target import IDLE_SECONDS, Metrics, Target, target
from loadtest.storms.verdict import Verdict, slope

NUM_BLOCKS, BLOCK_SIZE = 97, 16
FLAGS = (
    "--simulate", "--simulate-step-seconds", "0.002", "--max-num-seqs", "12", "--max-num-batched-tokens", "64",
    "--num-kv-blocks", str(NUM_BLOCKS), "--log-level", "warning",
)  # fmt: skip
CLIENTS = 48  # at once: four times what runs
COUNT, SHORT_COUNT = 100_000, 600
ROUNDS, SHORT_ROUNDS = 40, 6
PATIENCE_SECONDS = 0.3  # of a client that waits for a first byte before it leaves
MIB = 1 << 20

Leave = Callable[[int, bytes, random.Random], Awaitable[None]]


# -- ways to leave ------------------------------------------------------------------------------------------------


async def _before_headers(port: int, request: bytes, draw: random.Random) -> None:
    (await Connection.open(port)).close()


async def _in_headers(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request[: draw.randrange(1, request.index(b"\r\n\r\n"))])
    connection.close()


async def _after_request(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request)
    await asyncio.sleep(draw.choice((0.0, 0.002, 0.02, 0.1)))
    connection.close()


async def _read_some(connection: Connection, count: int) -> None:
    """`count` bytes, or as many as come in time."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await connection.reader.readexactly(count)
    except GONE:
        return  # it was queued for longer, or refused: leaving is all the same to this client


async def _after_first_byte(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request)
    await _read_some(connection, 1)
    connection.close()


async def _in_the_stream(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request)
    await _read_some(connection, draw.randrange(500, 8000))
    connection.close()


async def _half_closed(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request)
    connection.end_of_input()
    await _read_some(connection, draw.randrange(1, 2000))
    connection.close()


async def _reset(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(request)
    await asyncio.sleep(draw.choice((0.0, 0.002, 0.02, 0.1)))
    connection.reset()


async def _on_kept_connection(port: int, request: bytes, draw: random.Random) -> None:
    connection = await Connection.open(port)
    await connection.send(head("GET", "/version"))
    if (reply := await connection.reply()).status != 200:
        raise RuntimeError(f"/version answered {reply.status}")
    await connection.send(request)
    await _read_some(connection, 1)
    connection.close()


WAYS: tuple[Leave, ...] = (
    _before_headers, _in_headers, _after_request, _after_first_byte, _in_the_stream, _half_closed, _reset,
    _on_kept_connection,
)  # fmt: skip


# -- what they had asked for --------------------------------------------------------------------------------------


def _body(kind: str, number: int, draw: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": f"abort {number}", "max_tokens": 400, "ignore_eos": True}
    match kind:
        case "streamed":
            return fields | {"stream": True}
        case "whole":
            return fields
        case "choices":
            return fields | {"n": draw.randrange(2, 6), "stream": draw.random() < 0.5}
        case "chunked prefill":
            return fields | {"prompt": f"{number} {draw.random()} " + "long " * 180, "stream": True, "max_tokens": 50}
        case "shared prefix":
            return fields | {"prompt": "The same beginning. " * 20 + str(number % 7), "stream": True}
        case "grammar":  # of its own, so that it compiles
            regex = f"(a|b){{{number % 90 + 10}}}{number}(c|d)*"
            return fields | {"structured_outputs": {"regex": regex}, "stream": True}
        case _:
            raise ValueError(kind)


KINDS = ("streamed", "whole", "choices", "chunked prefill", "shared prefix", "grammar")


async def _round(port: int, first: int, count: int, draw: random.Random) -> Counter[str]:
    """Clients `first` to `first + count`, CLIENTS at once: every way with every kind in turn."""
    numbers = iter(range(first, first + count))
    done: Counter[str] = Counter()

    async def client() -> None:
        for number in numbers:
            leave = WAYS[number % len(WAYS)]
            kind = KINDS[number // len(WAYS) % len(KINDS)]
            try:
                await leave(port, post("/v1/completions", _body(kind, number, draw)), draw)
            except GONE as error:
                done[f"the server left first ({type(error).__name__})"] += 1
            done[leave.__name__.strip("_")] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done


class _Peaks:
    """The most that ran and waited at once, as scraped while a round goes on."""

    def __init__(self) -> None:
        self.running = self.waiting = 0.0

    async def watch(self, server: Target) -> None:
        while True:
            metrics = await server.metrics()
            self.running = max(self.running, metrics.total("vllm:num_requests_running"))
            self.waiting = max(self.waiting, metrics.total("vllm:num_requests_waiting"))
            await asyncio.sleep(0.1)


async def _needs_every_block(server: Target) -> bool:
    """A request that fits into the pool only if no block is missing, to its last token."""
    tokens = (NUM_BLOCKS - 1) * BLOCK_SIZE
    body = {"prompt": "x" * (tokens - 8), "max_tokens": 8, "ignore_eos": True, "cache_salt": "all"}
    reply = await ask(server.port, post("/v1/completions", body))
    return reply.status == 200 and reply.json()["usage"]["total_tokens"] == tokens


async def storm(server: Target, count: int, short: bool) -> Verdict:
    verdict = Verdict("aborts")
    draw = random.Random(0)
    text = await server.greedy()
    before = await server.metrics()
    rounds = SHORT_ROUNDS if short else ROUNDS
    per_round = -(-count // rounds)
    ways: Counter[str] = Counter()
    peaks, idle, memory, unchanged = _Peaks(), [], [], True
    watch = asyncio.create_task(peaks.watch(server))
    for i in range(rounds):
        ways += await _round(server.port, i * per_round, per_round, draw)
        idle.append(await server.seconds_to_idle())
        unchanged &= await server.greedy() == text
        memory.append(((i + 1) * per_round, server.footprint().rss_bytes))
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    after = await server.metrics()
    _judge(verdict, before, after, peaks)
    verdict.at_most("seconds until nothing ran, waited or held a block, worst round", max(idle), IDLE_SECONDS)
    verdict.equal("KV blocks held afterwards", after.total("nvfp4_kv_cache_used_blocks"), 0)
    verdict.equal("a request that needs every block is served", await _needs_every_block(server), True)
    verdict.equal("greedy text is the same after every round", unchanged, True)
    late = memory[len(memory) // 2 :]
    if short:  # the first requests fill caches: too few to fit a line to
        verdict.at_most("RSS growth, second half, MiB", (late[-1][1] - late[0][1]) / MIB, 32)
    else:
        verdict.at_most("RSS slope, second half, bytes per abort", slope(late), 1024)
    verdict.figures |= {"aborts": rounds * per_round, "ways": dict(ways)}
    verdict.figures["RSS, MiB, after each round"] = [round(size / MIB, 1) for _, size in memory]
    return verdict


def _judge(verdict: Verdict, before: Metrics, after: Metrics, peaks: _Peaks) -> None:
    """That the storm was one: every state was met. And what the server says went wrong."""
    verdict.at_least(
        "requests the engine ended as aborted", after.since(before, "vllm:request_success_total", '"abort"'), 1
    )
    verdict.at_least("requests preempted", after.since(before, "vllm:num_preemptions_total"), 1)
    verdict.at_least("requests waiting, most", peaks.waiting, 1)
    verdict.at_least("requests running, most", peaks.running, 2)
    verdict.equal("answers of 5xx", after.since(before, "nvfp4_http_responses_total", '"5xx"'), 0)
    verdict.equal("engines restarted", after.since(before, "nvfp4_engine_restarts_total"), 0)


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """count: of clients that leave (100,000; short: 600)."""
    with target(FLAGS) as server:
        return asyncio.run(storm(server, count or (SHORT_COUNT if short else COUNT), short))
