"""What crosses between the server's process and the engine's: msgpack structs, length-prefixed. No pickle.

Client to engine: Start (once), then Submit, Abort, Shutdown. Engine to client: Progress while loading, then Ready or
Failed, then Outputs after each step, Beat before a long one and Refused for a request it cannot take.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.sampling.params import SamplingParams

Pooling = Literal["mean", "last"]


class Start(msgspec.Struct, tag=True):
    """First message: what to load, and how much to say of it (a level of `logging`)."""

    config: EngineConfig
    log_level: int = 30


class Submit(msgspec.Struct, tag=True):
    """A request. `arrival_seconds` is time.monotonic() at admission; `cache_salt` separates prefix caches.

    priority  lower goes first
    tenant    whose request it is: within a priority, tenants are served in turn (see fairness.py)
    adapter   the name of a loaded LoRA adapter, "": the model as it is
    pooling   nothing is generated: the answer is the prompt's final hidden states, averaged, or the last one
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_seconds: float
    cache_salt: str = ""
    priority: int = 0
    pooling: Pooling | None = None
    tenant: str = ""
    adapter: str = ""


class Abort(msgspec.Struct, tag=True):
    """End these requests; unknown ids are ignored, since a request may have finished on its way."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag=True):
    """Finish nothing, free everything, exit 0."""


class TokenLogprob(msgspec.Struct, array_like=True):
    """A token with its log-probability, its rank (1 = most likely) and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RequestTimes(msgspec.Struct, array_like=True):
    """Moments of a request's life, time.monotonic() seconds; 0 where it did not get there."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float


class TokenOutput(msgspec.Struct):
    """New tokens of one request. Exactly one output per request carries a finish_reason, and it is the last.

    finish_reason  "stop" (EOS, stop_token_ids), "length", "abort", "error"; None while running
    stop_reason    the stop token's id when one of stop_token_ids ended it
    error          with "error": why
    param          with "error": the request's field at fault, where the request is
    error_code     with "error": its kind in one word, where the request is not at fault: "model_output_invalid",
                   "engine_fault", "out_of_memory"
    ends_whole     "stop" because the grammar was complete: the last token is text, not what stopped it
    times          with a request's first token and with its last word
    embedding      the pooled hidden state at unit length, float32 [hidden_size] as bytes, of a request with `pooling`
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None
    error: str | None = None
    ends_whole: bool = False
    param: str | None = None
    embedding: bytes | None = None
    error_code: str | None = None

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        scores = [*(self.logprobs or ()), *filter(None, self.prompt_logprobs or ())]
        return 256 + 32 * len(self.token_ids) + sum(128 + 96 * len(score.top) for score in scores)

    def absorb(self, later: TokenOutput) -> None:
        """Become one output that says what this one and the next say. Not for a next that is an error: its reader
        gets these tokens first."""
        assert self.finish_reason is None
        assert later.finish_reason != "error"
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + later.prompt_logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.ends_whole, self.embedding = later.ends_whole, later.embedding
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)
        self.times = later.times or self.times


class StepStats(msgspec.Struct):
    """State after a step, and what the step did. Counters are totals since start.

    num_invalid_outputs    requests ended because their logits were not numbers
    num_faults             exceptions in steps that ended a request or made the scheduler start over
    num_memory_faults      steps that did not get the memory they asked for
    num_degenerate_outputs requests seen to repeat themselves (see engine/degenerate.py)
    phase_seconds   time of all steps by phase, see StepClock
    flops, ...      what all steps computed, read and wrote by estimate, see ModelCost
    oldest_waiting  arrival of the request that has waited longest, time.monotonic(); 0: none waits
    running_adapters, waiting_adapters  names of the LoRA adapters that some such request has, each once
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_used_blocks: int
    num_total_blocks: int
    step_seconds: float = 0.0
    step_prompt_tokens: int = 0
    step_generation_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_invalid_outputs: int = 0
    num_faults: int = 0
    num_memory_faults: int = 0
    num_degenerate_outputs: int = 0
    phase_seconds: dict[str, float] = {}
    flops: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    oldest_waiting: float = 0.0
    running_adapters: list[str] = []
    waiting_adapters: list[str] = []


class MachineLimits(msgspec.Struct):
    """What this machine can do at best, and where that is known from, for a person to read."""

    read_bytes_per_second: float
    flops_per_second: float
    how: str


class AdapterInfo(msgspec.Struct):
    """A loaded LoRA adapter: the name that requests choose it by, its folder, its largest rank."""

    name: str
    path: str
    rank: int


class LayerGroup(msgspec.Struct):
    """One line of the precision report: layers that are stored and run alike."""

    name: str
    count: int
    stored: str
    bits_per_weight: float
    num_bytes: int
    backend: str
    numerics: str
    reason: str = ""


class EngineInfo(msgspec.Struct, kw_only=True):
    """What was loaded and how it runs; sent once, with Ready.

    rank_pids     processes that share the layers with this one, where it started them
    replica_pids  of several engines described as one: each one's process
    """

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_queued_requests: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_dtype: str
    kv_bytes: int
    dtype: str
    numerics: str
    numerics_reason: str
    weight_bytes: dict[str, int]
    layers: list[LayerGroup]
    eos_token_ids: list[int]
    startup_seconds: dict[str, float]
    backends: dict[str, dict[str, str]]
    enable_prefix_caching: bool
    device: str = "cpu"
    pid: int = 0
    max_queued_tokens: int = 1 << 20
    scratch_bytes: dict[str, int] = {}
    limits: MachineLimits | None = None
    adapters: list[AdapterInfo] = []
    tensor_parallel_size: int = 1
    rank_pids: list[int] = []
    replica_pids: list[int] = []

    def has_adapter(self, name: str) -> bool:
        return any(adapter.name == name for adapter in self.adapters)


class Progress(msgspec.Struct, tag=True):
    """Loading goes on: `phase` names what, `fraction` how far (0..1)."""

    phase: str
    fraction: float


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """Loading failed, or the engine cannot go on. `kind` is the error's class name."""

    kind: str
    message: str
    flag: str | None = None


class Beat(msgspec.Struct, tag=True):
    """The engine lives; what it does next may take `expected_seconds` before anything else is heard of it."""

    expected_seconds: float = 0.0


class Outputs(msgspec.Struct, tag=True):
    outputs: list[TokenOutput]
    stats: StepStats


class Refused(msgspec.Struct, tag=True):
    """The engine would not take this request (the client's own checks come first, so this is rare)."""

    request_id: str
    kind: str
    message: str
    param: str | None = None


ToEngine = Start | Submit | Abort | Shutdown
FromEngine = Progress | Ready | Failed | Beat | Outputs | Refused
