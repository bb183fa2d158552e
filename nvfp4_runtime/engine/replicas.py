"""Replicas: several engines of one model behind one interface, each request routed to one of them. Torch-free."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.client import CLOSED, ProgressCallback
from nvfp4_runtime.engine.messages import EngineInfo, Pooling, StepStats, TokenOutput
from nvfp4_runtime.engine.routing import Load, Router
from nvfp4_runtime.engine.supervisor import TOTALS, SupervisedEngine, Supervision
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import EngineDeadError, QueueFullError
from nvfp4_runtime.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

_OF_ONE_STEP = ("step_seconds", "step_prompt_tokens", "step_generation_tokens")


class SharedAdmission:
    """There is room where one of the engines in service has room."""

    def __init__(self, engines: Sequence[SupervisedEngine]) -> None:
        self._engines = engines

    @property
    def num_requests(self) -> int:
        return sum(engine.admission.num_requests for engine in self._engines)

    @property
    def num_queued_tokens(self) -> int:
        return sum(engine.admission.num_queued_tokens for engine in self._engines)

    def check_room(self, tenant: str = "", num_tokens: int = 1) -> None:
        refusals = []
        for engine in self._engines:
            if engine.alive:
                try:
                    return engine.admission.check_room(tenant, num_tokens)
                except QueueFullError as error:
                    refusals.append(error)
        if refusals:
            raise soonest(refusals)


class Replicas:
    """The same interface as SupervisedEngine over several of them.

    In service while one of them is; each is replaced by itself, and what ran in the others goes on.

    info      of all: sizes of caches and queues added up, the rest as the first one's
    stats     the same: counts added up, a step's own figures those of the step that ended last
    given_up  done once no engine is left, and none will be started
    """

    def __init__(self, engines: Sequence[SupervisedEngine]) -> None:
        self.engines = tuple(engines)
        self.info = _together([engine.info for engine in engines])
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.admission = SharedAdmission(self.engines)
        self.router = Router(
            [engine.info.num_blocks for engine in engines], self.info.block_size, self.info.enable_prefix_caching
        )
        self._lives = [engine.num_restarts for engine in engines]
        self._on_step: list[Callable[[StepStats], None]] = []
        self._parts = [engine.stats for engine in engines]
        self.stats = _summed(self._parts)
        for i, engine in enumerate(engines):
            engine.on_step(functools.partial(self._step, i))
            engine.given_up.add_done_callback(self._one_given_up)

    @classmethod
    async def launch(
        cls, config: EngineConfig, policy: Supervision, on_progress: ProgressCallback | None = None
    ) -> Replicas:
        """config.parallel.replicas engines at once; what one raises while loading is raised here, and ends the others.

        Each draws seeds of its own for requests that give none.
        """
        starts = [
            asyncio.create_task(
                SupervisedEngine.launch(
                    replace(config, seed=config.seed + i, parallel=replace(config.parallel, replica=i)),
                    policy,
                    on_progress if i == 0 else None,
                )
            )
            for i in range(config.parallel.replicas)
        ]
        try:
            return cls(await asyncio.gather(*starts))
        except BaseException:
            for start in starts:
                start.cancel()
            for engine in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(engine, SupervisedEngine):
                    await engine.close()
            raise

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def num_restarts(self) -> int:
        return sum(engine.num_restarts for engine in self.engines)

    @property
    def num_stalls(self) -> int:
        return sum(engine.num_stalls for engine in self.engines)

    @property
    def alive(self) -> bool:
        return any(engine.alive for engine in self.engines)

    @property
    def death_reason(self) -> str | None:
        return None if self.alive else self.engines[0].death_reason

    @property
    def stalled_seconds(self) -> float:
        """While one gets on, there is progress; the one that hangs is replaced."""
        return min((engine.stalled_seconds for engine in self.engines if engine.alive), default=0.0)

    @property
    def retry_after_seconds(self) -> float | None:
        known = [seconds for engine in self.engines if (seconds := engine.retry_after_seconds) is not None]
        return min(known, default=None)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        tenant: str = "",
        adapter: str = "",
    ) -> TokenStream:
        """As EngineClient's. QueueFullError when no engine has room, EngineDeadError when none is in service."""
        hashes = self.router.hashes(prompt_token_ids, cache_salt, adapter)
        refusals: list[QueueFullError] = []
        for i in self.router.ranked(len(prompt_token_ids), hashes, self._loads()):
            try:
                stream = self.engines[i].submit(
                    prompt_token_ids,
                    params,
                    request_id=request_id,
                    cache_salt=cache_salt,
                    priority=priority,
                    pooling=pooling,
                    tenant=tenant,
                    adapter=adapter,
                )
            except QueueFullError as error:
                refusals.append(error)
                continue
            except EngineDeadError:  # since it was asked a moment ago
                continue
            self.router.sent(i, len(prompt_token_ids), hashes)
            return stream
        if refusals:
            raise soonest(refusals)
        raise EngineDeadError(self.death_reason or "no engine is running", self.retry_after_seconds)

    def _loads(self) -> list[Load | None]:
        loads: list[Load | None] = []
        for i, engine in enumerate(self.engines):
            if self._lives[i] != engine.num_restarts:
                self._lives[i] = engine.num_restarts
                self.router.forget(i)
            busy = engine.admission
            loads.append(Load(busy.num_requests, busy.num_queued_tokens) if engine.alive else None)
        return loads

    def abort(self, request_id: str) -> None:
        for engine in self.engines:  # who does not know it ignores it
            engine.abort(request_id)

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        """Call back after each step of any engine, with `stats`."""
        self._on_step.append(callback)

    def on_output(self, callback: Callable[[TokenOutput], None]) -> None:
        for engine in self.engines:
            engine.on_output(callback)

    def on_finish(self, callback: Callable[[TokenOutput], None]) -> None:
        for engine in self.engines:
            engine.on_finish(callback)

    def _step(self, i: int, stats: StepStats) -> None:
        before = self._parts[i]
        # what ends between steps comes without totals: they stay, and so does what is said of such a message
        self._parts[i] = msgspec.structs.replace(
            stats, **{name: _larger(getattr(before, name), getattr(stats, name)) for name in TOTALS}
        )
        own = {name: getattr(stats, name) for name in _OF_ONE_STEP}
        self.stats = msgspec.structs.replace(_summed(self._parts), **own)
        told = self.stats if stats.num_steps else msgspec.structs.replace(self.stats, num_steps=0)
        for callback in self._on_step:
            callback(told)

    # -- life ----------------------------------------------------------------------------------------------------

    async def close(self, reason: str = CLOSED) -> None:
        await asyncio.gather(*(engine.close(reason) for engine in self.engines))

    async def kill(self, reason: str = CLOSED) -> None:
        """As close, without waiting for the steps that run."""
        await asyncio.gather(*(engine.kill(reason) for engine in self.engines))

    def _one_given_up(self, future: asyncio.Future[str]) -> None:
        if future.cancelled():
            return
        left = [engine for engine in self.engines if not engine.given_up.done()]
        if left:
            logger.error("one of %d engines is given up: %s", len(self.engines), future.result())
        elif not self.given_up.done():
            self.given_up.set_result(future.result())


def soonest(refusals: Sequence[QueueFullError]) -> QueueFullError:
    return min(refusals, key=lambda error: error.retry_after_seconds)


def _together(infos: Sequence[EngineInfo]) -> EngineInfo:
    first = infos[0]
    added = ("max_num_seqs", "max_queued_requests", "max_queued_tokens", "kv_bytes")
    sums = {name: sum(getattr(info, name) for info in infos) for name in added}
    num_blocks = 1 + sum(info.num_blocks - 1 for info in infos)  # block 0 of each is never handed out
    pids = [info.pid for info in infos]
    return msgspec.structs.replace(first, num_blocks=num_blocks, replica_pids=pids, **sums)


def _summed(parts: Sequence[StepStats]) -> StepStats:
    """Counts added up."""
    found = msgspec.structs.replace(parts[0])
    for part in parts[1:]:
        for name in StepStats.__struct_fields__:
            setattr(found, name, _added(name, getattr(found, name), getattr(part, name)))
    return found


def _added(name: str, one: Any, other: Any) -> Any:
    if name == "oldest_waiting":
        return min(one, other) if one and other else one or other
    if isinstance(one, dict):
        return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}
    return sorted({*one, *other}) if isinstance(one, list) else one + other


def _larger(before: Any, now: Any) -> Any:
    """Of two readings of one total."""
    if isinstance(now, dict):
        return {key: max(before.get(key, 0.0), now.get(key, 0.0)) for key in {**before, **now}}
    return max(before, now)
