"""Wakes a coroutine at an instant, to some 0.1 ms: event loops' own timers are rounded to whole milliseconds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

_STOP_CHECK_SECONDS = 0.5


class Pacer:
    """A thread that sleeps until each of `instants` (time.perf_counter(), sorted) and says so to the event loop."""

    def __init__(self, instants: Sequence[float]) -> None:
        self._instants = instants
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.Queue[None] = asyncio.Queue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pacer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for instant in self._instants:
            while (left := instant - time.perf_counter()) > 0:
                time.sleep(min(left, _STOP_CHECK_SECONDS))
                if self._stopped.is_set():
                    return
            self._loop.call_soon_threadsafe(self._due.put_nowait, None)

    async def next(self) -> None:
        """Until the next instant has come."""
        await self._due.get()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
