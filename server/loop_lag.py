"""How late the event loop wakes a timer: what every request waits, at least, when this process is busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PERIOD_SECONDS = 0.02


async def watch_loop_lag(observe: Callable[[float], None]) -> None:
    """Call `observe(seconds late)` each period until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PERIOD_SECONDS
        await asyncio.sleep(PERIOD_SECONDS)
        observe(max(0.0, loop.time() - due))
