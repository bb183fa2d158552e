"""Server-sent events: framing, errors after bytes have left, and clients that go away or stop reading."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import describe
from server.generation import ClientDisconnected, client_gone

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HOLE = "\0text\0"  # no id or model name holds a NUL
_WRITTEN_HOLE = orjson.dumps(_HOLE)


def data_line(body: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def named_event(body: Mapping[str, Any]) -> bytes:
    """An event that carries its type as its name too, as Anthropic's and the Responses API's do."""
    return b"event: " + str(body["type"]).encode() + b"\n" + data_line(body)


class ChunkWriter:
    """Writes the chunks of one answer. What never changes within an answer is serialised once."""

    def __init__(self, response_id: str, kind: str, created: int, model: str, fingerprint: str) -> None:
        head = orjson.dumps({"id": response_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._fingerprint = b',"system_fingerprint":' + orjson.dumps(fingerprint)

    def choice(self, choice: dict[str, Any], extra: Mapping[str, Any] | None = None, *, last: bool = False) -> bytes:
        """A chunk with one choice; `extra` fields (usage, prompt_token_ids) only where given."""
        fields = b"," + orjson.dumps(extra)[1:-1] if extra else b""
        return self._head + orjson.dumps(choice) + b"]" + (self._fingerprint if last else b"") + fields + b"}\n\n"

    def text_chunk(self, choice_around: Callable[[str], dict[str, Any]]) -> Callable[[str], bytes]:
        """Writes the chunk that `choice` would of `choice_around(text)`; all but the text is serialised once.

        `choice_around` gives the same choice for every text, with the text in one place.
        """
        before, after = self.choice(choice_around(_HOLE)).split(_WRITTEN_HOLE)
        return lambda text: before + orjson.dumps(text) + after

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last text chunk, with `choices: []`."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class SlowClientWatch:
    """Notices a client that has not taken an event for `limit_seconds`.

    One timer a stream, re-armed when it fires: a timeout around every event would cost more than the event.

    since    loop.time() when the event being sent was handed over; None while none waits
    too_slow done when the client was too slow
    """

    def __init__(self, limit_seconds: float) -> None:
        self.since: float | None = None
        self._limit = limit_seconds
        self._loop = asyncio.get_running_loop()
        self.too_slow: asyncio.Future[None] = self._loop.create_future()
        self._timer = self._loop.call_later(limit_seconds, self._check)

    def _check(self) -> None:
        waited = 0.0 if self.since is None else self._loop.time() - self.since
        if waited < self._limit:
            self._timer = self._loop.call_later(self._limit - waited, self._check)
        elif not self.too_slow.done():
            self.too_slow.set_result(None)

    def stop(self) -> None:
        self._timer.cancel()
        self.too_slow.cancel()


class EventStream(Response):
    """An SSE answer from a generator of ready-made chunks; this class adds `end`.

    The status leaves with the first chunk, so an error before it is an ordinary HTTP error. Later errors are an event
    made by `write_error` of an OpenAI error body, then `end`. When the client leaves, or takes nothing for
    `slow_client_seconds`, the generator is closed and `close` called, which aborts its requests.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        slow_client_seconds: float,
        end: bytes = DONE,
        write_error: Callable[[dict[str, Any]], bytes] = data_line,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # Response declares a length of 0; a stream has none.
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self._chunks = chunks
        self._close = close
        self._slow_client_seconds = slow_client_seconds
        self._end = end
        self._write_error = write_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = SlowClientWatch(self._slow_client_seconds)
        pump = asyncio.create_task(self._pump(send, watch))
        gone = asyncio.create_task(client_gone(receive))
        try:
            await asyncio.wait({pump, gone, watch.too_slow}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientDisconnected
            pump.result()
        finally:
            watch.stop()
            for task in (pump, gone):
                task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            await self._chunks.aclose()
            self._close()  # a generator that was never started has nothing to run when it is closed

    async def _pump(self, send: Send, watch: SlowClientWatch) -> None:
        clock = asyncio.get_running_loop().time
        started = False
        try:
            async for chunk in self._chunks:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                watch.since = clock()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                watch.since = None
            rest = self._end
        except Exception as error:
            if not started or isinstance(error, (ClientDisconnected, OSError)):
                raise
            status, body, _ = describe(error)
            if status == 500:
                logger.exception("a stream failed")
            rest = self._write_error(body) + self._end
        watch.since = clock()
        await send({"type": "http.response.body", "body": rest, "more_body": False})
