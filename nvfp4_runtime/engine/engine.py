"""Engine: the scheduler and an executor, one step at a time. The same class runs in its own process and in-process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from nvfp4_runtime.engine.cost import ModelCost, Work
from nvfp4_runtime.engine.kv_events import KVEvents
from nvfp4_runtime.engine.messages import EngineInfo, StepStats, Submit, TokenOutput
from nvfp4_runtime.engine.pace import Pace
from nvfp4_runtime.engine.recovery import Executor, Recovery
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.scheduler import Schedule, Scheduler
from nvfp4_runtime.engine.step_clock import StepClock
from nvfp4_runtime.errors import InvalidParameterError, PromptTooLongError, QueueFullError
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.structured.compiler import GrammarCompiler
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.spec import StructuredSpec

LONG_STEP_SECONDS = 1.0


def check_request(prompt_token_ids: Sequence[int], params: SamplingParams, info: EngineInfo, adapter: str = "") -> None:
    """Refuse now what could never be served: called by whoever admits (client process, LLM, engine)."""
    if adapter and not info.has_adapter(adapter):
        loaded = ", ".join(repr(one.name) for one in info.adapters) or "none"
        raise InvalidParameterError(f"the adapter {adapter!r} is not loaded; loaded are: {loaded}", "model")
    params.validate(info.vocab_size)
    _check_choice(params, info)
    if not prompt_token_ids:
        raise InvalidParameterError("the prompt holds no tokens; expected at least one", "prompt")
    lowest, highest = min(prompt_token_ids), max(prompt_token_ids)
    if lowest < 0 or highest >= info.vocab_size:
        raise InvalidParameterError(
            f"prompt token id {lowest if lowest < 0 else highest} is outside the vocabulary [0, {info.vocab_size})",
            "prompt",
        )
    wanted = len(prompt_token_ids) + (params.max_tokens or 1)
    if wanted > info.max_model_len:
        raise PromptTooLongError(
            f"This model's maximum context length is {info.max_model_len} tokens. However, you requested "
            f"{wanted} tokens ({len(prompt_token_ids)} in the prompt, {params.max_tokens or 1} in the completion). "
            "Please reduce the length of the prompt or of the completion.",
            len(prompt_token_ids),
            info.max_model_len,
        )


def _check_choice(params: SamplingParams, info: EngineInfo) -> None:
    """Refuse lists that leave no token to choose from the start."""
    allowed = params.allowed_token_ids
    if allowed is None:
        return
    left = set(allowed) - {word[0] for word in params.bad_words_token_ids if len(word) == 1}
    if params.min_tokens > 0:
        left -= {*params.stop_token_ids, *info.eos_token_ids}
    if not left:
        raise InvalidParameterError(
            "allowed_token_ids leaves no token to choose: bad_words, or min_tokens with the tokens that end an answer, "
            "forbid all of them",
            "allowed_token_ids",
        )


class Engine:
    """Requests in, tokens out. `clock` and `cost` say what steps took and computed, for the statistics.

    on_long_step  called before a step that is expected to take long, with the seconds
    on_close      called by `close`
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineInfo,
        seed: int = 0,
        grammars: GrammarCompiler | None = None,
        clock: StepClock | None = None,
        cost: ModelCost | None = None,
    ) -> None:
        self.grammars = grammars
        self._clock = clock or StepClock()
        self._cost = cost or ModelCost()
        self._work = Work()
        self.scheduler = scheduler
        self.executor = executor
        self.recovery = Recovery(scheduler, executor, self._restore_grammar)
        self.info = info
        self.pace = Pace()
        self.on_long_step: Callable[[float], None] = lambda _: None
        self.on_close: Callable[[], None] = lambda: None
        self._random = random.Random(seed)
        self._num_steps = 0
        self._num_step_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def has_room(self) -> bool:
        """Whether `add` would not raise QueueFullError."""
        return len(self.scheduler.requests) < self.info.max_num_seqs + self.info.max_queued_requests

    def add(self, submit: Submit) -> None:
        """Accept a request or raise RequestError / QueueFullError. What is accepted ends with a finish_reason."""
        check_request(submit.prompt_token_ids, submit.params, self.info, submit.adapter)
        if submit.request_id in self.scheduler.requests:
            raise InvalidParameterError(f"request id {submit.request_id!r} is in use", "request_id")
        if not self.has_room:
            count = len(self.scheduler.requests)
            raise QueueFullError(f"{count} requests are running or waiting already; try again later")
        seed = submit.params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        eos = tuple(self.info.eos_token_ids)
        grammar = None if submit.params.structured is None else self._grammar(submit.params.structured)
        self.recovery.add(Request(submit, seed, eos, self.info.max_model_len, grammar))

    def _grammar(self, spec: StructuredSpec) -> GrammarState:
        """Compiles if nobody did before: whoever must not wait has `GrammarQueue` do it."""
        if self.grammars is None:
            raise spec.refused("cannot be had: this engine has no tokenizer to apply it to")
        return self.grammars.state(spec)

    def _restore_grammar(self, request: Request) -> None:
        """Put a request's grammar where its tokens are."""
        if request.params.structured is None or request.sampling.grammar is None:
            return
        grammar = self._grammar(request.params.structured)
        for token_id in request.output_token_ids:
            grammar.accept(token_id)
        request.sampling.grammar = grammar

    def abort(self, request_id: str) -> TokenOutput | None:
        return self.recovery.abort(request_id)

    def close(self) -> None:
        """No step comes after this."""
        self.on_close()

    def tell(self, events: KVEvents) -> None:
        """From now on `events` is told what enters and leaves the prefix cache, and flushed after each step."""
        scheduler = self.scheduler
        scheduler.events = events
        scheduler.pool.on_forget, scheduler.pool.on_reset = events.removed, events.cleared

    def step(self) -> tuple[list[TokenOutput], StepStats]:
        """One turn: what was computed, and the state afterwards."""
        started = time.perf_counter()
        self._num_step_tokens = 0
        self._clock.start()
        outputs, num_prompt_tokens = self._turn()
        if self.scheduler.events is not None:
            self.scheduler.events.flush()
        stats = self.scheduler.stats()
        self._num_steps += 1
        stats.num_steps = self._num_steps
        stats.num_faults, stats.num_memory_faults = self.recovery.num_faults, self.recovery.num_memory
        stats.step_seconds = time.perf_counter() - started
        self.pace.observe(self._num_step_tokens, stats.step_seconds)
        stats.step_generation_tokens = sum(len(output.token_ids) for output in outputs)
        stats.step_prompt_tokens = num_prompt_tokens
        stats.phase_seconds = self._clock.seconds
        stats.flops, stats.bytes_read, stats.bytes_written = (
            self._work.flops,
            self._work.bytes_read,
            self._work.bytes_written,
        )
        return outputs, stats

    def _announce(self, schedule: Schedule) -> None:
        self._num_step_tokens = schedule.num_tokens
        expected = self.pace.expected_seconds(schedule.num_tokens)
        if expected >= LONG_STEP_SECONDS:
            self.on_long_step(expected)

    def _turn(self) -> tuple[list[TokenOutput], int]:
        """Schedule, run and sample, commit. Returns the outputs and how many prompt tokens were computed."""
        schedule, outputs = self.recovery.schedule()
        self._clock.lap("schedule")
        if schedule.entries:
            self._announce(schedule)
            results = self.recovery.execute(schedule)
            self._clock.lap("model")
            self._work.add(self._cost.of_step(schedule))
            outputs += self.recovery.commit(schedule, results)
            self._clock.lap("commit")
        return outputs, schedule.num_prompt_tokens
