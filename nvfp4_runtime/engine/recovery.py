"""What happens when a step raises: the request at fault ends with an error, every other one goes on. Torch-free.

Where it is raised decides how the guilty request is found.

execute, sample   the scheduler's state is as it was, so the same entries run again, halves at a time, until the one
                  that fails alone is known. What they write into the cache they write once more, to the same slots;
                  a model's recurrent states, which a failed step may have moved on, are computed from the first token.
                  Out of memory, the request that ranks last first gives its blocks back and the rest is tried once.
schedule, commit  the state may be half changed. Everything that follows from the requests' tokens (blocks, queues,
                  what is computed) is made anew from them, as after a preemption of all; the request that was being
                  handled ends, in `schedule` only if it has failed before.

When a request failed alone, the executor proves with one token that it still works; if that raises twice, nobody can
be served and the error ends the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from nvfp4_runtime.engine.messages import TokenOutput
from nvfp4_runtime.engine.request import Request, Status
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, Scheduler, StepResult
from nvfp4_runtime.errors import EngineDeadError

logger = logging.getLogger(__name__)

ENGINE_FAULT = "engine_fault"
OUT_OF_MEMORY = "out_of_memory"
_MESSAGES = {
    ENGINE_FAULT: "the engine failed on this request; the server's log says why",
    OUT_OF_MEMORY: "the engine ran out of memory on this request, alone and after a second try",
}
_NOT_COMPUTED = StepResult(None)  # of a stale entry: nobody reads it


class Executor(Protocol):
    """Runs a schedule: the model and the sampler, or their simulation."""

    def execute(self, schedule: Schedule) -> Sequence[StepResult]:
        """One StepResult per entry, in order."""
        ...

    def probe(self) -> None:
        """Compute one token that keeps nothing. Raises when the executor cannot compute any more."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """MemoryError, torch's OutOfMemoryError (known by name: torch is not imported here) and its CPU allocator's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


class Recovery:
    """Schedules, executes and commits like the parts it is given, whatever they raise.

    restore_grammar  puts a request's grammar where its tokens are: a failed step may have moved it on
    num_faults       exceptions that ended a request or made the scheduler start over
    num_memory       times a step did not get the memory it asked for
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, restore_grammar: Callable[[Request], None]) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._restore_grammar = restore_grammar
        self.num_faults = 0
        self.num_memory = 0

    # -- the parts of a step -------------------------------------------------------------------------------------

    def schedule(self) -> tuple[Schedule, list[TokenOutput]]:
        """The next schedule, or none and the output of the request that ended instead."""
        try:
            return self._scheduler.schedule(), []
        except Exception as error:
            request = self._scheduler.handling
            if request is None:
                raise
            request.num_faults += 1
            return Schedule(()), self._start_over(request, error, ends=request.num_faults > 1)

    def execute(self, schedule: Schedule) -> Sequence[StepResult]:
        """One result per entry. Raises what the executor raised only if it does not work any more."""
        try:
            return self._run(schedule.entries)
        except Exception as error:  # noqa: BLE001 - logged with the request at fault, once that is known
            return self.redo(schedule, error)

    def redo(self, schedule: Schedule, error: Exception) -> Sequence[StepResult]:
        """The results of a schedule whose execution raised `error`; entries that are stale by now are left out."""
        if isinstance(error, EngineDeadError):  # nothing can be run again
            raise error
        entries = [entry for entry in schedule.entries if not entry.is_stale]
        results: dict[int, StepResult] = {}
        self._restore(entries)
        if is_out_of_memory(error):
            self.num_memory += 1
            entries, failure = self._with_more_memory(entries, results)
        else:
            failure = error
        if failure is not None and entries:
            self._isolate(entries, failure, results)
            if any(result.code in _MESSAGES for result in results.values()):
                self._probe()
        return [results.get(id(entry), _NOT_COMPUTED) for entry in schedule.entries]

    def again(self, schedule: Schedule) -> Sequence[StepResult]:
        """The results of a schedule that was run on what a failed step left behind, run on what is right now."""
        entries = [entry for entry in schedule.entries if not entry.is_stale]
        if not entries:
            return [_NOT_COMPUTED] * len(schedule.entries)
        self._restore(entries)
        try:
            found = self._rerun(entries)
        except Exception as error:  # noqa: BLE001 - logged with the request at fault, once that is known
            found = self.redo(Schedule(tuple(entries)), error)
        results = dict(zip(map(id, entries), found, strict=True))
        return [results.get(id(entry), _NOT_COMPUTED) for entry in schedule.entries]

    def commit(self, schedule: Schedule, results: Sequence[StepResult]) -> list[TokenOutput]:
        """Take the results; an entry that cannot be committed ends its request, those behind it are computed again."""
        now = time.monotonic()
        outputs: list[TokenOutput] = []
        for entry, result in zip(schedule.entries, results, strict=True):
            if entry.is_stale:  # while the step ran
                continue
            try:
                output = self._scheduler.commit(entry, result, now)
            except Exception as error:  # noqa: BLE001 - logged there
                outputs += self._start_over(entry.request, error, ends=True)
                continue
            if output is not None:
                outputs.append(output)
        return outputs

    def abort(self, request_id: str) -> TokenOutput | None:
        """As the scheduler's; what it raises does not keep the request alive."""
        request = self._scheduler.requests.get(request_id)
        try:
            return self._scheduler.abort(request_id)
        except Exception as error:
            if request is None:
                raise
            self._start_over(request, error, ends=True)
            return TokenOutput(request_id, [], finish_reason="abort", times=request.times)

    def add(self, request: Request) -> None:
        """As the scheduler's; if it raises, the request is not there."""
        try:
            self._scheduler.add(request)
        except Exception as error:
            self._start_over(request, error, ends=True)
            raise

    # -- execution -----------------------------------------------------------------------------------------------

    def _run(self, entries: Sequence[Scheduled]) -> Sequence[StepResult]:
        results = self._executor.execute(Schedule(tuple(entries)))
        assert len(results) == len(entries), f"{len(results)} results for {len(entries)} entries"
        return results

    def _rerun(self, entries: Sequence[Scheduled]) -> Sequence[StepResult]:
        """As `_run`, for entries that were run before: recurrent states are first brought to where each one starts."""
        if self._scheduler.num_state_slots:
            self._catch_up(entries)
        return self._run(entries)

    def _catch_up(self, entries: Sequence[Scheduled]) -> None:
        """Compute what lies before each entry once more, from the first token, in steps no larger than any other."""
        budget = free = self._scheduler.config.max_num_batched_tokens
        pieces: list[Scheduled] = []
        for entry in entries:
            at = 0
            while at < entry.start:
                pieces.append(replace(entry, start=at, count=min(entry.start - at, free), samples=False))
                at, free = pieces[-1].stop, free - pieces[-1].count
                if not free:
                    self._run(pieces)
                    pieces, free = [], budget
        if pieces:
            self._run(pieces)

    def _with_more_memory(
        self, entries: list[Scheduled], results: dict[int, StepResult]
    ) -> tuple[list[Scheduled], Exception | None]:
        """Preempt the last in rank and try the others once. Returns what is left to do, and why it failed."""
        if not entries:
            return [], None
        last = max(entries, key=lambda entry: entry.request.rank)
        if len(entries) == 1 and last.request.num_memory_faults > 0:
            return entries, MemoryError("a second time, alone")
        last.request.num_memory_faults += 1
        try:
            self._scheduler.preempt(last.request)
        except Exception as error:  # noqa: BLE001 - logged there
            self._start_over(last.request, error, ends=False)
            return [], None
        rest = [entry for entry in entries if entry is not last]
        if not rest:
            return [], None
        try:
            results.update((id(entry), result) for entry, result in zip(rest, self._rerun(rest), strict=True))
        except Exception as error:  # noqa: BLE001 - goes to _isolate, which logs it
            self._restore(rest)
            return rest, error
        return [], None

    def _isolate(self, entries: Sequence[Scheduled], error: Exception, results: dict[int, StepResult]) -> None:
        """Run halves, and halves of those that fail: k guilty of n cost some 2 k log n executions."""
        if len(entries) == 1:
            results[id(entries[0])] = self._failed(entries[0].request, error)
            return
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            try:
                results.update((id(entry), result) for entry, result in zip(half, self._rerun(half), strict=True))
            except Exception as again:  # noqa: BLE001 - logged when one entry is left
                self._restore(half)
                self._isolate(half, again, results)

    def _probe(self) -> None:
        try:
            self._executor.probe()
        except Exception:
            logger.exception("one token that keeps nothing could not be computed; once more, then the engine ends")
            self._executor.probe()

    def _failed(self, request: Request, error: Exception) -> StepResult:
        self.num_faults += 1
        code = OUT_OF_MEMORY if is_out_of_memory(error) else ENGINE_FAULT
        logger.error("request %s ends: its step raised", request.id, exc_info=error)
        return StepResult(None, finite=False, error=_MESSAGES[code], code=code)

    def _restore(self, entries: Sequence[Scheduled]) -> None:
        for entry in entries:
            self._restore_grammar(entry.request)

    # -- the scheduler's state -----------------------------------------------------------------------------------

    def _start_over(self, request: Request, error: Exception, ends: bool) -> list[TokenOutput]:
        """Make the scheduler's state anew from the requests' tokens; with `ends`, without `request`."""
        self.num_faults += 1
        logger.error(
            "the scheduler raised while it handled request %s, %s; all others are computed again",
            request.id,
            "which ends" if ends else "which is tried again",
            exc_info=error,
        )
        self._scheduler.start_over(without=request if ends else None)
        for survivor in self._scheduler.requests.values():
            self._restore_grammar(survivor)
        if not ends:
            return []
        request.start_over()
        request.status = Status.FINISHED
        request.times.finished = time.monotonic()
        code = OUT_OF_MEMORY if is_out_of_memory(error) else ENGINE_FAULT
        return [
            TokenOutput(
                request.id, [], finish_reason="error", error=_MESSAGES[code], error_code=code, times=request.times
            )
        ]
