"""Every Prometheus metric, declared once: vLLM's names and meanings, then ours with prefix nvfp4_."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from nvfp4_runtime.engine.messages import EngineInfo, StepStats, TokenOutput
from server.engine_metrics import EngineMetrics
from server.lean_histogram import LeanHistogram
from server.recent import RecentRequests
from server.request_metrics import RequestMetrics

ENGINE = "0"  # vLLM numbers its data-parallel engines; we run one
RATE_WINDOW_SECONDS = 10.0

# Without the creation times that would double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client did not annotate it

_TTFT = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
]
_PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
_ITERATION = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
_CHOICES = [1, 2, 5, 10, 20]
_LAG = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]


def one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    series = (mantissa * 10**exponent for exponent in range(len(str(limit))) for mantissa in (1, 2, 5))
    return [value for value in series if value <= limit]


@dataclass(slots=True)
class _Request:
    """What a request's last observations need; complete when released by the server and finished by the engine.

    arrival, last_token   time.monotonic()
    cached_tokens         of the prompt, found in the prefix cache
    num_tokens            of those that came from the engine
    ended_as, num_taken   finish reason and tokens of the answer, where a stop string ended it
    """

    prompt_tokens: int
    max_tokens: int
    arrival: float
    tenant: str
    cached_tokens: int = 0
    num_tokens: int = 0
    last_token: float = 0.0
    ended_as: str | None = None
    num_taken: int | None = None
    released: bool = False
    last_output: TokenOutput | None = None


class Metrics:
    """One server's metrics in a registry of their own."""

    def __init__(self, model_name: str, info: EngineInfo, initial: StepStats) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, ENGINE)
        self._requests: dict[str, _Request] = {}
        self._last = initial
        self._recent: deque[tuple[float, int, int]] = deque()
        self.recent_requests = RecentRequests()
        self._num_arrived = 0
        self._declare_load()
        self._declare_requests(info.max_model_len)
        self._declare_ours(info)
        self.engine = EngineMetrics(self._labels, info, self.registry, self._oldest_in_engine)
        self.http = RequestMetrics(self._labels, one_two_five(info.max_model_len), self.registry)
        self._lora: Gauge | None = None
        self._lora_shown: tuple[str, ...] = ()
        if info.adapters:
            self._num_adapters = str(len(info.adapters))
            self._lora = Gauge(
                "vllm:lora_requests_info",
                "When the LoRA adapters in use last changed (seconds since 1970); which, by its labels.",
                ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
                registry=self.registry,
            )
        self.observe_state(initial)

    # -- declarations -----------------------------------------------------------------------------------------------

    def _declare_load(self) -> None:
        self.num_running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self.num_waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Waiting requests by what they wait for.",
            ("model_name", "engine", "reason"),
            registry=self.registry,
        )
        self.waiting_capacity = by_reason.labels(*self._labels, "capacity")
        by_reason.labels(*self._labels, "deferred").set(0)
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.cache_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.cache_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = self._counter("vllm:num_preemptions", "Requests whose blocks were taken back.")
        self.iteration_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens per engine step.", _ITERATION)

    def _declare_requests(self, max_model_len: int) -> None:
        tokens = one_two_five(max_model_len)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that gave a token.")
        self.prompt_tokens_cached = self._counter("vllm:prompt_tokens_cached", "Of these, found in the prefix cache.")
        by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "The same by where their KV came from.",
            ("model_name", "engine", "source"),
            registry=self.registry,
        )
        self.prompt_tokens_computed = by_source.labels(*self._labels, "local_compute")
        self.prompt_tokens_hit = by_source.labels(*self._labels, "local_cache_hit")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.request_success = Counter(
            "vllm:request_success",
            "Requests that ended, by finish reason.",
            ("model_name", "engine", "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.request_success.labels(*self._labels, reason)
        self.request_prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", tokens
        )
        self.prefill_computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens per request that were not cached.", tokens
        )
        self.params_n = self._histogram("vllm:request_params_n", "The n of each HTTP request.", _CHOICES)
        self.params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "The max_tokens of each request.", tokens
        )
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.itl = LeanHistogram(
            "vllm:inter_token_latency_seconds",
            "Between tokens of a request.",
            dict(zip(("model_name", "engine"), self._labels, strict=True)),
            _PER_TOKEN,
            self.registry,
        )
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _PER_TOKEN
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first scheduling.", _LATENCY)
        self.inference = self._histogram("vllm:request_inference_time_seconds", "Scheduling to last token.", _LATENCY)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "Scheduling to first token.", _LATENCY)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", _LATENCY)

    def _declare_ours(self, info: EngineInfo) -> None:
        cache = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.kv_dtype,
            "enable_prefix_caching": str(info.enable_prefix_caching),
            "kv_cache_size_tokens": str((info.num_blocks - 1) * info.block_size),
            "kv_cache_max_concurrency": f"{(info.num_blocks - 1) * info.block_size / info.max_model_len:.2f}",
        }
        self._info("vllm:cache_config_info", "The KV cache's configuration, as labels.", cache)
        self._info(
            "nvfp4_numerics_info",
            "Which arithmetic runs, and why.",
            {
                "numerics": info.numerics,
                "reason": info.numerics_reason,
                "dtype": info.dtype,
                "kv_dtype": info.kv_dtype,
                "device": info.device,
            },
        )
        layers = Gauge(
            "nvfp4_layer_kernel_info",
            "Layers by kind: how they are stored and which kernel runs them; the value counts them.",
            ("model_name", "engine", "layer", "stored", "kernel", "numerics", "reason"),
            registry=self.registry,
        )
        for group in info.layers:
            layers.labels(*self._labels, group.name, group.stored, group.backend, group.numerics, group.reason).set(
                group.count
            )
        self._by_label("nvfp4_weight_bytes", "Bytes of weights by stored format.", "stored", info.weight_bytes)
        self._by_label("nvfp4_startup_seconds", "Start-up time by phase.", "phase", info.startup_seconds)
        self._gauge("nvfp4_kv_cache_bytes", "Bytes of the KV cache.").set(info.kv_bytes)
        self._gauge("nvfp4_kv_cache_blocks", "KV blocks that requests can use.").set(info.num_blocks - 1)
        self.used_blocks = self._gauge("nvfp4_kv_cache_used_blocks", "KV blocks that requests hold.")
        self.loop_lag = self._histogram(
            "nvfp4_event_loop_lag_seconds", "How late the server's event loop woke a timer.", _LAG
        )
        rate = Gauge(
            "nvfp4_tokens_per_second",
            f"Tokens computed per second over the last {RATE_WINDOW_SECONDS:.0f} s.",
            ("model_name", "engine", "phase"),
            registry=self.registry,
        )
        rate.labels(*self._labels, "prompt").set_function(lambda: self._rate(1))
        rate.labels(*self._labels, "generation").set_function(lambda: self._rate(2))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name", "engine"), registry=self.registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name", "engine"), registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        declared = Histogram(name, text, ("model_name", "engine"), buckets=list(buckets), registry=self.registry)
        return declared.labels(*self._labels)

    def _info(self, name: str, text: str, labels: dict[str, str]) -> None:
        gauge = Gauge(name, text, ("model_name", "engine", *labels), registry=self.registry)
        gauge.labels(*self._labels, *labels.values()).set(1)

    def _by_label(self, name: str, text: str, label: str, values: dict[str, int] | dict[str, float]) -> None:
        gauge = Gauge(name, text, ("model_name", "engine", label), registry=self.registry)
        for key, value in values.items():
            gauge.labels(*self._labels, key).set(value)

    # -- observations -----------------------------------------------------------------------------------------------

    def observe_state(self, stats: StepStats) -> None:
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.waiting_capacity.set(stats.num_waiting)
        self.kv_usage.set(stats.num_used_blocks / max(1, stats.num_total_blocks))
        self.used_blocks.set(stats.num_used_blocks)
        if self._lora is not None:
            self._show_adapters(self._lora, ",".join(stats.running_adapters), ",".join(stats.waiting_adapters))

    def _show_adapters(self, gauge: Gauge, running: str, waiting: str) -> None:
        """One sample at a time: one for every combination there ever was would only grow."""
        if (running, waiting) != self._lora_shown:
            self._lora_shown = (running, waiting)
            gauge.clear()
            gauge.labels(self._num_adapters, running, waiting).set_to_current_time()

    def on_step(self, stats: StepStats) -> None:
        """After each engine step (and after aborts between steps, which do not count as one)."""
        self.observe_state(stats)
        last, self._last = self._last, stats
        self.preemptions.inc(stats.num_preemptions - last.num_preemptions)
        self.cache_queries.inc(stats.prefix_cache_queries - last.prefix_cache_queries)
        self.cache_hits.inc(stats.prefix_cache_hits - last.prefix_cache_hits)
        if stats.step_prompt_tokens or stats.step_generation_tokens:
            self.iteration_tokens.observe(stats.step_prompt_tokens + stats.step_generation_tokens)
            now = time.monotonic()
            self._recent.append((now, stats.step_prompt_tokens, stats.step_generation_tokens))
            self._forget(now)

    def accepted(self, n: int) -> None:
        """An HTTP request whose choices have all been submitted."""
        self.params_n.observe(n)

    def start(self, request_id: str, prompt_tokens: int, max_tokens: int, tenant: str = "") -> None:
        """A choice has been submitted, with the API key of `tenant`."""
        self._requests[request_id] = _Request(prompt_tokens, max_tokens, time.monotonic(), tenant)

    def on_output(self, output: TokenOutput) -> None:
        """Tokens of a request have arrived from the engine, whoever reads them and however slowly."""
        count = len(output.token_ids)
        self._num_arrived += count  # a counter's lock costs more than the addition: see render
        request = self._requests.get(output.request_id)
        if request is None or not count:
            return
        now = time.monotonic()
        if request.num_tokens == 0:
            self.ttft.observe(now - request.arrival)
            self.prompt_tokens.inc(request.prompt_tokens)
            self.prompt_tokens_cached.inc(output.num_cached_tokens)
            self.prompt_tokens_hit.inc(output.num_cached_tokens)
            self.prompt_tokens_computed.inc(request.prompt_tokens - output.num_cached_tokens)
            request.cached_tokens = output.num_cached_tokens
        else:
            self.itl.observe((now - request.last_token) / count, count)
        request.num_tokens += count
        request.last_token = now

    def failed(self, request_id: str) -> None:
        if (request := self._requests.pop(request_id, None)) is not None:
            self.request_success.labels(*self._labels, "error").inc()
            self.recent_requests.add(
                request.tenant, request_id, "error", request.prompt_tokens, request.cached_tokens, request.num_tokens
            )

    def released(self, request_id: str) -> None:
        """The server has taken a request's last token, or is no longer interested in it."""
        if request := self._requests.get(request_id):
            request.released = True
            self._finish_if_complete(request_id, request)

    def stopped(self, request_id: str, num_tokens: int) -> None:
        """A stop string ended a request's answer after `num_tokens`, whatever the engine did meanwhile."""
        if request := self._requests.get(request_id):
            request.ended_as, request.num_taken = "stop", num_tokens
        self.released(request_id)

    def on_finish(self, output: TokenOutput) -> None:
        """The engine's last word on a request; its tokens may still be on their way to the answer."""
        if request := self._requests.get(output.request_id):
            request.last_output = output
            self._finish_if_complete(output.request_id, request)

    def _finish_if_complete(self, request_id: str, request: _Request) -> None:
        output = request.last_output
        if output is None or not request.released:
            return
        del self._requests[request_id]
        reason = request.ended_as or output.finish_reason
        assert reason is not None, "the last output of a request says why it ended"
        self.request_success.labels(*self._labels, reason).inc()
        self.request_prompt_tokens.observe(request.prompt_tokens)
        self.prefill_computed.observe(request.prompt_tokens - output.num_cached_tokens)
        taken = request.num_tokens if request.num_taken is None else request.num_taken
        self.request_generation_tokens.observe(taken)
        self.params_max_tokens.observe(request.max_tokens)
        times = output.times
        self.recent_requests.add(
            request.tenant, request_id, reason, request.prompt_tokens, request.cached_tokens, taken, times
        )
        if times is None:
            return
        self.e2e.observe(times.finished - times.arrival)
        if times.scheduled:
            self.queue.observe(times.scheduled - times.arrival)
            self.inference.observe(times.finished - times.scheduled)
        if times.first_token:
            self.prefill.observe(times.first_token - times.scheduled)
            self.decode.observe(times.finished - times.first_token)
            if request.num_tokens > 1:
                self.tpot.observe((times.finished - times.first_token) / (request.num_tokens - 1))

    # -- reading ----------------------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """The exposition text of GET /metrics."""
        self.generation_tokens.inc(self._num_arrived)
        self._num_arrived = 0
        return generate_latest(self.registry)

    def _oldest_in_engine(self) -> float | None:
        return min((each.arrival for each in self._requests.values() if each.last_output is None), default=None)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_SECONDS:
            self._recent.popleft()

    def _rate(self, column: int) -> float:
        self._forget(time.monotonic())
        return sum(row[column] for row in self._recent) / RATE_WINDOW_SECONDS
