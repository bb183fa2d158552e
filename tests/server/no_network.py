"""A ban on outbound connections: whoever tries one gets an error, and the test fails even if that is caught."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_bans: list[list[str]] = []
_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
_installed = False


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if _bans and event in _EVENTS:
        target = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        if isinstance(target, str | bytes) and event == "socket.connect":
            return  # a Unix socket's path
        for attempts in _bans:
            attempts.append(f"{event} {target!r}")
        raise PermissionError(f"{event} {target!r}: the server connects to nobody")


@contextmanager
def no_network() -> Iterator[None]:
    """Within it no socket of this process connects and no name is resolved; AssertionError at its end if one tried."""
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_on_event)  # cannot be taken away again, so it is told when it counts
    attempts: list[str] = []
    _bans.append(attempts)
    try:
        yield
    finally:
        _bans[:] = [ban for ban in _bans if ban is not attempts]
    assert not attempts, f"outbound connections: {attempts}"
