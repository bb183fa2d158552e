"""Parts of the benchmark as child processes that print one JSON object per finding, under one budget of time.

A fault on a GPU ends the process it happens in; the findings printed before it are kept, and the next part starts anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Rows = list[dict[str, Any]]


@dataclass
class Outcome:
    """What a part found, and how it ended: "" if well, else for a person to read."""

    part: str
    rows: Rows = field(default_factory=list)
    trouble: str = ""
    seconds: float = 0.0


class Budget:
    """Seconds for everything, and how parts share them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()


def run_part(
    part: str,
    module: str,
    arguments: Sequence[str],
    budget: Budget,
    at_most: float,
    environment: Mapping[str, str] | None = None,
    least: float = 5.0,
) -> Outcome:
    """`python -m MODULE ARGUMENTS`, ended after `at_most` seconds or when the budget is spent.

    least  seconds below which it is not worth starting
    """
    outcome = Outcome(part)
    limit = min(at_most, budget.left)
    if limit < least:
        outcome.trouble = "not started: no time is left in the budget (see --budget)"
        return outcome
    started = time.monotonic()
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env=os.environ | dict(environment or {}),
            start_new_session=True,  # an engine is a child of the part: both end together
        )
        try:
            code = process.wait(timeout=limit)
            if code:
                outcome.trouble = f"ended with code {code}: {_tail(errors)}"
        except subprocess.TimeoutExpired:
            outcome.trouble = f"stopped after {limit:.0f} s: {_tail(errors)}"
        finally:
            _end_group(process)
        out.seek(0)
        outcome.rows = [row for line in out.read().splitlines() if (row := _finding(line)) is not None]
    outcome.seconds = time.monotonic() - started
    return outcome


def _finding(line: bytes) -> dict[str, Any] | None:
    """A finding, or None for a line that is something else, such as one cut off in the middle."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "part" in found else None


def _tail(errors: Any) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-4:])[-600:] or "it said nothing"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started; what has ended already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
