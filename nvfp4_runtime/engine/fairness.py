"""Which waiting request is next: by priority, then of the tenant that was served least, then by arrival. Torch-free.

A tenant is an API key; without keys there is one, and the order is first come first served. Service is counted in
tokens computed, prompt and answer alike. A tenant that comes back after a pause starts level with the one served least
of those that are here: a pause saves nothing up. Nobody starves within a priority: a request that waits is behind a
finite number of its own tenant's, and every other tenant that is served meanwhile falls behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nvfp4_runtime.engine.request import Request


class FairOrder:
    """How much each tenant was served."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}

    def enter(self, tenant: str, present: Iterable[Request]) -> None:
        """A request of `tenant` arrives where the requests `present` are."""
        if not tenant:
            return
        levels = {request.tenant: self._served[request.tenant] for request in present if request.tenant}
        if tenant not in levels:
            self._served[tenant] = max(self._served.get(tenant, 0), min(levels.values(), default=0))

    def charge(self, tenant: str, num_tokens: int) -> None:
        """`num_tokens` more are computed for `tenant`."""
        if tenant:
            self._served[tenant] += num_tokens

    def next(self, waiting: Sequence[Request]) -> Request:
        """The next of `waiting`, which is sorted by rank and not empty."""
        first = waiting[0]
        if len(self._served) < 2:
            return first
        chosen, least = first, self._served.get(first.tenant, 0)
        for request in waiting:
            if request.priority != first.priority:
                break
            if self._served.get(request.tenant, 0) < least:
                chosen, least = request, self._served.get(request.tenant, 0)
        return chosen
