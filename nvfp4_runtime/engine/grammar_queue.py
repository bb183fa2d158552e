"""Requests whose grammar is being compiled: beside the steps, bounded in time, and then admitted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.engine.shortest_first import ShortestFirst
from nvfp4_runtime.errors import RequestError
from nvfp4_runtime.structured.compiler import GrammarCompiler
from nvfp4_runtime.structured.spec import StructuredSpec

COMPILE_SECONDS = 10.0


@dataclass
class _Waiting:
    """`started`: when its compile began; None while it waits for its turn."""

    submit: Submit
    started: float | None = None
    done: Future[object] = field(default_factory=Future)


class GrammarQueue:
    """Compiles in threads of its own (the library drops the interpreter lock). Used from the engine's thread.

    The library's own limits end a compile; `COMPILE_SECONDS` says how long a request waits for that, from when its turn
    has come: what others took is not held against it. Grammars that need a trial may take seconds and have a thread of
    their own; the others do not wait for them. In each thread tenants take turns, and of each short ones go first.
    `fileno` becomes readable when a request has become ready, so that an idle engine can sleep until then.
    """

    def __init__(self, grammars: GrammarCompiler, clock: Callable[[], float] = time.monotonic) -> None:
        self._grammars = grammars
        self._clock = clock
        self._quick, self._tried = ShortestFirst("grammar"), ShortestFirst("grammar-trial")
        self._waiting: dict[str, _Waiting] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        return self._reader

    def __len__(self) -> int:
        return len(self._waiting)

    def takes(self, submit: Submit) -> bool:
        """Whether `submit` has to wait for its grammar; it is then kept here until `ready` gives it back."""
        spec = submit.params.structured
        if spec is None or self._grammars.knows(spec):
            return False
        waiting = self._waiting[submit.request_id] = _Waiting(submit)
        line = self._tried if self._grammars.needs_trial(spec) else self._quick
        waiting.done = line.submit(submit.tenant, len(spec.value), partial(self._compile, spec, waiting))
        waiting.done.add_done_callback(self._wake)
        return True

    def drop(self, request_id: str) -> bool:
        """Forget a request; whether it was here."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.done.cancel()
        return waiting is not None

    def seconds_left(self) -> float | None:
        """Until somebody's patience ends; None when nobody waits."""
        if not self._waiting:
            return None
        now = self._clock()  # one whose turn has not come has all its time left, whenever it comes
        return max(
            0.0,
            min(now if one.started is None else one.started for one in self._waiting.values()) + COMPILE_SECONDS - now,
        )

    def ready(self) -> list[tuple[Submit, RequestError | None]]:
        """Requests whose wait is over, each with what came of it: None for a grammar, or why there is none."""
        with contextlib.suppress(BlockingIOError):  # nothing has ended; patience may have
            os.read(self._reader, 4096)
        over = []
        for request_id, one in list(self._waiting.items()):
            error: RequestError | None = None
            if one.done.done():
                failure = one.done.exception()
                if failure is not None and not isinstance(failure, RequestError):
                    raise failure  # a bug of ours, not the grammar's
                error = failure
            elif one.started is not None and self._clock() >= one.started + COMPILE_SECONDS:
                spec = one.submit.params.structured
                assert spec is not None
                error = spec.refused(f"took longer than {COMPILE_SECONDS:.0f} s to compile; simplify it")
            else:
                continue
            self.drop(request_id)
            over.append((one.submit, error))
        return over

    def close(self) -> None:
        self._quick.close()
        self._tried.close()
        os.close(self._reader)
        os.close(self._writer)

    def _compile(self, spec: StructuredSpec, waiting: _Waiting) -> object:
        waiting.started = self._clock()
        return self._grammars.compile(spec)

    def _wake(self, future: Future[object]) -> None:
        with contextlib.suppress(BlockingIOError):  # so full of wake-ups that one more changes nothing
            os.write(self._writer, b"x")
