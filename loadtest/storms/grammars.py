"""Thousands of grammars of every kind, no two alike, and among them those that are meant to hurt.

The server runs the default model: compiling depends on the vocabulary. What is asked for is one token under each, so
that what is timed is the compiling; plain requests of another process go on meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from loadtest.storms.connection import GONE, ask, post
from loadtest.storms.probe import probing
from loadtest.storms.target import IDLE_SECONDS, Target, histogram_percentile, target
from loadtest.storms.verdict import Verdict, percentile

COUNT, SHORT_COUNT = 10_000, 60
CLIENTS = 8
COMPILE_SECONDS = 2.0
YIELD_SECONDS = 25.0  # for which a grammar of half a megabyte lets shorter ones past (docs/structured-output.md)
# The short form runs in CI, beside other tests: there it says that nothing hangs, not how fast it is. 20 ms times this
# is an edge of the lag's histogram, as 20 ms are: between two edges a bound would count as the lower one.
SHORT_PATIENCE = 10.0
ANSWER_SECONDS = 60.0
PLAIN = '{"prompt": "plain", "max_tokens": 1}'
MIB = 1 << 20
_TYPES = ("string", "integer", "number", "boolean", "null")

Constraint = dict[str, Any]


# -- grammars that somebody might mean ----------------------------------------------------------------------------


def _value(draw: random.Random, depth: int) -> Constraint:
    kind = draw.randrange(6) if depth else draw.randrange(3)
    match kind:
        case 0:
            return {"type": draw.choice(_TYPES)}
        case 1:
            return {"enum": [f"{draw.random():.6f}" for _ in range(draw.randrange(1, 30))]}
        case 2:
            return {"type": "string", "maxLength": draw.randrange(1, 60)}
        case 3:
            return {"type": "array", "items": _value(draw, depth - 1), "maxItems": draw.randrange(1, 8)}
        case 4:
            return {"anyOf": [_value(draw, depth - 1) for _ in range(draw.randrange(2, 5))]}
        case _:
            names = [f"field_{draw.randrange(10**6)}" for _ in range(draw.randrange(1, 8))]
            properties = {name: _value(draw, depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _schema(number: int, draw: random.Random) -> Constraint:
    return {"json": {"type": "object", "properties": {f"unique_{number}": _value(draw, 4)}, "required": []}}


def _regex(number: int, draw: random.Random) -> Constraint:
    parts = (r"[a-z]{1,9}", r"\d+", r"(yes|no)?", r"[^\s]*", r"(ab|cd){2,4}", r".{0,12}")
    return {"regex": f"{number}" + "".join(draw.choice(parts) for _ in range(draw.randrange(1, 12)))}


def _choice(number: int, draw: random.Random) -> Constraint:
    return {"choice": [f"{number} {draw.random()}" for _ in range(draw.randrange(1, 200))]}


def _grammar(number: int, draw: random.Random) -> Constraint:
    rules = draw.randrange(1, 40)
    lines = [f'r{i} ::= "{draw.randrange(1000)}" r{draw.randrange(rules)} | "{i}"' for i in range(rules)]
    return {"grammar": "\n".join([f'root ::= "{number}" r0', *lines])}


# -- grammars that are meant to hurt ------------------------------------------------------------------------------


def _nested(schema: Constraint, depth: int) -> Constraint:
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _exponential(number: int) -> Constraint:
    definitions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 4} for i in range(24)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {"d24": {"const": number}}}


def _chain(number: int) -> str:
    return "root ::= r0\n" + "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(20_000)) + f'r20000 ::= "{number}"'


# Each makes another one of its kind of every number.
BOMBS: tuple[Callable[[int], Constraint], ...] = (
    lambda n: {"grammar": _chain(n)},
    lambda n: {"grammar": f'root ::= root root | "{n}" | ""'},
    lambda n: {"grammar": f"root ::= ({'(' * 3000}{n}"},
    lambda n: {"grammar": f'root ::= "{n}" missing'},
    lambda n: {"regex": f"((((a{{1,99}}){{1,99}}){{1,99}}){{1,99}}){n}"},
    lambda n: {"regex": f"(a|a)*(a|aa)*b{{{n % 900 + 50}}}"},
    lambda n: {"regex": "(.*a.{" + str(20 + n % 200) + "})+"},
    lambda n: {"regex": "[^\U0001f600-\U0001f64f]{" + str(500 + n % 500) + "}"},
    lambda n: {"regex": "(" * 2000 + str(n)},
    lambda n: {"regex": "a{" + str(10**9 + n) + "}"},
    lambda n: {"choice": [f"word {i * 7919 + n}" for i in range(10_000)]},
    lambda n: {"json": {"type": "array", "items": {}, "minItems": 10**6 + n}},
    lambda n: {"json": {"type": "string", "minLength": 10**7 + n}},
    lambda n: {"json": {"type": "string", "pattern": f"^(a+)+{n}$"}},
    lambda n: {"json": {"type": "string", "pattern": f"(?<=x){n}"}},
    lambda n: {"json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300 + n}},
    lambda n: {"json": {"type": "number", "multipleOf": 1e-300 * (n + 1)}},
    lambda n: {"json": _nested({"const": n}, 60)},
    lambda n: {"json": _nested({"const": n}, 250)},
    lambda n: {"json": _exponential(n)},
    lambda n: {"json": {"$ref": "#", "title": str(n)}},
    lambda n: {"json": {"$ref": f"http://127.0.0.1:9/{n}"}},
    lambda n: {"json": {"allOf": [{"anyOf": [{"pattern": f"a{i}{j}{n}"} for i in range(6)]} for j in range(12)]}},
    lambda n: {"json": {"type": "object", "patternProperties": {f"^({'a|' * 500}{n})+$": {"type": "object"}}}},
    lambda n: {"json": {"properties": {f"p{i}_{n}": {"type": "string"} for i in range(4000)}, "type": "object"}},
    lambda n: {"json": {"enum": [[{"a": i}] * 20 for i in range(n, n + 500)]}},
    lambda n: {"json": {"type": f"no type {n}"}},
)  # fmt: skip
KINDS: tuple[Callable[[int, random.Random], Constraint], ...] = (_schema, _schema, _regex, _choice, _grammar)
BOMB_EVERY = 5  # each fifth


def constraint(number: int, draw: random.Random) -> tuple[str, Constraint]:
    """(kind, what the request's structured_outputs is)."""
    if number % BOMB_EVERY == BOMB_EVERY - 1:
        index = number // BOMB_EVERY % len(BOMBS)
        return f"bomb {index}", BOMBS[index](number)
    make = KINDS[number % len(KINDS)]
    return make.__name__.strip("_"), make(number, draw)


# -- the storm ----------------------------------------------------------------------------------------------------


async def _one(port: int, wanted: Constraint) -> tuple[str, float]:
    """(The status, or how no answer came; seconds.)"""
    request = post("/v1/completions", {"prompt": "x", "max_tokens": 1, "structured_outputs": wanted})
    started = time.perf_counter()
    try:
        reply = await ask(port, request, ANSWER_SECONDS)
    except GONE as error:
        return type(error).__name__, time.perf_counter() - started
    return str(reply.status), time.perf_counter() - started


async def _all(
    server: Target, first: int, last: int, draw: random.Random
) -> tuple[Counter[str], dict[str, list[float]]]:
    """(Statuses; of each kind, the seconds that its answers took.)"""
    numbers = iter(range(first, last))
    statuses: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {}

    async def client() -> None:
        for number in numbers:
            kind, wanted = constraint(number, draw)
            status, took = await _one(server.port, wanted)
            statuses[status if not kind.startswith("bomb") else f"bomb: {status}"] += 1
            seconds.setdefault(kind, []).append(took)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return statuses, seconds


async def _alone(server: Target) -> dict[str, float]:
    """Seconds that each bomb takes when nothing else is asked."""
    return {f"bomb {i}": (await _one(server.port, bomb(10**6)))[1] for i, bomb in enumerate(BOMBS)}


async def storm(server: Target, count: int, warm: int, rss_mib: float, patience: float) -> Verdict:
    verdict = Verdict("grammars")
    draw = random.Random(0)
    text = await server.greedy()
    # The cache of compiled grammars fills to its bound first: that memory is meant to be used.
    with probing(server.port, "/v1/completions", PLAIN) as calm:
        await asyncio.sleep(1.0)
    await _all(server, 10**7, 10**7 + warm, draw)
    alone = await _alone(server)
    before, footprint = await server.metrics(), server.footprint()
    with probing(server.port, "/v1/completions", PLAIN) as plain:
        statuses, seconds = await _all(server, 0, count, draw)
    after, after_footprint = await server.metrics(), server.footprint()
    allowed = {"200", "bomb: 200", "bomb: 400"}
    others = sum(found for status, found in statuses.items() if status not in allowed)
    lag = histogram_percentile(before, after, "nvfp4_event_loop_lag_seconds", 0.99)
    ordinary = [took for kind, all_took in seconds.items() if not kind.startswith("bomb") for took in all_took]
    bombs = [took for kind, all_took in seconds.items() if kind.startswith("bomb") for took in all_took]
    verdict.equal("answers other than 200, or 400 to a bomb", others, 0)
    verdict.equal("bombs refused, more than none", min(statuses["bomb: 400"], 1), 1)
    verdict.at_most("seconds that a bomb took alone, worst", max(alone.values()), COMPILE_SECONDS * patience)
    # Long grammars are tried one after the other, and eight at a time wait for each other and for steps of the model.
    verdict.at_most(
        "seconds that an ordinary grammar took, p99", percentile(ordinary, 0.99), COMPILE_SECONDS * patience
    )
    verdict.at_most(
        "seconds that a bomb took, worst", max(bombs), (COMPILE_SECONDS * CLIENTS + YIELD_SECONDS) * patience
    )
    verdict.at_most("event loop lag p99, ms", lag * 1e3, 20 * patience)
    verdict.equal("plain requests that failed", plain.failures, 0)
    verdict.at_most("RSS growth, MiB", (after_footprint.rss_bytes - footprint.rss_bytes) / MIB, rss_mib)
    verdict.at_most("threads, more than before", after_footprint.num_threads - footprint.num_threads, 0)
    verdict.equal("answers of 5xx", after.since(before, "nvfp4_http_responses_total", '"5xx"'), 0)
    verdict.equal("engines restarted", after.since(before, "nvfp4_engine_restarts_total"), 0)
    verdict.at_most("seconds until nothing was left", await server.seconds_to_idle(), IDLE_SECONDS)
    verdict.equal("greedy text is the same afterwards", await server.greedy() == text, True)
    verdict.figures = {
        "answers": dict(statuses),
        "slowest alone, s": {kind: round(alone[kind], 2) for kind in sorted(alone, key=alone.__getitem__)[-4:]},
        "ordinary p50 / p99 / worst, s": [round(percentile(ordinary, share), 2) for share in (0.5, 0.99, 1.0)],
        "bombs p50 / p99 / worst, s": [round(percentile(bombs, share), 2) for share in (0.5, 0.99, 1.0)],
        "plain requests' p50 / p99 before, ms": [round(percentile(calm.seconds, s) * 1e3) for s in (0.5, 0.99)],
        "plain requests' p50 / p99 meanwhile, ms": [round(percentile(plain.seconds, s) * 1e3) for s in (0.5, 0.99)],
        "RSS, MiB": [footprint.rss_bytes >> 20, after_footprint.rss_bytes >> 20],
    }
    return verdict


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """count: of grammars (10,000; short: 60), each fifth meant to hurt."""
    count = count or (SHORT_COUNT if short else COUNT)
    with target(("--max-num-seqs", "16", "--log-level", "warning")) as server:
        if short:  # too few to fill the cache of compiled grammars, which may take 128 MiB
            return asyncio.run(storm(server, count, warm=0, rss_mib=192, patience=SHORT_PATIENCE))
        return asyncio.run(storm(server, count, warm=count // 5, rss_mib=64, patience=1))
