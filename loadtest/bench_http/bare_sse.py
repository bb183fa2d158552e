"""The peer: Starlette under uvicorn, streaming ready-made events on a common tick. No model, no parsing, no metrics.

`python -m loadtest.bench_http.bare_sse PORT STEP_SECONDS NUM_TOKENS`. What it costs, any server on this stack costs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"simulated",'
    b'"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"


class Ticker:
    """Wakes all streams together every `seconds`, as an engine's step does."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tick = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            self._tick.set()
            self._tick = asyncio.Event()

    async def wait(self) -> None:
        await self._tick.wait()


def main() -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    port, step_seconds, num_tokens = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    ticker: Ticker | None = None
    task: asyncio.Task[None] | None = None

    async def events() -> AsyncIterator[bytes]:
        nonlocal ticker, task
        if ticker is None:
            ticker = Ticker(step_seconds)
            task = asyncio.create_task(ticker.run())
        for _ in range(num_tokens):
            await ticker.wait()
            yield EVENT
        yield DONE

    async def stream(request: Request) -> Response:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    async def short(request: Request) -> Response:
        await request.body()
        return Response(EVENT, media_type="application/json")

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    routes = [Route("/stream", stream, methods=["POST"]), Route("/short", short, methods=["POST"])]
    app = Starlette(routes=[*routes, Route("/health", health)])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
