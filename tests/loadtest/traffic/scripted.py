"""A server in a thread whose every byte a test has written."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from loadtest.traffic.wire import Endpoint

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter, dict, int], Awaitable[None]]  # writer, body, how many requests came before


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload: object) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def delta(**fields: object) -> dict:
    return {"id": "a1", "choices": [{"index": 0, "delta": fields}]}


def usage(prompt: int, completion: int) -> dict:
    return {"id": "a1", "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def whole(*payloads: object) -> bytes:
    """An answer in one piece, with its end."""
    return HEAD + b"".join(chunk(event(each)) for each in payloads) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def scripted(answer: Answer) -> Iterator[Endpoint]:
    loop = asyncio.new_event_loop()
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length))
                count += 1
                await answer(writer, body, count - 1)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0, backlog=512))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(_end_all())
        loop.close()
