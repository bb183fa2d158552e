"""What /v1/responses keeps: finished responses and running ones, in bounded memory and for a bounded time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from nvfp4_runtime.errors import QueueFullError
from server.errors import ResponseNotFoundError

OVERHEAD = 6  # a parsed JSON text takes about this many times its bytes in memory


@dataclass
class StoredResponse:
    """One response as it was answered, and the conversation up to and including it.

    owner     whose API key made it (see terms.py); to others it does not exist
    messages  role and content of every turn, without the instructions, which are not carried over
    task      what generates it, where it runs in the background
    """

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    owner: str = ""
    task: asyncio.Task[None] | None = None
    expires: float = 0.0
    num_bytes: int = field(default=0, init=False)

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class ResponseStore:
    """Responses by id. The oldest go when there are more than `max_bytes`, and each after `seconds`.

    What runs in the background is never dropped; more of it than `max_bytes` is refused.
    """

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response, new or changed, as the newest; one that is larger than the bound is not kept.

        Raises QueueFullError for one in the background for which there is no room beside the others.
        """
        self._drop(response.body["id"])
        response.num_bytes = OVERHEAD * (len(orjson.dumps(response.body)) + len(orjson.dumps(response.messages)))
        if response.running:
            busy = sum(other.num_bytes for other in self._responses.values() if other.running)
            if response.body["status"] == "in_progress" and busy + response.num_bytes > self._max_bytes:
                raise QueueFullError("too much is running in the background; try again later")
        elif response.num_bytes > self._max_bytes:
            return
        response.expires = self._clock() + self._seconds
        self._responses[response.body["id"]] = response
        self.num_bytes += response.num_bytes
        self._shrink()

    def get(self, response_id: str, owner: str = "") -> StoredResponse:
        """Raises ResponseNotFoundError for what was never here, is too old, had to make room, or is another's."""
        self._shrink()
        response = self._responses.get(response_id)
        if response is None or response.owner != owner:
            raise ResponseNotFoundError(response_id)
        return response

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def delete(self, response_id: str, owner: str = "") -> None:
        """Forget a response; one that runs is stopped. Raises ResponseNotFoundError."""
        response = self.get(response_id, owner)
        if response.task is not None:
            response.task.cancel()
        self._drop(response_id)

    def __len__(self) -> int:
        return len(self._responses)

    async def close(self) -> None:
        """Stop what runs in the background."""
        tasks = [response.task for response in self._responses.values() if response.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drop(self, response_id: str) -> None:
        if (old := self._responses.pop(response_id, None)) is not None:
            self.num_bytes -= old.num_bytes

    def _shrink(self) -> None:
        now = self._clock()
        for response_id, response in list(self._responses.items()):
            if response.running:
                continue
            if response.expires > now and self.num_bytes <= self._max_bytes:
                break  # the rest is younger
            self._drop(response_id)
