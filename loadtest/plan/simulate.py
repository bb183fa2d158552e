"""The simulation: requests arrive, replicas step, tokens come. Time is a number; nothing sleeps.

Each replica is the engine's Scheduler over a block pool. A step takes what the step times say of its schedule; what has
arrived meanwhile is admitted at its end, as the engine does it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadtest.plan.pool import GrowingPool
from loadtest.plan.router import Router
from loadtest.plan.steps import StepTimes
from loadtest.traffic.call import Call, Conversation, Messages, Outcome
from nvfp4_runtime.config import SchedulerConfig
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.scheduler import Schedule, Scheduler, StepResult
from nvfp4_runtime.sampling.params import SamplingParams

Tokenize = Callable[[Messages], list[int]]


@dataclass(frozen=True)
class Machine:
    """One replica: its step times and limits. `front_seconds`: HTTP and tokenizer, once for each request."""

    times: StepTimes
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_tokens: int
    max_model_len: int
    front_seconds: float = 0.0
    prefix_caching: bool = True
    max_waiting: int = 1024


@dataclass
class Result:
    """busy: share of the time that replicas had a step running, mean over all of them."""

    outcomes: list[Outcome]
    seconds: float
    busy: float
    preemptions: int
    prefix_hits: float


class WordTokens:
    """Tokens for the workloads' words: one for each, `per_word` on average, and those of the chat template around."""

    def __init__(self, template: int = 0, per_word: float = 1.0) -> None:
        self._template, self._per_word = template, per_word
        self._known: dict[str, int] = {}
        self._systems: dict[str, list[int]] = {}  # long ones come again and again

    def __call__(self, messages: Messages) -> list[int]:
        found = list(range(self._template))  # the same for everybody, and so found in the prefix cache
        for role, content in messages:
            if role == "system" and content not in self._systems:
                self._systems[content] = self._ids(content)
            found.append(self._id(role))
            found += self._systems[content] if role == "system" else self._ids(content)
        return found

    def _ids(self, content: str) -> list[int]:
        found = [self._id(word) for word in content.split()]
        more = round(len(found) * self._per_word) - len(found)
        return found + found[:more] if more >= 0 else found[:more]

    def _id(self, word: str) -> int:
        return self._known.setdefault(word, 1000 + len(self._known))


@dataclass
class _Talk:
    """A conversation under way."""

    conversation: Conversation
    turn: int = 0


@dataclass
class _Job:
    talk: _Talk
    outcome: Outcome
    replica: int
    work: float
    request: Request


@dataclass
class _Replica:
    scheduler: Scheduler
    arrived: list[_Job] = field(default_factory=list)
    running: Schedule | None = None
    busy_seconds: float = 0.0
    owed_seconds: float = 0.0  # that the running step takes longer, for those who came meanwhile


class Simulation:
    """`users`: of a closed loop, which takes conversations in order; None: each begins at its `at`."""

    def __init__(
        self,
        machine: Machine,
        replicas: int,
        conversations: Sequence[Conversation],
        tokenize: Tokenize,
        users: int | None = None,
    ) -> None:
        if replicas < 1:
            raise ValueError(f"expected at least one replica, found {replicas}")
        self._machine, self._tokenize = machine, tokenize
        config = SchedulerConfig(machine.max_num_seqs, machine.max_num_batched_tokens)
        blocks = 1 + machine.kv_tokens // machine.block_size
        self._replicas = [
            _Replica(
                Scheduler(config, GrowingPool(blocks), machine.block_size, machine.prefix_caching, hash_key=b"plan")
            )
            for _ in range(replicas)
        ]
        self._router = Router(replicas)
        self._jobs: dict[str, _Job] = {}
        self._outcomes: list[Outcome] = []
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._waiting = iter(conversations) if users is not None else None
        begin = [next(self._waiting, None) for _ in range(users)] if self._waiting and users else conversations
        for conversation in begin:
            if conversation is not None:
                at = 0.0 if users is not None else conversation.at
                self._begin(_Talk(conversation), at)

    def run(self) -> Result:
        now = 0.0
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        schedulers = [replica.scheduler for replica in self._replicas]
        queries = sum(scheduler.prefix_queries for scheduler in schedulers)
        busy = sum(replica.busy_seconds for replica in self._replicas)
        return Result(
            self._outcomes,
            now,
            busy / (now * len(self._replicas)) if now else 0.0,
            sum(scheduler.num_preemptions for scheduler in schedulers),
            sum(scheduler.prefix_hits for scheduler in schedulers) / queries if queries else 0.0,
        )

    def _at(self, at: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), happen))

    # -- requests

    def _begin(self, talk: _Talk, due: float) -> None:
        self._at(due, lambda now: self._send(talk, due))

    def _send(self, talk: _Talk, due: float) -> None:
        call = talk.conversation.calls[talk.turn]
        outcome = Outcome(due, call.max_tokens, sent=due)
        self._outcomes.append(outcome)
        prompt = self._tokenize(call.messages)
        outcome.prompt_tokens = len(prompt)
        longest = min(self._machine.max_model_len, self._machine.kv_tokens)
        if len(prompt) + call.max_tokens > longest:
            self._fail(talk, outcome, due, f"{len(prompt)} + {call.max_tokens} tokens exceed {longest}")
            return
        replica, work = self._router.choose(prompt)
        if self._router.running[replica] > self._machine.max_num_seqs + self._machine.max_waiting:
            self._router.answered(replica, work)
            self._router.ended(replica)
            self._fail(talk, outcome, due, "HTTP 429")
            return
        if self._replicas[replica].running is not None:
            self._replicas[replica].owed_seconds += self._machine.times.newcomer_seconds
        job = _Job(talk, outcome, replica, work, self._request(call, prompt))
        self._at(due + self._machine.front_seconds, lambda now: self._arrive(job, now))

    def _request(self, call: Call, prompt: list[int]) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=call.max_tokens, ignore_eos=True)
        submit = Submit(f"r{len(self._outcomes)}", prompt, params, 0.0)
        return Request(submit, 0, (), self._machine.max_model_len)

    def _fail(self, talk: _Talk, outcome: Outcome, now: float, why: str) -> None:
        outcome.ended, outcome.failure = now, why
        for _ in talk.conversation.calls[talk.turn + 1 :]:
            self._outcomes.append(Outcome(now, failure="an earlier turn failed", ended=now))
        self._next_user(now)

    def _next_user(self, now: float) -> None:
        """The user of a closed loop whose conversation has ended takes the next one."""
        following = next(self._waiting, None) if self._waiting is not None else None
        if following is not None:
            self._begin(_Talk(following), now)

    # -- replicas

    def _arrive(self, job: _Job, now: float) -> None:
        self._jobs[job.request.id] = job
        replica = self._replicas[job.replica]
        replica.arrived.append(job)
        if replica.running is None:
            self._step(replica, now)

    def _step(self, replica: _Replica, now: float) -> None:
        for job in replica.arrived:
            replica.scheduler.add(job.request)
        replica.arrived.clear()
        schedule = replica.scheduler.schedule()
        if not schedule.entries:
            replica.running = None
            return
        seconds = self._machine.times.seconds(schedule)
        replica.running = schedule
        replica.busy_seconds += seconds
        self._at(now + seconds, lambda at: self._finish_step(replica, at))

    def _finish_step(self, replica: _Replica, now: float) -> None:
        if (owed := replica.owed_seconds) > 0:
            replica.owed_seconds = 0.0
            replica.busy_seconds += owed
            self._at(now + owed, lambda at: self._finish_step(replica, at))
            return
        schedule = replica.running
        assert schedule is not None
        for entry in schedule.entries:
            if entry.is_stale:
                continue
            # distinct tokens: an answer that goes round in circles would be watched for it
            token = (1 + len(entry.request.output_token_ids)) if entry.samples else None
            output = replica.scheduler.commit(entry, StepResult(token), now)
            if output is not None and output.token_ids:
                self._token(self._jobs[output.request_id], now, output.finish_reason is not None)
        self._step(replica, now)

    def _token(self, job: _Job, now: float, last: bool) -> None:
        outcome = job.outcome
        if not outcome.arrivals:
            self._router.answered(job.replica, job.work)
            outcome.cached_tokens = max(job.request.num_cached_tokens, 0)
        outcome.arrivals.append(now)
        if not last:
            return
        outcome.ended, outcome.completion_tokens = now, len(outcome.arrivals)
        self._router.ended(job.replica)
        del self._jobs[job.request.id]
        talk = job.talk
        talk.turn += 1
        if talk.turn < len(talk.conversation.calls):
            self._begin(talk, now + talk.conversation.think_seconds)
        else:
            self._next_user(now)
