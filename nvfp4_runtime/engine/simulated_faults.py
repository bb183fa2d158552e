"""Faults on demand for the simulated engine, so that what follows from them can be seen over HTTP. Torch-free."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from nvfp4_runtime.config import SimulatedFault
from nvfp4_runtime.engine.recovery import Executor
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, StepResult

_HANG_SECONDS = 3600.0


class SimulatedFaultError(Exception):
    """What --simulate-fault raises."""


class FaultyExecutor:
    """An executor to which `faults` happen. Steps are counted from 1, and anew in every engine process."""

    def __init__(self, inner: Executor, faults: tuple[SimulatedFault, ...]) -> None:
        self._inner = inner
        self._faults = faults
        self._num_steps = 0

    def probe(self) -> None:
        self._inner.probe()

    def execute(self, schedule: Schedule) -> list[StepResult]:
        self._num_steps += 1
        not_numbers: set[int] = set()
        for fault in self._faults:
            hit = {i for i, _ in self._hit(fault, schedule)}
            if not hit:
                continue
            match fault.kind:
                case "exception":
                    raise SimulatedFaultError("as --simulate-fault asked")
                case "memory":
                    raise MemoryError("as --simulate-fault asked")
                case "hang":
                    time.sleep(_HANG_SECONDS)
                case "death":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "nan":
                    not_numbers |= hit
        results = list(self._inner.execute(schedule))
        return [StepResult(None, finite=False) if i in not_numbers else result for i, result in enumerate(results)]

    def _hit(self, fault: SimulatedFault, schedule: Schedule) -> Iterator[tuple[int, Scheduled]]:
        if fault.step is not None:
            yield from enumerate(schedule.entries if fault.step == self._num_steps else ())
            return
        size = len(fault.prompt)
        for i, entry in enumerate(schedule.entries):
            prompt = entry.request.tokens[: entry.request.num_prompt_tokens]
            if any(tuple(prompt[at : at + size]) == fault.prompt for at in range(len(prompt) - size + 1)):
                yield i, entry
