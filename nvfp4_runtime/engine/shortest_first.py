"""One thread that does what it is given: tenants take turns, and of each the small things go first, so that a large one
does not hold up the many.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import chain, count

# A large thing lets smaller ones past that come within so many seconds per byte of the difference, then has its turn.
SECONDS_PER_BYTE = 1 / 20_000


class ShortestFirst:
    """Runs, of the tenant whose last turn is longest ago, what came first, each byte of its size counting as
    `SECONDS_PER_BYTE` later. Safe to use from several threads.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._order = count()  # of equals, the first that came
        # by tenant, the one whose turn is next in front; a tenant without work is not here
        self._waiting: dict[str, list[tuple[float, int, Future[object], Callable[[], object]]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, tenant: str, size_bytes: int, work: Callable[[], object]) -> Future[object]:
        """What `work` of `tenant` gives or raises, once its turn has come. Cancelling before that takes it out."""
        future: Future[object] = Future()
        with self._changed:
            due = self._clock() + size_bytes * SECONDS_PER_BYTE
            heapq.heappush(self._waiting.setdefault(tenant, []), (due, next(self._order), future, work))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Do nothing more; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for _, _, future, _ in chain.from_iterable(self._waiting.values()):
                future.cancel()
            self._waiting.clear()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                tenant = next(iter(self._waiting))
                heap = self._waiting.pop(tenant)
                _, _, future, work = heapq.heappop(heap)
                if heap:
                    self._waiting[tenant] = heap  # behind those that wait
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result raises it
                future.set_exception(error)
