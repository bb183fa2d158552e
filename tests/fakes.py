"""FakeEngine: the engine's asyncio interface with scripted tokens, for server tests. No process, no model."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvfp4_runtime.engine.admission import Admission
from nvfp4_runtime.engine.client import CLOSED
from nvfp4_runtime.engine.engine import check_request
from nvfp4_runtime.engine.messages import (
    EngineInfo,
    LayerGroup,
    Pooling,
    RequestTimes,
    StepStats,
    TokenLogprob,
    TokenOutput,
)
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import EngineDeadError, NVFP4Error
from nvfp4_runtime.sampling.params import SamplingParams

Script = Callable[[list[int], SamplingParams], Sequence[int]]


def fake_info(**changes: object) -> EngineInfo:
    """An EngineInfo as a small NVFP4 model on a CPU would give it."""
    facts: dict[str, object] = {
        "model": "/models/fake",
        "architecture": "LlamaForCausalLM",
        "vocab_size": 259,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_queued_requests": 1024,
        "max_num_batched_tokens": 64,
        "block_size": 16,
        "num_blocks": 65,
        "kv_dtype": "bfloat16",
        "kv_bytes": 65 * 16 * 1024,
        "dtype": "bfloat16",
        "numerics": "w4a16",
        "numerics_reason": "auto: what cpu runs fastest",
        "weight_bytes": {"nvfp4": 1000, "bf16": 500},
        "layers": [
            LayerGroup("qkv_proj", 2, "nvfp4", 4.5, 1000, "cpu", "w4a16"),
            LayerGroup("lm_head", 1, "bf16", 16.0, 500, "reference", "dense", "cpu: not built"),
            LayerGroup("norm", 5, "-", 0.0, 0, "cpu", "bfloat16"),
            LayerGroup("rope", 2, "-", 0.0, 0, "cpu", "bfloat16"),
            LayerGroup("attention", 2, "-", 0.0, 0, "reference", "bfloat16", "cpu: D=80 is not built"),
        ],
        "eos_token_ids": [258],
        "startup_seconds": {"checkpoint": 0.1, "weights": 0.2},
        "backends": {"cpu": {"isa": "avx2", "threads": "2"}, "reference": {"isa": "AVX512", "threads": "4"}},
        "enable_prefix_caching": True,
    }
    return EngineInfo(**(facts | changes))  # type: ignore[arg-type]


def fake_logprob(token_id: int, count: int, ids: Sequence[int] | None = None) -> TokenLogprob:
    """The token first with -0.5, then `count` - 1 neighbours, each 1 less likely; or `ids`, each -2."""
    if ids is not None:
        return TokenLogprob(token_id, -0.5, 1, [(other, -2.0) for other in ids])
    return TokenLogprob(token_id, -0.5, 1, [(token_id + i, -0.5 - i) for i in range(count)])


@dataclass
class Submitted:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    priority: int = 0
    pooling: Pooling | None = None
    tenant: str = ""
    task: asyncio.Task[None] | None = None


class FakeEngine:
    """Answers each request with `script(prompt, params)`, cut where the real engine would (EOS, stop ids, length).

    step_seconds   pause before each output
    group          tokens per output
    num_cached_tokens  prompt tokens that each request is said to have found in the prefix cache
    gate           while cleared, nothing comes out
    """

    def __init__(
        self,
        script: Script | Sequence[int] | bytes | str = "Hello world, this is a scripted answer.",
        *,
        info: EngineInfo | None = None,
        step_seconds: float = 0.0,
        group: int = 1,
        num_cached_tokens: int = 0,
    ) -> None:
        self.info = info or fake_info()
        total = self.info.num_blocks - 1
        self.admission = Admission.of(self.info)
        self.stats = StepStats(0, 0, total, 0, total)
        self.death_reason: str | None = None
        self.submitted: list[Submitted] = []
        self.aborted: list[str] = []
        self.closed = False
        self.num_restarts = self.num_stalls = 0
        self.stalled_seconds = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self._script = script
        self._step_seconds = step_seconds
        self._group = group
        self._num_cached_tokens = num_cached_tokens
        self._streams: dict[str, TokenStream] = {}
        self._started: dict[str, float] = {}
        self._begun: set[str] = set()
        self._on_step: list[Callable[[StepStats], None]] = []
        self._on_output: list[Callable[[TokenOutput], None]] = []
        self._on_finish: list[Callable[[TokenOutput], None]] = []

    @property
    def alive(self) -> bool:
        return self.death_reason is None

    @property
    def running(self) -> int:
        return len(self._streams)

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
        if self.death_reason is not None:
            raise EngineDeadError(self.death_reason)
        check_request(prompt_token_ids, params, self.info)
        assert request_id not in self._streams, "the server used a request id twice"
        self.admission.admit(request_id, tenant, len(prompt_token_ids))
        stream = self._streams[request_id] = TokenStream(request_id)
        self._started[request_id] = time.monotonic()
        entry = Submitted(request_id, prompt_token_ids, params, cache_salt, priority, pooling, tenant)
        self.submitted.append(entry)
        self._report(len(prompt_token_ids), 0)
        entry.task = asyncio.get_running_loop().create_task(self._play(entry))
        return stream

    def abort(self, request_id: str) -> None:
        if request_id in self._streams:
            self.aborted.append(request_id)
            self._deliver(TokenOutput(request_id, [], finish_reason="abort"))

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self._on_step.append(callback)

    def on_output(self, callback: Callable[[TokenOutput], None]) -> None:
        self._on_output.append(callback)

    def on_finish(self, callback: Callable[[TokenOutput], None]) -> None:
        self._on_finish.append(callback)

    async def close(self, reason: str = CLOSED) -> None:
        self.closed = True
        self._fail_all(EngineDeadError(reason))

    def die(self, reason: str = "killed by the test") -> None:
        self.death_reason = reason
        self._fail_all(EngineDeadError(reason))

    def fail(self, message: str, code: str | None = None) -> None:
        """End every running request with an error of its own; the engine goes on."""
        for request_id in list(self._streams):
            self._deliver(TokenOutput(request_id, [], finish_reason="error", error=message, error_code=code))

    def _fail_all(self, error: NVFP4Error) -> None:
        for stream in self._streams.values():
            stream.put(error)
            self.admission.ended(stream.request_id)
        self._streams.clear()

    async def _play(self, entry: Submitted) -> None:
        params = entry.params
        if entry.pooling is not None:
            await asyncio.sleep(self._step_seconds)
            await self.gate.wait()
            self._deliver(TokenOutput(entry.request_id, [], finish_reason="stop", embedding=self.embedding(entry)))
            return
        tokens, reason, stop = self._cut(entry)
        scored = None
        if params.prompt_logprobs is not None:
            count = params.prompt_logprobs
            scored = [None, *(fake_logprob(token, count) for token in entry.prompt_token_ids[1:])]
        for start in range(0, len(tokens), self._group):
            await asyncio.sleep(self._step_seconds)
            await self.gate.wait()
            if entry.request_id not in self._streams:
                return
            part = tokens[start : start + self._group]
            output = TokenOutput(
                entry.request_id, part, prompt_logprobs=scored, num_cached_tokens=self._num_cached_tokens
            )
            scored = None
            if params.logprobs is not None:
                output.logprobs = [fake_logprob(token, params.logprobs, params.logprob_token_ids) for token in part]
            if start + self._group >= len(tokens):
                output.finish_reason, output.stop_reason = reason, stop
            self._deliver(output)

    @staticmethod
    def embedding(entry: Submitted) -> bytes:
        """(number of tokens, last token, 1 for mean): not of length 1, as a model's are not either."""
        values = [len(entry.prompt_token_ids), entry.prompt_token_ids[-1], float(entry.pooling == "mean")]
        return array("f", values).tobytes()

    def _cut(self, entry: Submitted) -> tuple[list[int], str, int | None]:
        """The tokens to say, at least one, and why they end."""
        params = entry.params
        script = self._script
        if isinstance(script, str | bytes):
            said: Sequence[int] = list(script.encode() if isinstance(script, str) else script)
        else:
            said = script(entry.prompt_token_ids, params) if callable(script) else script
        limit = params.max_tokens or self.info.max_model_len - len(entry.prompt_token_ids)
        tokens: list[int] = []
        while len(tokens) < limit:  # a script that is too short starts again
            token = said[len(tokens) % len(said)]
            tokens.append(token)
            if len(tokens) >= params.min_tokens:
                if token in self.info.eos_token_ids and not params.ignore_eos:
                    return tokens, "stop", None
                if token in params.stop_token_ids:
                    return tokens, "stop", token
        return tokens, "length", None

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.token_ids and output.request_id not in self._begun:
            self._begun.add(output.request_id)
            started = self._started[output.request_id]
            output.times = RequestTimes(started, started, started + 0.001, 0.0)
        for callback in self._on_output:
            callback(output)
        self.admission.started(output.request_id)
        if output.finish_reason is not None:
            self.admission.ended(output.request_id)
            del self._streams[output.request_id]
            started = self._started.pop(output.request_id)
            output.times = RequestTimes(started, started, started + 0.001, time.monotonic() + 0.001)
            for finished in self._on_finish:
                finished(output)
        self._report(0, len(output.token_ids))
        stream.put(output)

    def _report(self, prompt_tokens: int, generation_tokens: int) -> None:
        total = self.info.num_blocks - 1
        used = min(total, len(self._streams))
        self.stats = StepStats(
            num_running=len(self._streams),
            num_waiting=0,
            num_free_blocks=total - used,
            num_used_blocks=used,
            num_total_blocks=total,
            step_prompt_tokens=prompt_tokens,
            step_generation_tokens=generation_tokens,
            num_steps=self.stats.num_steps + 1,
        )
        for callback in self._on_step:
            callback(self.stats)
