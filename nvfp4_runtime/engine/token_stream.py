"""The outputs of one request on their way from the engine to whoever reads them. Torch-free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from nvfp4_runtime.engine.messages import TokenOutput
from nvfp4_runtime.errors import NVFP4Error, SlowReaderError


class TokenStream:
    """The outputs of one request, in order; the last carries a finish_reason.

    A reader that lags gets what has gathered as one output: under load the server then writes fewer, larger events.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._waiting: deque[TokenOutput | NVFP4Error] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._ended = False
        self._complete = False
        self._max_bytes: int | None = None
        self._waiting_bytes = 0
        self._on_overflow: Callable[[], None] = lambda: None

    def bound(self, max_bytes: int, on_overflow: Callable[[], None]) -> None:
        """Keep at most about `max_bytes` for a reader that lags: more ends the stream with SlowReaderError."""
        self._max_bytes, self._on_overflow = max_bytes, on_overflow

    def fail(self, error: NVFP4Error) -> None:
        """End the stream with an error, in place of what is not read yet. Nothing if its last output has come."""
        if not self._complete:
            self._waiting.clear()
            self.put(error)

    def put(self, item: TokenOutput | NVFP4Error) -> None:
        if self._complete:
            return  # it failed, and this is what the engine said until it knew
        if isinstance(item, NVFP4Error):
            self._complete = True
        else:
            self._complete = item.finish_reason is not None
            if self._max_bytes is not None and self._waiting and not self._complete:
                self._waiting_bytes += item.num_bytes
                if self._waiting_bytes > self._max_bytes:
                    self.fail(SlowReaderError(f"more than {self._max_bytes} bytes of the answer wait for its reader"))
                    self._on_overflow()
                    return
        self._waiting.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        while not self._waiting:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._waiting.popleft()
        if isinstance(item, NVFP4Error):
            self._ended = True
            raise item
        while (
            self._waiting and not isinstance(later := self._waiting[0], NVFP4Error) and later.finish_reason != "error"
        ):
            item.absorb(later)
            self._waiting.popleft()
        self._waiting_bytes = 0
        self._ended = item.finish_reason is not None
        return item
