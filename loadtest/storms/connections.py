"""What scanners, broken clients and attackers send: noise, requests in pieces, two in one, heads that never end.

Well-behaved clients go on meanwhile, and may notice little. What no parser should take for a request is answered with a
4xx or not at all, a hidden second request is never answered, and a connection that says nothing is closed in time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from loadtest.storms.connection import GONE, Connection, ask, head, post
from loadtest.storms.probe import probing
from loadtest.storms.target import IDLE_SECONDS, Target, target
from loadtest.storms.verdict import Verdict, percentile

COUNT, SHORT_COUNT = 100_000, 1_000
SLOW, SHORT_SLOW = 500, 50  # connections that send a byte now and then
HEADER_SECONDS = 5  # --header-timeout
SLOW_GRACE_SECONDS = 2.0
CLIENTS = 32
GOOD = '{"prompt": "good", "max_tokens": 4, "ignore_eos": true}'
# A p99 below this is a matter of which process the kernel ran first; of the short form's few requests it is the worst.
FLOOR_SECONDS, SHORT_FLOOR_SECONDS = 0.02, 0.25
MIB = 1 << 20
ANSWER_SECONDS = 20.0

# What a sender expects: "refused" is a 4xx, or a connection closed without an answer; "served" a 200.
Send = Callable[[int, random.Random], Awaitable[str]]
_COMPLETION = {"prompt": "one of many", "max_tokens": 1}


def _head_of(reply: bytes) -> str:
    """The status that an answer begins with; "closed" where there is none."""
    return reply[9:12].decode("latin-1") if reply.startswith(b"HTTP/1.1 ") else "closed" if not reply else "noise"


async def _everything(connection: Connection) -> bytes:
    """What comes until the server closes. TimeoutError if it does not."""
    async with asyncio.timeout(ANSWER_SECONDS):
        try:
            return await connection.reader.read(-1)
        except ConnectionError:
            return b""


async def _refused(port: int, data: bytes, *, half_close: bool = True) -> str:
    connection = await Connection.open(port)
    try:
        await connection.send(data)
        if half_close:
            connection.end_of_input()
        answer = await _everything(connection)
    except ConnectionError:
        answer = b""
    finally:
        connection.close()
    status = _head_of(answer)
    if answer.count(b"HTTP/1.1 ") > 1:
        return f"{answer.count(b'HTTP/1.1 ')} answers"
    return "refused" if status == "closed" or status.startswith("4") else status


async def _noise(port: int, draw: random.Random) -> str:
    return await _refused(port, draw.randbytes(draw.randrange(1, 2000)))


async def _other_protocols(port: int, draw: random.Random) -> str:
    hello = draw.choice((
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(32),  # TLS
        b"SSH-2.0-OpenSSH_9.2\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"*1\r\n$4\r\nPING\r\n", b"EHLO x\r\n",
        b"\x00\x00\x00\x17\x00\x06" + bytes(17), b"GET /\r\n\r\n", b"\r\n" * 200,
    ))  # fmt: skip
    return await _refused(port, hello)


async def _bent_head(port: int, draw: random.Random) -> str:
    request = draw.choice((
        b"G\x00T / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nno colon here\r\n\r\n", b"GET /health HTTP/1.1\r\n: empty\r\n\r\n",
        b"GET /health HTTP/1.1\r\nna me: x\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1e9\r\n\r\n", b"A" * 70_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"b" * 70_000 + b"\r\n\r\n",
    ))  # fmt: skip
    return await _refused(port, request)


async def _smuggled(port: int, draw: random.Random) -> str:
    """A body whose length is said in two ways: whoever believes the other one would serve the request inside it."""
    hidden = head("GET", "/version")
    fields = draw.choice((
        {"content-length": str(len(hidden)), "transfer-encoding": "chunked"},
        {"transfer-encoding": "chunked, identity"}, {"transfer-encoding": "xchunked"},
        {"transfer-encoding": "identity", "content-length": "4"},
        {"content-length": "4, 6"}, {"content-length": "+4"},
    ))  # fmt: skip
    return await _refused(port, head("POST", "/v1/completions", fields) + b"0\r\n\r\n" + hidden)


async def _bent_chunks(port: int, draw: random.Random) -> str:
    chunks = draw.choice(
        (b"zz\r\n{}\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffffff\r\n{}\r\n", b"2\r\n{}0\r\n\r\n")
    )
    fields = {"transfer-encoding": "chunked", "content-type": "application/json"}
    return await _refused(port, head("POST", "/v1/completions", fields) + chunks)


async def _left_half_way(port: int, draw: random.Random) -> str:
    request = post("/v1/completions", _COMPLETION)
    return await _refused(port, request[: draw.randrange(1, len(request))])


async def _served(port: int, pieces: list[bytes], answers: int = 1) -> str:
    connection = await Connection.open(port)
    try:
        for piece in pieces:
            await connection.send(piece)
            await asyncio.sleep(0)
        async with asyncio.timeout(ANSWER_SECONDS):
            statuses = [(await connection.reply()).status for _ in range(answers)]
    finally:
        connection.close()
    return "served" if statuses == [200] * answers else str(statuses)


async def _in_pieces(port: int, draw: random.Random) -> str:
    request = post("/v1/completions", _COMPLETION)
    cuts = sorted(draw.sample(range(1, len(request)), draw.randrange(1, 12)))
    return await _served(port, [request[a:b] for a, b in zip([0, *cuts], [*cuts, len(request)], strict=True)])


async def _chunk_by_byte(port: int, draw: random.Random) -> str:
    body = b'{"prompt": "chunks", "max_tokens": 1}'
    fields = {"transfer-encoding": "chunked", "content-type": "application/json"}
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    return await _served(port, [head("POST", "/v1/completions", fields), chunks])


async def _pipelined(port: int, draw: random.Random) -> str:
    count = draw.randrange(2, 9)
    return await _served(port, [head("GET", "/version") * (count - 1) + post("/v1/completions", _COMPLETION)], count)


async def _half_closed(port: int, draw: random.Random) -> str:
    """All was sent, and the client says that no more will come. It may be taken as gone; it must not break anything."""
    outcome = await _refused(port, post("/v1/completions", _COMPLETION, {"connection": "close"}))
    return "refused" if outcome == "200" else outcome


KINDS: dict[Send, str] = {
    _noise: "refused",
    _other_protocols: "refused", _bent_head: "refused", _smuggled: "refused", _bent_chunks: "refused",
    _left_half_way: "refused", _half_closed: "refused", _in_pieces: "served", _chunk_by_byte: "served",
    _pipelined: "served",
}  # fmt: skip


async def _slow(port: int) -> float:
    """A head by a byte now and then; seconds until the server closed."""
    connection = await Connection.open(port)
    started = time.monotonic()
    request = head("POST", "/v1/completions", {"content-length": "10", "x": "y" * 400})
    ended = asyncio.create_task(_everything(connection))
    try:
        for byte in request:
            if ended.done():
                break
            await connection.send(bytes((byte,)))
            await asyncio.wait((ended,), timeout=0.5)
        await ended
    except ConnectionError:
        pass  # closed under the byte: that is what was waited for
    finally:
        ended.cancel()
        connection.close()
    return time.monotonic() - started


async def _send_all(port: int, count: int, draw: random.Random) -> tuple[Counter[str], Counter[str]]:
    """(How many of each kind, what went otherwise than expected)."""
    kinds = list(KINDS)
    numbers = iter(range(count))
    sent: Counter[str] = Counter()
    surprises: Counter[str] = Counter()

    async def client() -> None:
        for number in numbers:
            send = kinds[number % len(kinds)]
            name = send.__name__.strip("_").replace("_", " ")
            sent[name] += 1
            try:
                found = await send(port, draw)
            except GONE as error:
                found = type(error).__name__
            if found != KINDS[send]:
                surprises[f"{name}: {found}"] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sent, surprises


async def storm(server: Target, count: int, slow: int, floor_seconds: float) -> Verdict:
    verdict = Verdict("connections")
    draw = random.Random(0)
    port = server.port
    text = await server.greedy()
    await _send_all(port, min(count, 200), random.Random(1))  # caches fill, imports happen
    # Beside as many connections that behave, so that what is compared is the bytes and not the load.
    with probing(port, "/v1/completions", GOOD) as calm:
        await _behaving(port, count)
    before, files = await server.metrics(), server.footprint()
    with probing(port, "/v1/completions", GOOD) as good:
        slow_ones = [asyncio.create_task(_slow(port)) for _ in range(slow)]
        sent, surprises = await _send_all(port, count, draw)
    closed = await asyncio.gather(*slow_ones)
    idle = await server.seconds_to_idle()
    await asyncio.sleep(0.5)  # the last connections end
    after, files_after = await server.metrics(), server.footprint()
    calm_p99, good_p99 = percentile(calm.seconds, 0.99), percentile(good.seconds, 0.99)
    verdict.equal("connections that ended otherwise than they should", surprises.total(), 0)
    verdict.equal("good requests that failed", good.failures, 0)
    verdict.at_most("good requests' p99, ms", good_p99 * 1e3, 2 * max(calm_p99, floor_seconds) * 1e3)
    verdict.at_most("seconds until a slow head was closed, worst", max(closed), HEADER_SECONDS + SLOW_GRACE_SECONDS)
    verdict.equal("answers of 5xx", after.since(before, "nvfp4_http_responses_total", '"5xx"'), 0)
    verdict.equal("engines restarted", after.since(before, "nvfp4_engine_restarts_total"), 0)
    verdict.at_most("seconds until nothing was left", idle, IDLE_SECONDS)
    verdict.at_most("files open afterwards, more than before", files_after.num_files - files.num_files, 2)
    growth = (files_after.rss_bytes - files.rss_bytes) / MIB
    verdict.at_most("RSS growth, MiB", growth, 32)
    verdict.equal("greedy text is the same afterwards", await server.greedy() == text, True)
    verdict.figures = {
        "connections": dict(sent), "slow heads": slow, "surprises": dict(surprises),
        "good requests": len(good.seconds),
        "good requests' p50 / p99 beside behaving connections, ms": _ms(calm.seconds),
        "good requests' p50 / p99 in the storm, ms": _ms(good.seconds),
    }  # fmt: skip
    return verdict


async def _behaving(port: int, count: int) -> None:
    """A tenth as many connections as the storm has, at most 10,000, each with a plain request."""
    numbers = iter(range(min(max(count // 10, 200), 10_000)))

    async def client() -> None:
        for _ in numbers:
            await ask(port, post("/v1/completions", _COMPLETION))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def _ms(seconds: list[float]) -> list[float]:
    return [round(percentile(seconds, share) * 1e3, 1) for share in (0.5, 0.99)]


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """count: of connections (100,000 and 500 slow ones; short: 1,000 and 50)."""
    flags = (
        "--simulate", "--simulate-step-seconds", "0.001", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048",
        "--header-timeout", str(HEADER_SECONDS), "--log-level", "warning",
    )  # fmt: skip
    with target(flags) as server:
        if short:
            return asyncio.run(storm(server, count or SHORT_COUNT, SHORT_SLOW, SHORT_FLOOR_SECONDS))
        return asyncio.run(storm(server, count or COUNT, SLOW, FLOOR_SECONDS))
