"""The time a request may take, from its admission to its last token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nvfp4_runtime.errors import DeadlineExceededError, InvalidParameterError


class Deadline:
    """Calls `expire` with the error to end with, once, after `seconds`; not when cancelled before."""

    def __init__(self, seconds: float, expire: Callable[[DeadlineExceededError], None]) -> None:
        error = DeadlineExceededError(f"the request did not end within its {seconds:g} seconds")
        self._timer = asyncio.get_running_loop().call_later(seconds, expire, error)

    def cancel(self) -> None:
        self._timer.cancel()


def allowed_seconds(asked: float | None, limit: float) -> float:
    """What a request may take: `limit`, or less if it asks for less. InvalidParameterError (timeout) for more."""
    if asked is None:
        return limit
    if not 0 < asked <= limit:
        raise InvalidParameterError(
            f"timeout must be more than 0 and at most {limit:g} seconds, got {asked:g}", "timeout"
        )
    return asked
