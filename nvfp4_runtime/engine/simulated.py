"""A deterministic executor without a model: scripted or hashed tokens, and step times. Torch-free.

It runs under the real scheduler and block pool, so HTTP tests, load generators and planners meet the real queueing.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.config import EngineConfig, SimulatedConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import EngineInfo, LayerGroup, TokenLogprob
from nvfp4_runtime.engine.plan import check_limits
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, Scheduler, StepResult


class SimulatedExecutor:
    """Token i of a request depends on its tokens alone: never on the batch, chunking or preemption."""

    def __init__(self, config: SimulatedConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config = config
        self._sleep = sleep

    def execute(self, schedule: Schedule) -> list[StepResult]:
        if self.config.step_seconds > 0:
            self._sleep(self.config.step_seconds)
        return [self._result(entry) for entry in schedule.entries]

    def _result(self, entry: Scheduled) -> StepResult:
        request = entry.request
        scored = None
        if request.params.prompt_logprobs is not None:
            stop = min(entry.start + entry.count + 1, request.num_prompt_tokens)
            scored = [self._logprob(token) for token in request.tokens[entry.start + 1 : stop]]
        if not entry.samples:
            return StepResult(None, prompt_logprobs=scored)
        token = self.next_token(request)
        logprob = None if request.params.logprobs is None else self._logprob(token)
        return StepResult(token, logprob, scored)

    def next_token(self, request: Request) -> int:
        """The script's token, else a hash of the tokens so far (and of the seed, when not greedy), never EOS."""
        config = self.config
        if config.script:
            return config.script[len(request.output_token_ids) % len(config.script)]
        seed = 0 if request.params.temperature == 0 else request.sampling.seed
        tail = request.tokens[-8:]
        digest = hashlib.blake2b(
            struct.pack(f"<qq{len(tail)}q", seed, len(request.tokens), *tail), digest_size=8
        ).digest()
        token = int.from_bytes(digest, "little") % config.vocab_size
        return (token + 1) % config.vocab_size if token == config.eos_token_id else token

    def _logprob(self, token: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5, 1, [(token, -0.5)])


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
    )
    return Engine(scheduler, SimulatedExecutor(simulated), info, config.seed)
