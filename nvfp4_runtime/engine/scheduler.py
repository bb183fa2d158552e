"""The scheduler: which requests get how many tokens and which blocks in the next step. Torch-free.

Prefill and decode are not two modes: a request has `num_computed` catching up with its tokens, under one token budget
per step. Requests go by rank: lower priority values first, then by arrival; among those that wait, tenants take turns
(see fairness.py). Out of blocks, the running request that ranks last gives its blocks back and is recomputed later.
Anything accepted fits alone (the engine refuses the rest at submit), so the request that ranks first always gets on and
everything ends.
"""

from __future__ import annotations

import itertools
import secrets
import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nvfp4_runtime.cache.block_pool import BlockPool, chain_hash, salt_hash
from nvfp4_runtime.config import SchedulerConfig
from nvfp4_runtime.engine.degenerate import is_due, repeats_itself
from nvfp4_runtime.engine.fairness import FairOrder
from nvfp4_runtime.engine.messages import StepStats, TokenLogprob, TokenOutput
from nvfp4_runtime.engine.request import Request, Status

if TYPE_CHECKING:
    from nvfp4_runtime.engine.kv_events import KVEvents
    from nvfp4_runtime.engine.request import FloatRow


OUTPUT_INVALID = "model_output_invalid"


@dataclass(frozen=True)
class Scheduled:
    """`count` tokens of `request` from `start` on.

    samples  the step reaches the request's last token and yields the next
    epoch    the request's, when this was scheduled
    """

    request: Request
    start: int
    count: int
    samples: bool = False
    epoch: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def is_stale(self) -> bool:
        """The request has ended or was preempted since."""
        return self.epoch != self.request.epoch


@dataclass(frozen=True)
class Schedule:
    """One step's work, in the order in which rows enter the batch."""

    entries: tuple[Scheduled, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens among them (a preempted request's outputs, recomputed, do not count)."""
        return sum(max(0, min(e.stop, e.request.num_prompt_tokens) - e.start) for e in self.entries)


@dataclass(frozen=True)
class StepResult:
    """What the executor gives back for one entry.

    token_id         the next token, or None if the entry does not sample
    prompt_logprobs  for the prompt tokens at positions start + 1 .. start + count, where asked for
    finite           False: this row's logits were not numbers; the request ends with an error, others go on
    error            why, where it was something else
    code             with finite False: what kind of failure, in one word for programs; None: by `error`
    hidden_sum       pooling: the sum of this entry's hidden states (mean), or the last token's (last)
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finite: bool = True
    error: str | None = None
    hidden_sum: FloatRow | None = None
    code: str | None = None


def _take(request: Request, count: int) -> Scheduled:
    """The next `count` tokens of `request`, from now on counted as computed."""
    start = request.num_computed
    request.num_computed += count
    samples = request.num_computed == request.num_tokens
    request.num_pending += samples
    return Scheduled(request, start, count, samples, request.epoch)


@dataclass
class Scheduler:
    """Waiting and running requests over one block pool.

    num_state_slots  of a model that keeps states beside its blocks, one for each running request; slot 0 is nobody's.
                     Such states are not found again by prefix: `enable_prefix_caching` must be off
    handling         the request that `schedule` is at, or was at when it raised
    num_invalid      requests that ended because their logits were not numbers
    num_degenerate   requests whose answer goes round in circles
    events           told of blocks that can be found, where somebody listens
    """

    config: SchedulerConfig
    pool: BlockPool
    block_size: int
    enable_prefix_caching: bool = True
    num_state_slots: int = 0
    hash_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    waiting: list[Request] = field(default_factory=list)  # both sorted by rank
    running: list[Request] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    fair: FairOrder = field(default_factory=FairOrder)
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_invalid: int = 0
    num_degenerate: int = 0
    handling: Request | None = None
    events: KVEvents | None = None
    _arrivals: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        assert not (self.num_state_slots and self.enable_prefix_caching), "states are not cached by prefix"
        assert self.num_state_slots in (0, self.config.max_num_seqs), "a running request has one slot"
        self._free_slots = list(range(self.num_state_slots, 0, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        assert request.id not in self.requests, f"request id {request.id} is in use"
        self.fair.enter(request.tenant, self.requests.values())
        self.requests[request.id] = request
        request.arrival = next(self._arrivals)
        insort(self.waiting, request, key=_rank)

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a request in any state and free its blocks. None if it is not here (any more)."""
        request = self.requests.get(request_id)
        return None if request is None else self._finish(request, "abort")

    # -- schedule ------------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Give running requests their next tokens, then admit waiting ones into what is left of the budget.

        What is scheduled counts as computed, and what it samples as a token on its way, before it has run: the next
        step may be scheduled while this one runs. `commit` reads the results, in order.
        """
        entries: list[Scheduled] = []
        budget = self.config.max_num_batched_tokens
        preempted = False
        index = 0
        self.handling = None
        while index < len(self.running) and budget > 0:
            request = self.handling = self.running[index]
            if request.ends_with_pending:
                index += 1
                continue
            count = min(request.num_tokens - request.num_computed, budget)
            while not self._grow(request, count):
                victim = self.running[-1]
                self.preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                entries.append(_take(request, count))
                budget -= count
                index += 1
        if not preempted:
            entries.extend(self._admit(budget))
        for entry in entries:
            self.fair.charge(entry.request.tenant, entry.count)
        return Schedule(tuple(entries))

    def _admit(self, budget: int) -> Iterator[Scheduled]:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.handling = self.fair.next(self.waiting)
            cached = self._find_prefix(request)
            start = len(cached) * self.block_size
            count = min(request.num_tokens - start, budget)
            needed = self._blocks_for(start + count) - len(cached)
            if needed > self.pool.num_free - self.pool.num_idle(cached):
                return
            self.pool.retain(cached)
            request.block_ids = cached + self.pool.allocate(needed)
            request.num_computed = start
            request.num_published = len(cached)
            request.status = Status.RUNNING
            if self.num_state_slots:
                request.state_slot = self._free_slots.pop()
            self._note_admission(request, start)
            self.waiting.remove(request)
            insort(self.running, request, key=_rank)
            budget -= count
            yield _take(request, count)

    def _note_admission(self, request: Request, num_cached: int) -> None:
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached
            request.times.scheduled = time.monotonic()
            if self._may_use_prefix(request):
                self.prefix_queries += request.num_tokens
                self.prefix_hits += num_cached

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _grow(self, request: Request, count: int) -> bool:
        """Give `request` the blocks for `count` more tokens, or return False and change nothing."""
        needed = self._blocks_for(request.num_computed + count) - len(request.block_ids)
        if needed > self.pool.num_free:
            return False
        if needed > 0:
            request.block_ids.extend(self.pool.allocate(needed))
        return True

    def preempt(self, request: Request) -> None:
        """Give a running request's blocks back; the tokens stay and are computed again, or found by their hashes."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        self.num_preemptions += 1
        insort(self.waiting, request, key=_rank)

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_ids)
        request.block_ids = []
        if request.state_slot:
            self._free_slots.append(request.state_slot)
            request.state_slot = 0
        request.num_computed = 0
        request.num_published = 0
        request.num_pending = 0  # a token on its way is not waited for: it will be sampled again
        request.epoch += 1

    # -- prefix cache --------------------------------------------------------------------------------------------

    def _may_use_prefix(self, request: Request) -> bool:
        # prompt_logprobs need the logits of every prompt position, a mean its hidden state: nothing may be skipped
        needs_all = request.params.prompt_logprobs is not None or request.pooling == "mean"
        return self.enable_prefix_caching and not needs_all

    def _find_prefix(self, request: Request) -> list[int]:
        if not self._may_use_prefix(request):
            return []
        # at least one token must be computed, to have logits to sample from
        usable = (request.num_tokens - 1) // self.block_size
        return self.pool.find(self._hashes(request, usable))

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        hashes = request.block_hashes
        while len(hashes) < count:
            parent = hashes[-1] if hashes else salt_hash(self.hash_key, request.cache_salt, request.adapter)
            start = len(hashes) * self.block_size
            hashes.append(chain_hash(self.hash_key, parent, request.tokens[start : start + self.block_size]))
        return hashes[:count]

    def _publish(self, request: Request, num_computed: int) -> None:
        full = num_computed // self.block_size
        if self.enable_prefix_caching and full > request.num_published:
            hashes = self._hashes(request, full)
            for i in range(request.num_published, full):
                if self.pool.publish(request.block_ids[i], hashes[i]) and self.events is not None:
                    tokens = request.tokens[i * self.block_size : (i + 1) * self.block_size]
                    self.events.stored(hashes[i], hashes[i - 1] if i else None, tokens, request.adapter)
            request.num_published = full

    # -- commit --------------------------------------------------------------------------------------------------

    def commit(self, entry: Scheduled, result: StepResult, now: float) -> TokenOutput | None:
        """Take the result of an entry that is not stale: advance, publish full blocks, append a token, finish."""
        if not result.finite:
            return self._fail(entry.request, result)
        self._publish(entry.request, entry.stop)
        return self._advance(entry, result, now)

    def _fail(self, request: Request, result: StepResult) -> TokenOutput:
        if result.error is None:
            self.num_invalid += 1
            self.pool.unpublish(request.block_ids)  # earlier chunks had no logits to show that they were not numbers
        failed = self._finish(request, "error", error=result.error or _why_no_token(request))
        failed.error_code = result.code or (OUTPUT_INVALID if result.error is None else None)
        if failed.error_code is None and request.params.structured is not None:
            failed.param = request.params.structured.field
        return failed

    def _advance(self, entry: Scheduled, result: StepResult, now: float) -> TokenOutput | None:
        request = entry.request
        if request.pooling is not None:
            if result.hidden_sum is not None:
                request.pool(result.hidden_sum, entry.start)
            return self._finish(request, "stop", embedding=request.embedding) if entry.samples else None
        scored = self._new_scores(entry, result.prompt_logprobs)
        if result.token_id is None:
            return TokenOutput(request.id, [], prompt_logprobs=scored) if scored is not None else None
        request.num_pending -= 1
        request.append(result.token_id)
        self._watch(request)
        first = request.times.first_token == 0.0
        if first:
            request.times.first_token = now
        output = TokenOutput(
            request.id,
            [result.token_id],
            logprobs=None if result.logprob is None else [result.logprob],
            prompt_logprobs=scored,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            times=request.times if first else None,
        )
        if (reason := request.finish_reason()) is not None:
            ended = self._finish(request, reason[0])
            output.finish_reason, output.stop_reason, output.times = reason[0], reason[1], ended.times
            output.ends_whole = request.ends_whole
        return output

    def _watch(self, request: Request) -> None:
        tokens = request.output_token_ids
        if is_due(len(tokens)) and not request.is_degenerate and repeats_itself(tokens):
            request.is_degenerate = True
            self.num_degenerate += 1

    def _new_scores(self, entry: Scheduled, logprobs: list[TokenLogprob] | None) -> list[TokenLogprob | None] | None:
        """Prompt logprobs not sent before (a preempted request scores its prompt again); None for position 0."""
        request = entry.request
        if logprobs is None:
            return None
        first = [None] if request.num_scored == 0 else []
        fresh = logprobs[max(request.num_scored - 1 - entry.start, 0) :]
        request.num_scored = max(request.num_scored, entry.start + len(logprobs) + 1)
        return [*first, *fresh]

    def _finish(
        self, request: Request, reason: str, error: str | None = None, embedding: bytes | None = None
    ) -> TokenOutput:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        request.status = Status.FINISHED
        request.times.finished = time.monotonic()
        del self.requests[request.id]
        return TokenOutput(
            request.id,
            [],
            finish_reason=reason,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            times=request.times,
            error=error,
            embedding=embedding,
        )

    # -- after a fault -------------------------------------------------------------------------------------------

    def start_over(self, without: Request | None) -> None:
        """Every request but `without` waits, nothing is computed, every block is free: right whatever was before."""
        self.pool.reset()
        self.requests = {key: request for key, request in self.requests.items() if request is not without}
        self.running = []
        self.waiting = sorted(self.requests.values(), key=_rank)
        self._free_slots = list(range(self.num_state_slots, 0, -1))
        for request in self.waiting:
            request.start_over()

    # -- facts ---------------------------------------------------------------------------------------------------

    def stats(self) -> StepStats:
        return StepStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_blocks=self.pool.num_free,
            num_used_blocks=self.pool.num_used,
            num_total_blocks=self.pool.total,
            num_preemptions=self.num_preemptions,
            prefix_cache_queries=self.prefix_queries,
            prefix_cache_hits=self.prefix_hits,
            num_invalid_outputs=self.num_invalid,
            num_degenerate_outputs=self.num_degenerate,
            oldest_waiting=min((request.times.arrival for request in self.waiting), default=0.0),
            running_adapters=sorted({request.adapter for request in self.running if request.adapter}),
            waiting_adapters=sorted({request.adapter for request in self.waiting if request.adapter}),
        )

    def check(self) -> None:
        """Assert that every block and every request is accounted for."""
        self.pool.check(request.block_ids for request in self.running)
        assert all(not request.block_ids for request in self.waiting), "a waiting request holds blocks"
        slots = sorted([*self._free_slots, *(r.state_slot for r in self.running if self.num_state_slots)])
        assert slots == list(range(1, self.num_state_slots + 1)), "a state slot is lost or shared"
        alive = {request.id for request in self.running} | {request.id for request in self.waiting}
        assert alive == set(self.requests), "requests and queues disagree"


def _why_no_token(request: Request) -> str:
    params = request.params
    if params.allowed_token_ids is None and not params.bad_words_token_ids:
        return "the model's output was not finite"
    return (
        "no token is left to choose: the lists of allowed tokens and bad words forbid all, or the output is not finite"
    )


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
