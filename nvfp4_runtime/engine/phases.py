"""Start-up in phases: what each took, reported as they pass. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nvfp4_runtime.engine.engine import Engine

ProgressCallback = Callable[[str, float], None]


class Phases:
    """Seconds by phase of start-up, reported as they pass."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        """Times what happens inside, which may report how far it is, 0 to 1."""

        def report(fraction: float) -> None:
            if self._progress is not None:
                self._progress(name, fraction)

        report(0.0)
        started = time.perf_counter()
        yield report
        self.seconds[name] = time.perf_counter() - started
        report(1.0)

    def carve(self, name: str, seconds: float, out_of: str) -> None:
        """Part of what `out_of` took was a phase of its own."""
        self.seconds[out_of] -= seconds
        self.seconds[name] = seconds


@dataclass(frozen=True)
class Placement:
    """A loaded model where it will run.

    num_blocks  of its KV cache
    max_len     tokens of the longest sequence it takes
    make        the engine over it, of the other arguments of `Engine`
    scratch_bytes  what steps hold beside weights and cache, by purpose, where that was measured
    """

    num_blocks: int
    max_len: int
    make: Callable[..., Engine]
    scratch_bytes: dict[str, int] = field(default_factory=dict)
