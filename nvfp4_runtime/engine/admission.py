"""Admission: how much may be running or waiting at once, and when to come back for what is too much. Torch-free.

Two bounds: requests in the engine, and prompt tokens of those that have not begun to answer. Where tenants (API keys)
share the engine, each may take at most SHARE times what it leaves free, so that nobody's flood shuts others out and yet
a lone tenant gets most of the room.

A refusal says when to come back: refused requests are given places in a line, one after the other, which moves as fast
as requests have been seen to end. Clients that keep to it return at the rate at which there is room for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvfp4_runtime.engine.messages import EngineInfo
from nvfp4_runtime.errors import QueueFullError

SHARE = 4
RATE_SECONDS = 10.0  # the past that counts for a rate
MAX_RETRY_SECONDS = 60.0


class Rate:
    """Amounts per second over the last RATE_SECONDS or so, older ones fading."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._sum = 0.0

    def add(self, amount: float) -> None:
        now = self._clock()
        self._sum = self._sum * math.exp((self._last - now) / RATE_SECONDS) + amount
        self._last = now

    def per_second(self) -> float:
        now = self._clock()
        # how much a steady 1 per second would have summed up to since the start
        weight = RATE_SECONDS * -math.expm1((self._started - now) / RATE_SECONDS)
        return self._sum * math.exp((self._last - now) / RATE_SECONDS) / weight if weight > 0 else 0.0


class _BusyClock:
    """Seconds in which there was something to drain: an idle hour says nothing of how fast things end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return self._before + (0.0 if self._since is None else self._clock() - self._since)

    def run(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def rest(self) -> None:
        self._before, self._since = self(), None


class _Bound:
    """So many of something, shared by tenants; and how fast it becomes free."""

    def __init__(self, limit: int, what: str, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.used = 0
        self._what = what
        self._clock = clock
        self._by_tenant: dict[str, int] = {}
        self._busy = _BusyClock(clock)
        self._drain = Rate(self._busy)
        self._line_ends = 0.0

    def check(self, tenant: str, amount: int) -> None:
        """Raise QueueFullError unless `amount` more fits. What is larger than the whole fits when there is nothing."""
        free = self.limit - self.used
        own = self._by_tenant.get(tenant, 0)
        if self.used == 0 or (amount <= free and (not tenant or own + amount <= SHARE * free)):
            return
        whose = "" if amount > free else f", {own} of them of this API key"
        raise QueueFullError(
            f"{self.used} {self._what} already{whose}; the bound is {self.limit}: try again later",
            self._retry_seconds(amount),
        )

    def _retry_seconds(self, amount: int) -> float:
        rate = self._drain.per_second()
        if rate <= 0:
            return 1.0  # nothing has ended yet, so nothing is known
        now = self._clock()
        self._line_ends = min(max(self._line_ends, now) + amount / rate, now + MAX_RETRY_SECONDS)
        return self._line_ends - now

    def take(self, tenant: str, amount: int) -> None:
        if self.used == 0:
            self._busy.run()
        self.used += amount
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + amount

    def give_back(self, tenant: str, amount: int) -> None:
        self.used -= amount
        self._drain.add(amount)
        if self.used == 0:
            self._busy.rest()
        left = self._by_tenant[tenant] - amount
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]


@dataclass
class _Admitted:
    tenant: str
    queued_tokens: int  # 0 once it has begun to answer


class Admission:
    """Who is in. `admit`, then `started` at the first output, then `ended`; `ended` alone will do."""

    def __init__(self, max_requests: int, max_queued_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = _Bound(max_requests, "requests are running or waiting", clock)
        self._tokens = _Bound(max_queued_tokens, "prompt tokens are waiting", clock)
        self._admitted: dict[str, _Admitted] = {}

    @classmethod
    def of(cls, info: EngineInfo) -> Admission:
        return cls(info.max_num_seqs + info.max_queued_requests, info.max_queued_tokens)

    @property
    def num_requests(self) -> int:
        return self._requests.used

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of requests that have not begun to answer."""
        return self._tokens.used

    def check_room(self, tenant: str = "", num_tokens: int = 1) -> None:
        """Raise QueueFullError, with the time to come back, if a request of so many prompt tokens would not get in."""
        self._requests.check(tenant, 1)
        self._tokens.check(tenant, num_tokens)

    def admit(self, request_id: str, tenant: str, num_tokens: int) -> None:
        """Take a request in, or raise QueueFullError."""
        self.check_room(tenant, num_tokens)
        self._requests.take(tenant, 1)
        self._tokens.take(tenant, num_tokens)
        self._admitted[request_id] = _Admitted(tenant, num_tokens)

    def started(self, request_id: str) -> None:
        entry = self._admitted.get(request_id)
        if entry is not None and entry.queued_tokens:
            self._tokens.give_back(entry.tenant, entry.queued_tokens)
            entry.queued_tokens = 0

    def ended(self, request_id: str) -> None:
        self.started(request_id)
        entry = self._admitted.pop(request_id, None)
        if entry is not None:
            self._requests.give_back(entry.tenant, 1)
