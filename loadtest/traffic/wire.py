"""HTTP/1.1 with as little done per packet as can be: the time it came is noted, and it is parsed when all is there.

A client that parses each event as it comes delays the others that wait in the same turn of the event loop, and then
measures that.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from loadtest.traffic.call import Call, Outcome

_DATA, _DONE = b"data:", b"[DONE]"
GONE_EARLY = "connection closed before the answer's end"


@dataclass(frozen=True)
class Endpoint:
    """A server's chat route.

    headers   beside those of every request: a key, for one
    extra     fields of every body; None as a value leaves out one that is sent by default
    """

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)

    def request(self, call: Call) -> bytes:
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in call.messages],
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        payload = orjson.dumps({key: value for key, value in (body | dict(self.extra)).items() if value is not None})
        parts = urlsplit(self.url)
        headers = {"host": parts.netloc, "content-type": "application/json", "content-length": str(len(payload))}
        lines = [f"POST {parts.path.rstrip('/')}/v1/chat/completions HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (headers | dict(self.headers)).items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + payload

    @property
    def address(self) -> tuple[str, int, ssl.SSLContext | None]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, found {self.url!r}")
        context = ssl.create_default_context() if secure else None
        return parts.hostname, parts.port or (443 if secure else 80), context


class _Exchange(asyncio.Protocol):
    """One connection; one request at a time on it."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.status = 0
        self.answered: asyncio.Future[str | None] | None = None
        self.open = False
        self.transport: asyncio.Transport | None = None
        self._now = 0.0
        self._parser: httptools.HttpResponseParser | None = None

    def start(self, request: bytes) -> asyncio.Future[str | None]:
        """Send `request`; the future's result says why there is no whole answer, or None."""
        assert self.transport is not None
        self.pieces, self.status = [], 0
        self._parser = httptools.HttpResponseParser(self)
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answered

    # -- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = cast(asyncio.Transport, transport), True  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._now = time.perf_counter()
        self._end(GONE_EARLY)

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.close()

    def _end(self, failure: str | None) -> None:
        self._parser = None if failure else self._parser
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(failure)

    # -- httptools'

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if self._parser is not None and not self._parser.should_keep_alive():
            self.open = False  # closed by the server as soon as it gets to it
        self._end(None)

    @property
    def last(self) -> float:
        """When the last byte came, time.perf_counter()."""
        return self._now


class Client:
    """Sends calls to one endpoint over as many connections as are needed at once, kept for the next.

    started  what times count from, time.perf_counter()
    """

    def __init__(self, endpoint: Endpoint, started: float, timeout_seconds: float = 600.0) -> None:
        self._endpoint = endpoint
        self._host, self._port, self._ssl = endpoint.address
        self._started = started
        self._timeout = timeout_seconds
        self._idle: list[_Exchange] = []

    async def send(self, call: Call, due: float) -> Outcome:
        """The answer to `call`, which was due at `due`. Whatever goes wrong is its `failure`."""
        outcome = Outcome(due, call.max_tokens)
        request = self._endpoint.request(call)
        exchange, failure = None, ""
        try:
            async with asyncio.timeout(self._timeout):
                for fresh in (False, True):
                    exchange = await self._connection(fresh)
                    answered = exchange.start(request)
                    outcome.sent = time.perf_counter() - self._started
                    found = await answered
                    # a kept connection that the server closed meanwhile took nothing in: once more, on a new one
                    if found is None or fresh or exchange.status or exchange.pieces:
                        break
                failure = found or ""
        except TimeoutError:
            failure = f"no whole answer within {self._timeout:g} s"
        except OSError as error:
            failure = f"no connection: {error.strerror or error}"
        now = time.perf_counter() if exchange is None or failure else exchange.last
        outcome.ended = now - self._started
        if exchange is not None:
            self._keep(exchange, bool(failure))
            read_answer(outcome, exchange.status, exchange.pieces, self._started)
        # a body may also end with its connection: then [DONE] tells that it was whole
        if failure and not (failure == GONE_EARLY and outcome.arrivals and outcome.failure is None):
            outcome.failure = failure
        return outcome

    async def _connection(self, fresh: bool) -> _Exchange:
        while self._idle and not fresh:
            if (exchange := self._idle.pop()).open:
                return exchange
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Exchange, self._host, self._port, ssl=self._ssl)
        return made

    def _keep(self, exchange: _Exchange, failed: bool) -> None:
        if failed or not exchange.open:
            exchange.close()
        else:
            self._idle.append(exchange)

    def close(self) -> None:
        for exchange in self._idle:
            exchange.close()
        self._idle.clear()


def read_answer(outcome: Outcome, status: int, pieces: list[tuple[float, bytes]], started: float) -> None:
    """Fill `outcome` from the body as it came, piece by piece."""
    if status != 200:
        outcome.failure = f"HTTP {status}"
        return
    done = False
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):
                continue
            payload = line[len(_DATA) :].strip()
            if payload == _DONE:
                done = True
            elif not _read_event(outcome, payload, at - started):
                return
    if not done:
        outcome.failure = "the stream ended without [DONE]"
    elif not outcome.arrivals:
        outcome.failure = "an answer without text"
    elif outcome.completion_tokens is None:
        outcome.failure = "no usage: tokens cannot be counted"


def _read_event(outcome: Outcome, payload: bytes, at: float) -> bool:
    """Take one event in. False: it says that the answer failed."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        outcome.failure = "an event that is not JSON"
        return False
    if "error" in event:
        outcome.failure = f"error event: {str(event['error'])[:200]}"
        return False
    outcome.answer_id = event.get("id") or outcome.answer_id
    if usage := event.get("usage"):
        outcome.prompt_tokens, outcome.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if any(_brings_text(choice.get("delta") or {}) for choice in event.get("choices") or ()):
        outcome.arrivals.append(at)
    return True


def _brings_text(delta: Mapping[str, object]) -> bool:
    """The first event of a chat names the role and brings nothing yet; reasoning and tool calls are tokens as well."""
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls", "refusal"))
