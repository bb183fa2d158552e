"""What processes of this project do with each other."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process when the one that started it is gone, whatever either is doing by then.

    On Linux only; elsewhere the end of a pipe or socket has to be noticed. The system means the thread that started
    us: it must live as long as we should.

    parent  its pid. Given, this process ends at once when that one is gone already, which the system would not say
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def leave(code: int) -> NoReturn:
    """End the process now: the system takes memory and devices back faster than torch and the interpreter do."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
