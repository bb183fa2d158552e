"""OverlappedEngine: the next step is scheduled and launched while the device runs this one. Torch-free.

A turn launches step n + 1 before it reads the results of step n. That works because the scheduler counts what is
scheduled as done (see `Scheduler.schedule`) and because sampled tokens stay on the device, where the next step takes
them from. What follows from reading one step late:

- A stop token is seen when the step behind it is under way; what that step gives for the request is dropped. Length
  limits are known beforehand, so no step runs for them.
- Blocks given back (an end, an abort, a preemption) may still be written by the step under way. Their next owner's
  step comes after it on the device and overwrites what it reads, so nobody sees that.
- Full blocks can be found by others one step later than in the plain engine.
- A step that raised is computed again, and so is the one launched behind it: see `_land_failed`.
- Where the host chooses tokens (edits of logits, logprobs; see `Ticket.chosen_on_host`), the next step needs them
  before it can be scheduled: such a step is read first, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import TokenOutput
from nvfp4_runtime.engine.scheduler import Schedule, StepResult


class Ticket(Protocol):
    """A launched step.

    chosen_on_host  some of its tokens do not exist before `wait`, so no step that needs them can be launched
    """

    chosen_on_host: bool

    def wait(self) -> Sequence[StepResult]:
        """Block until the step has run; one StepResult per entry, in order. Called once, in the order of launches."""
        ...


class Launcher(Protocol):
    """An executor that does not wait. At most two launched steps have not been waited for."""

    def launch(self, schedule: Schedule) -> Ticket: ...

    def execute(self, schedule: Schedule) -> Sequence[StepResult]: ...

    def probe(self) -> None: ...

    def settle(self) -> None:
        """Wait until nothing that was launched runs any more, whatever it raises."""
        ...


@dataclass(frozen=True)
class _Flight:
    schedule: Schedule
    ticket: Ticket


class OverlappedEngine(Engine):
    """The same requests in and the same tokens out as `Engine`, one turn later where a step is under way."""

    executor: Launcher
    _under_way: _Flight | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._under_way is not None

    def _turn(self) -> tuple[list[TokenOutput], int]:
        """Schedule and launch the next step, then commit the one before it."""
        outputs: list[TokenOutput] = []
        num_prompt_tokens = 0
        if self._under_way is not None and self._under_way.ticket.chosen_on_host:
            outputs, num_prompt_tokens = self._land(self._under_way)
            self._under_way = None
        before, self._under_way = self._under_way, None
        schedule, ended = self.recovery.schedule()
        outputs += ended
        self._clock.lap("schedule")
        failure: Exception | None = None
        if schedule.entries:
            self._announce(schedule)
            try:
                self._under_way = _Flight(schedule, self.executor.launch(schedule))
            except Exception as error:  # noqa: BLE001 - handled below, after the step before it
                failure = error
        self._clock.lap("launch")
        if before is not None:
            landed, num_prompt_tokens = self._land(before) if failure is None else self._compute_again(before)
            outputs += landed
        if failure is not None:
            outputs += self.recovery.commit(schedule, self.recovery.redo(schedule, failure))
            num_prompt_tokens += schedule.num_prompt_tokens
        return outputs, num_prompt_tokens

    def _land(self, flight: _Flight) -> tuple[list[TokenOutput], int]:
        num_prompt_tokens = flight.schedule.num_prompt_tokens
        try:
            results = flight.ticket.wait()
        except Exception as error:  # noqa: BLE001 - handed on
            outputs, more = self._land_failed(flight, error)
            return outputs, num_prompt_tokens + more
        self._clock.lap("wait")
        self._work.add(self._cost.of_step(flight.schedule))
        outputs = self.recovery.commit(flight.schedule, results)
        self._clock.lap("commit")
        return outputs, num_prompt_tokens

    def _land_failed(self, flight: _Flight, error: Exception) -> tuple[list[TokenOutput], int]:
        """Compute a step again, and the one behind it, which took tokens from it: both waited for."""
        behind, self._under_way = (None, None) if self._under_way is flight else (self._under_way, None)
        self.executor.settle()
        outputs = self.recovery.commit(flight.schedule, self.recovery.redo(flight.schedule, error))
        if behind is None:
            return outputs, 0
        more, num_prompt_tokens = self._compute_again(behind)
        return outputs + more, num_prompt_tokens

    def _compute_again(self, flight: _Flight) -> tuple[list[TokenOutput], int]:
        """Compute a launched step once more, since it took tokens from one that failed, or since the launch behind it
        raised: devices report what went wrong in a step at any later call."""
        self.executor.settle()
        results = self.recovery.again(flight.schedule)
        return self.recovery.commit(flight.schedule, results), flight.schedule.num_prompt_tokens
