"""A deterministic executor without a model: scripted or hashed tokens, and step times. Torch-free.

It runs under the real scheduler and block pool, so HTTP tests, load generators and planners meet the real queueing.
"""

from __future__ import annotations

import hashlib
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.config import EngineConfig, SimulatedConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import AdapterInfo, EngineInfo, LayerGroup, TokenLogprob
from nvfp4_runtime.engine.plan import check_limits
from nvfp4_runtime.engine.recovery import Executor
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, Scheduler, StepResult
from nvfp4_runtime.engine.simulated_faults import FaultyExecutor
from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.worker import GrammarTrial

HIDDEN_SIZE = 8


class SimulatedExecutor:
    """Token i of a request depends on its tokens and its adapter alone: never on the batch, chunking or preemption."""

    def __init__(self, config: SimulatedConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config = config
        self._sleep = sleep

    def execute(self, schedule: Schedule) -> list[StepResult]:
        if self.config.step_seconds > 0:
            self._sleep(self.config.step_seconds)
        return [self._result(entry) for entry in schedule.entries]

    def probe(self) -> None:
        """Nothing here can break."""

    def _result(self, entry: Scheduled) -> StepResult:
        request = entry.request
        if request.pooling is not None:
            return StepResult(None, hidden_sum=self._hidden_sum(entry))
        scored = None
        if request.params.prompt_logprobs is not None:
            stop = min(entry.start + entry.count + 1, request.num_prompt_tokens)
            wanted = request.params.prompt_logprobs
            scored = [self._logprob(token, wanted) for token in request.tokens[entry.start + 1 : stop]]
        if not entry.samples:
            return StepResult(None, prompt_logprobs=scored)
        if request.sampling.grammar is not None:
            return self._structured(request, request.sampling.grammar, scored)
        token = self.next_token(request)
        count, ids = request.params.logprobs, request.params.logprob_token_ids
        return StepResult(token, None if count is None else self._logprob(token, count, ids), scored)

    def next_token(self, request: Request) -> int:
        """The hash's or script's token, or the next one that allowed_token_ids and bad words permit."""
        params = request.params
        if (forced := request.sampling.forced_token) is not None:
            return forced
        token = self._preferred(request)
        if params.allowed_token_ids is None and not params.bad_words_token_ids:
            return token
        allowed = sorted(params.allowed_token_ids or range(self.config.vocab_size))
        forbidden = set(request.sampling.completing_bad_words)
        start = bisect_left(allowed, token)
        around = allowed[start:] + allowed[:start]
        return next((other for other in around if other not in forbidden), token)

    def _preferred(self, request: Request) -> int:
        """The script's token, else a hash of the tokens so far (and of the seed, when not greedy), never EOS."""
        config = self.config
        if config.script:
            return config.script[len(request.output_token_ids) % len(config.script)]
        token = self._hash(request) % config.vocab_size
        return (token + 1) % config.vocab_size if token == config.eos_token_id else token

    def _hash(self, request: Request) -> int:
        seed = 0 if request.params.temperature == 0 else request.sampling.seed
        tail = request.tokens[-8:]
        packed = struct.pack(f"<qq{len(tail)}q", seed, len(request.tokens), *tail) + request.adapter.encode()
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")

    def _structured(self, request: Request, grammar: GrammarState, scored: list[TokenLogprob] | None) -> StepResult:
        """The token that would come, if the grammar allows it; else one that it allows, by the same hash."""
        wanted = self.next_token(request)
        words = np.zeros(grammar.num_words, dtype=np.int32)
        if grammar.applies:
            grammar.fill(words)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            if grammar.error is not None or not len(allowed):
                return StepResult(None, finite=False, error=f"the grammar cannot go on: {grammar.error}")
            wanted = wanted if wanted in allowed else int(allowed[self._hash(request) % len(allowed)])
        grammar.accept(wanted)
        count, ids = request.params.logprobs, request.params.logprob_token_ids
        return StepResult(wanted, None if count is None else self._logprob(wanted, count, ids), scored)

    def _logprob(self, token: int, count: int, ids: Sequence[int] | None = None) -> TokenLogprob:
        """The token first with -0.5, each next id (wrapping round) 1 less likely."""
        size = self.config.vocab_size
        shown = [(token + i) % size for i in range(min(count, size))] if ids is None else ids
        return TokenLogprob(token, -0.5, 1, [(other, -0.5 - (other - token) % size) for other in shown])

    def _hidden_sum(self, entry: Scheduled) -> npt.NDArray[np.float32]:
        """A token's hidden state depends on its id alone; HIDDEN_SIZE values in [0, 1)."""
        start, stop = entry.start, entry.start + entry.count
        tokens = entry.request.tokens[start if entry.request.pooling == "mean" else stop - 1 : stop]
        states = np.outer(np.array(tokens) + 1, np.arange(1, HIDDEN_SIZE + 1)) * 0.6180339887 % 1
        pooled: npt.NDArray[np.float32] = states.sum(axis=0, dtype=np.float32)
        return pooled


def simulated_engine(config: EngineConfig) -> Engine:
    """An Engine over the simulated executor, with the real scheduler and a pool of `cache.num_blocks` blocks."""
    simulated = config.simulated
    assert simulated is not None
    check_limits(config)
    block_size = config.cache.block_size
    limit = config.scheduler.max_model_len or simulated.max_model_len
    num_blocks = config.cache.num_blocks or 1 + 8 * -(-limit // block_size)
    limit = min(limit, (num_blocks - 1) * block_size)
    scheduler = Scheduler(config.scheduler, BlockPool(num_blocks), block_size, config.cache.enable_prefix_caching)
    info = EngineInfo(
        model=config.model or "simulated",
        architecture="Simulated",
        vocab_size=simulated.vocab_size,
        max_model_len=limit,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_queued_requests=config.scheduler.max_queued_requests,
        max_queued_tokens=config.scheduler.max_queued_tokens,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_dtype="none",
        kv_bytes=0,
        dtype="none",
        numerics="simulated",
        numerics_reason="no model is loaded",
        weight_bytes={},
        layers=[LayerGroup("simulated", 0, "none", 0.0, 0, "simulated", "simulated")],
        eos_token_ids=[] if simulated.eos_token_id is None else [simulated.eos_token_id],
        startup_seconds={},
        backends={},
        enable_prefix_caching=config.cache.enable_prefix_caching,
        adapters=[AdapterInfo(adapter.name, adapter.path, 0) for adapter in config.adapters],
    )
    vocabulary = _vocabulary(simulated)
    grammars = GrammarCompiler(vocabulary, GrammarTrial(vocabulary))
    executor: Executor = SimulatedExecutor(simulated)
    if simulated.faults:
        executor = FaultyExecutor(executor, simulated.faults)
    return Engine(scheduler, executor, info, config.seed, grammars)


def _vocabulary(config: SimulatedConfig) -> Vocabulary:
    """One token per byte, and special ones after them."""
    tokens = tuple(bytes([i]) if i < 256 else f"<|{i}|>".encode() for i in range(config.vocab_size))
    eos = () if config.eos_token_id is None else (config.eos_token_id,)
    return Vocabulary(len(tokens), eos, tokens=tokens, special=tuple(range(256, len(tokens))))
