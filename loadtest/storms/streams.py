"""Thousands of streams at once: some decode slowly, the others wait for their turn, and all are answered whole.

The first --max-num-seqs streams are long, so that every other one is open and waits while the probes are timed and
memory is read; then the waiting ones pass through, short. Each stream is a connection of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

from loadtest.storms.connection import post
from loadtest.storms.probe import probing
from loadtest.storms.target import IDLE_SECONDS, Target, target
from loadtest.storms.verdict import Verdict, percentile

FIRST_TOKENS, LATER_TOKENS = 8, 4  # of a stream, beside what the ramp and the hold need
CONNECTING = 200  # at once: below any listen backlog
PER_SECOND = 400  # streams opened, as the ramp is planned; slower is as good, the long ones wait for the last
KIB = 1 << 10


@dataclass(frozen=True)
class _Size:
    count: int
    step_seconds: float
    hold_seconds: float
    health_ms: float  # CI's short form runs beside other tests

    @property
    def decoding(self) -> int:
        return max(1, self.count // 10)

    @property
    def long_tokens(self) -> int:
        return FIRST_TOKENS + round((self.count / PER_SECOND + self.hold_seconds) / self.step_seconds)


LONG, SHORT = _Size(10_000, 0.5, 10.0, 50), _Size(400, 0.1, 1.0, 500)


class _Stream(asyncio.Protocol):
    """Sends one request and keeps what is needed to judge the answer, not the answer."""

    def __init__(self, request: bytes, ended: Counter[str], opened: asyncio.Semaphore) -> None:
        self._request = request
        self._ended = ended
        self._opened = opened
        self._begun = False
        self._head = b""
        self._tail = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)
        # A queued stream is sent its head only with its first token: what can be known is that the request was sent.
        self._opened.release()

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            self._head = data[:12]
        self._tail = (self._tail + data)[-400:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended[self._outcome()] += 1
        self.done.set_result(None)

    def _outcome(self) -> str:
        status = self._head[9:12].decode()
        if status != "200":
            return status or "no answer"
        # The answer is chunked: after [DONE] comes the empty chunk.
        whole = b"data: [DONE]" in self._tail and self._tail.endswith(b"0\r\n\r\n")
        return "whole" if whole and b'"error"' not in self._tail else "cut off"


def _request(number: int, tokens: int) -> bytes:
    body = {"prompt": f"stream {number}", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return post("/v1/completions", body, {"connection": "close"})


async def _open_all(port: int, size: _Size) -> tuple[list[_Stream], Counter[str]]:
    loop = asyncio.get_running_loop()
    ended: Counter[str] = Counter()
    connecting = asyncio.Semaphore(CONNECTING)
    streams: list[_Stream] = []
    for number in range(size.count):
        await connecting.acquire()
        request = _request(number, size.long_tokens if number < size.decoding else LATER_TOKENS)
        make = partial(_Stream, request, ended, connecting)
        _, stream = await loop.create_connection(make, "127.0.0.1", port)
        streams.append(stream)
    return streams, ended


async def _waiting(server: Target, count: int) -> None:
    """Until the engine has taken `count` requests; TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while True:
            metrics = await server.metrics()
            if metrics.total("vllm:num_requests_running") + metrics.total("vllm:num_requests_waiting") >= count:
                return
            await asyncio.sleep(0.2)


async def storm(server: Target, size: _Size) -> Verdict:
    count = size.count
    verdict = Verdict("streams")
    text = await server.greedy(max_tokens=4)
    before = server.footprint()
    loop = asyncio.get_running_loop()
    started = loop.time()
    with probing(server.port) as health:
        streams, ended = await _open_all(server.port, size)
        opened = loop.time() - started
        await _waiting(server, count)
        held = await server.metrics()
        footprint = server.footprint()
        open_then = count - ended.total()
        await asyncio.gather(*(stream.done for stream in streams))
    seconds = loop.time() - started
    verdict.equal("streams open at once", open_then, count)
    verdict.equal("streams answered whole", ended["whole"], count)
    verdict.at_least("of them decoding", held.total("vllm:num_requests_running"), size.decoding)
    verdict.at_most("KiB a stream", (footprint.rss_bytes - before.rss_bytes) / count / KIB, 60)
    verdict.equal("/health answers other than 200", health.failures, 0)
    verdict.at_most("/health p99, ms", percentile(health.seconds, 0.99) * 1e3, size.health_ms)
    verdict.at_most("seconds until nothing was left", await server.seconds_to_idle(), IDLE_SECONDS)
    verdict.equal("greedy text is the same afterwards", await server.greedy(max_tokens=4) == text, True)
    verdict.figures = {
        "ended": dict(ended),
        "seconds to open all": round(opened, 1),
        "seconds in all": round(seconds, 1),
        "/health p50, ms": round(percentile(health.seconds, 0.5) * 1e3, 1),
        "/health questions": len(health.seconds),
        "RSS, MiB, before and with all open": [before.rss_bytes >> 20, footprint.rss_bytes >> 20],
    }
    return verdict


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """count: of streams (10,000; short: 400), a tenth of which decodes."""
    size = SHORT if short else LONG
    size = replace(size, count=count or size.count)
    flags = (
        "--simulate", "--simulate-step-seconds", str(size.step_seconds), "--max-num-seqs", str(size.decoding),
        "--max-num-batched-tokens", str(max(2048, 32 * size.decoding)), "--max-queued-requests", str(size.count),
        "--num-kv-blocks", str(64 * size.decoding), "--log-level", "warning",
    )  # fmt: skip
    with target(flags) as server:
        return asyncio.run(storm(server, size))
