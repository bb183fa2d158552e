"""SupervisedEngine: an engine process that is replaced when it dies or hangs. The same interface as EngineClient."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.admission import Admission
from nvfp4_runtime.engine.client import CLOSED, EngineClient, ProgressCallback
from nvfp4_runtime.engine.messages import EngineInfo, Pooling, StepStats, TokenOutput
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import EngineDeadError, NVFP4Error
from nvfp4_runtime.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_LATE_SECONDS = 1.0  # a watch that woke so late was itself stopped: what the engine sent meanwhile is read first
# Of StepStats: totals since a process started, which go on over restarts.
TOTALS = (
    "num_steps",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_invalid_outputs",
    "num_faults",
    "num_memory_faults",
    "num_degenerate_outputs",
    "phase_seconds",
    "flops",
    "bytes_read",
    "bytes_written",
)


@dataclass(frozen=True)
class Supervision:
    """When an engine is given up, and how often it is replaced.

    stall_seconds    work waits and nothing is heard for so long, beyond what was announced: the engine hangs
    load_seconds     a start that takes longer has failed
    max_restarts     in `window_seconds`; one more death is the end. 0: the first is
    backoff_seconds  before the second restart of a window, doubled for each further one; the first comes at once
    """

    stall_seconds: float = 30.0
    load_seconds: float = 1800.0
    max_restarts: int = 3
    window_seconds: float = 600.0
    backoff_seconds: float = 1.0

    def backoff(self, num_recent: int) -> float:
        return 0.0 if num_recent == 0 else min(30.0, self.backoff_seconds * 2.0 ** (num_recent - 1))


class SupervisedEngine:
    """One engine process at a time. What was running when it died has ended with an error: nothing is sent twice.

    num_restarts  engines started after the first
    num_stalls    engines that were killed because they hung
    given_up      done, with the reason, when no other engine will be started
    """

    def __init__(self, client: EngineClient, config: EngineConfig, policy: Supervision) -> None:
        self.info: EngineInfo = client.info
        self.stats: StepStats = client.stats
        self.num_restarts = 0
        self.num_stalls = 0
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._policy = policy
        self._client = client
        self._before = StepStats(0, 0, 0, 0, 0)  # totals of the engines that are gone
        self._restarts: deque[float] = deque()
        self._down: str | None = None
        self._stalled_since: float | None = None
        self._ready_at = 0.0
        self._load_took = 1.0
        self._on_step: list[Callable[[StepStats], None]] = []
        self._on_output: list[Callable[[TokenOutput], None]] = []
        self._on_finish: list[Callable[[TokenOutput], None]] = []
        self._wire(client)
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def launch(
        cls, config: EngineConfig, policy: Supervision, on_progress: ProgressCallback | None = None
    ) -> SupervisedEngine:
        """The first engine; what it raises while loading is raised here, and not tried again."""
        started = time.monotonic()
        engine = cls(await _launch(config, policy, on_progress), config, policy)
        engine._load_took = time.monotonic() - started
        return engine

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._down is None and self._client.alive

    @property
    def death_reason(self) -> str | None:
        return self._down or self._client.death_reason

    @property
    def stalled_seconds(self) -> float:
        """Of the engine that hangs, until another takes its place or it is at least gone."""
        if self._stalled_since is not None:
            return time.monotonic() - self._stalled_since
        return self._client.stalled_seconds

    @property
    def retry_after_seconds(self) -> float | None:
        """When the next engine should be ready; None when there will be none."""
        return None if self.given_up.done() else max(1.0, self._ready_at - time.monotonic())

    @property
    def admission(self) -> Admission:
        """Of the engine that runs now."""
        return self._client.admission

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
        """As EngineClient's; EngineDeadError with `retry_after_seconds` while an engine is being started."""
        if not self.alive:
            raise EngineDeadError(self.death_reason or "the engine is not running", self.retry_after_seconds)
        return self._client.submit(
            prompt_token_ids,
            params,
            request_id=request_id,
            cache_salt=cache_salt,
            priority=priority,
            pooling=pooling,
            tenant=tenant,
            adapter=adapter,
        )

    def abort(self, request_id: str) -> None:
        self._client.abort(request_id)

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self._on_step.append(callback)

    def on_output(self, callback: Callable[[TokenOutput], None]) -> None:
        self._on_output.append(callback)
        self._client.on_output(callback)

    def on_finish(self, callback: Callable[[TokenOutput], None]) -> None:
        self._on_finish.append(callback)
        self._client.on_finish(callback)

    def _wire(self, client: EngineClient) -> None:
        client.on_step(self._step)
        for callback in self._on_output:
            client.on_output(callback)
        for callback in self._on_finish:
            client.on_finish(callback)

    def _step(self, stats: StepStats) -> None:
        if self._down is not None:
            return  # the last words of an engine that is given up: its totals are in `_before`
        if stats.num_steps:
            totals = {name: _sum(getattr(self._before, name), getattr(stats, name)) for name in TOTALS}
        else:  # what ends between steps comes without totals: they stay, and so does what is said of such a message
            totals = {name: getattr(self.stats, name) for name in TOTALS}
        self.stats = msgspec.structs.replace(stats, **totals)
        told = self.stats if stats.num_steps else msgspec.structs.replace(self.stats, num_steps=0)
        for callback in self._on_step:
            callback(told)

    # -- life ----------------------------------------------------------------------------------------------------

    async def close(self, reason: str = CLOSED) -> None:
        await self._stop_watching()
        await self._client.close(reason)

    async def kill(self, reason: str = CLOSED) -> None:
        """As close, without waiting for the step that runs."""
        await self._stop_watching()
        await self._client.kill(reason)

    async def _stop_watching(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch(self) -> None:
        try:
            while not self.given_up.done():
                reason = await self._until_death()
                self._down = reason
                self._report_gone()
                await self._client.kill(reason)  # ended or not, nothing of it stays behind
                self._stalled_since = None
                await self._replace(reason)
        except Exception as error:
            logger.exception("the engine's watch failed")
            self._give_up(f"the engine cannot be watched any more: {type(error).__name__}")

    async def _until_death(self) -> str:
        """Return why the engine has to be replaced."""
        while True:
            asked = time.monotonic()
            try:
                await asyncio.wait_for(self._client.dead.wait(), _TICK_SECONDS)
                return self._client.death_reason or "the engine process ended"
            except TimeoutError:
                pass
            if time.monotonic() - asked > _LATE_SECONDS:
                continue
            stalled = self._client.stalled_seconds
            if stalled >= self._policy.stall_seconds:
                self._stalled_since = time.monotonic() - stalled
                self.num_stalls += 1
                return f"the engine hangs: work waits and no step has ended for {stalled:.0f} s"

    def _report_gone(self) -> None:
        """Nothing runs, nothing waits, no block is used: the gauges must not keep what the dead engine said last."""
        total = self.stats.num_total_blocks
        gone = {name: getattr(self.stats, name) for name in TOTALS}
        self.stats = self._before = StepStats(0, 0, total, 0, total, **gone)
        for callback in self._on_step:
            callback(self.stats)

    async def _replace(self, reason: str) -> None:
        """Start engines until one is ready, or the policy says it is enough."""
        policy = self._policy
        while True:
            now = time.monotonic()
            while self._restarts and self._restarts[0] < now - policy.window_seconds:
                self._restarts.popleft()
            if len(self._restarts) >= policy.max_restarts:
                self._give_up(reason)
                return
            wait = policy.backoff(len(self._restarts))
            self._restarts.append(now)
            self._ready_at = now + wait + self._load_took
            attempt = f"restart {len(self._restarts)} of at most {policy.max_restarts} in {policy.window_seconds:.0f} s"
            self._down = f"{reason}; another engine is being started ({attempt})"
            logger.error("engine: %s", self._down)
            await asyncio.sleep(wait)
            started = time.monotonic()
            try:
                client = await _launch(self._config, policy, None)
            except (NVFP4Error, OSError) as error:  # OSError: no process, file or memory to be had just now
                reason = f"the engine could not be started again: {error}"
                continue
            self._load_took = time.monotonic() - started
            self.num_restarts += 1
            self.info = client.info
            self._wire(client)
            self._client = client
            self._down = None
            logger.warning("engine: restarted in %.2f s, pid %d", self._load_took, client.info.pid)
            return

    def _give_up(self, reason: str) -> None:
        self._down = reason
        if not self.given_up.done():
            self.given_up.set_result(reason)


def _sum(before: Any, now: Any) -> Any:
    """Two totals, or two dicts of totals, as one."""
    if isinstance(now, dict):
        return {key: before.get(key, 0) + now.get(key, 0) for key in {**before, **now}}
    return before + now


async def _launch(config: EngineConfig, policy: Supervision, on_progress: ProgressCallback | None) -> EngineClient:
    try:
        async with asyncio.timeout(policy.load_seconds):
            return await EngineClient.launch(config, on_progress)
    except TimeoutError:
        raise EngineDeadError(f"the engine was not ready after {policy.load_seconds:.0f} s") from None
