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

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last text chunk, with `choices: []`."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


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
        pump = asyncio.create_task(self._pump(send))
        watch = asyncio.create_task(client_gone(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientDisconnected
            pump.result()
        finally:
            for task in (pump, watch):
                task.cancel()
            await asyncio.gather(pump, watch, return_exceptions=True)
            await self._chunks.aclose()
            self._close()  # a generator that was never started has nothing to run when it is closed

    async def _pump(self, send: Send) -> None:
        started = False
        try:
            async for chunk in self._chunks:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                await self._send(send, chunk)
        except Exception as error:
            if not started or isinstance(error, (ClientDisconnected, OSError)):
                raise
            status, body, _ = describe(error)
            if status == 500:
                logger.exception("a stream failed")
            await self._send(send, self._write_error(body))
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._slow_client_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError as error:
            raise ClientDisconnected from error
