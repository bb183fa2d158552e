"""What processes of this project do with each other."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it is gone, whatever either is doing by then.

    On Linux only; elsewhere the end of a pipe or socket has to be noticed. The system means the thread that started
    us: it must live as long as we should.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """What is started within gets no SIGINT and SIGTERM until it calls `ignore_held_back`.

    A terminal and most supervisors signal every process of a group; what had not begun to ignore that would end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_held_back() -> None:
    """Ignore SIGINT and SIGTERM, those that came since the start too: whoever started us decides when we end."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def allow_all_files() -> None:
    """Raise this process's bound on open files to what the system allows: each connection is one.

    1024, the usual start, is a bound for programs that use select().
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
