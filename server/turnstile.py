"""Requests that arrive together begin a few at a time, so that running streams need not wait for the last of them."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

BEGUN_PER_TURN = 4  # parsing, encoding and submitting a short one takes some 0.4 ms


class Turnstile:
    """Lets BEGUN_PER_TURN POST requests begin in each turn of the event loop, in their order of arrival.

    Whatever else waits for the loop (timers, the tokens of running streams, probes) has its turn in between.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._pass()
        await self._app(scope, receive, send)

    async def _pass(self) -> None:
        loop = asyncio.get_running_loop()
        if self._num_begun == 0:
            loop.call_soon(self._next_turn)
        if self._num_begun < BEGUN_PER_TURN:
            self._num_begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._num_begun = 0
        while self._waiting and self._num_begun < BEGUN_PER_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # done: the server stopped waiting for it
                turn.set_result(None)
                self._num_begun += 1
        if self._num_begun:
            asyncio.get_running_loop().call_soon(self._next_turn)
