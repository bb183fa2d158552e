"""/metrics: vLLM's names with vLLM's meanings, and ours."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvfp4_runtime.engine.messages import StepStats, TokenOutput
from server.metrics import Metrics, one_two_five
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve, events
from tests.server.test_disconnect import BODIES, Client, until

VLLM = {
    "gauge": {
        "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc",
        "cache_config_info",
    },
    "counter": {
        "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached",
        "generation_tokens", "request_success", "prompt_tokens_by_source", "estimated_flops_per_gpu",
        "estimated_read_bytes_per_gpu", "estimated_write_bytes_per_gpu",
    },
    "histogram": {
        "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "request_params_n",
        "request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_max_num_generation_tokens", "request_prefill_kv_computed_tokens",
    },
}  # fmt: skip
OURS = {
    "nvfp4_weight_bytes", "nvfp4_kv_cache_bytes", "nvfp4_kv_cache_blocks", "nvfp4_kv_cache_used_blocks",
    "nvfp4_event_loop_lag_seconds", "nvfp4_invalid_outputs", "nvfp4_step_faults", "nvfp4_step_memory_faults",
    "nvfp4_degenerate_outputs", "nvfp4_engine_restarts", "nvfp4_engine_stalls", "nvfp4_engine_up",
    "nvfp4_queued_prompt_tokens", "nvfp4_max_queued_prompt_tokens",
    "nvfp4_tokens_per_second", "nvfp4_layer_kernel_info", "nvfp4_numerics_info", "nvfp4_startup_seconds",
    "nvfp4_engine_steps", "nvfp4_step_seconds", "nvfp4_step_duration_seconds", "nvfp4_queue_age_seconds",
    "nvfp4_stall_seconds", "nvfp4_scratch_bytes", "nvfp4_layer_weight_bytes", "nvfp4_backend_info",
    "nvfp4_http_responses",
}  # fmt: skip


async def test_every_name_and_label_is_there_before_the_first_request(serve: Serve) -> None:
    text = (await (await serve()).http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for kind, names in VLLM.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind, name
            for sample in family.samples:
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
    assert set(families) >= OURS
    vllm = {f"vllm:{name}" for names in VLLM.values() for name in names}
    process = {name for name in families if name.startswith(("process_", "nvfp4_engine_process_"))}
    assert set(families) == OURS | vllm | process | {"http_requests", "http_request_duration_seconds"}
    for name in ("resident_memory_bytes", "cpu_seconds", "open_fds"):
        assert {f"process_{name}", f"nvfp4_engine_process_{name}"} <= process


async def test_info_metrics_carry_facts_as_labels(serve: Serve) -> None:
    server = await serve()
    assert await server.metric("vllm:cache_config_info", block_size="16", num_gpu_blocks="65") == 1
    assert await server.metric("nvfp4_numerics_info", numerics="w4a16", dtype="bfloat16") == 1
    assert await server.metric("nvfp4_layer_kernel_info", layer="lm_head", kernel="reference", stored="bf16") == 1
    assert await server.metric("nvfp4_weight_bytes", stored="nvfp4") == 1000
    assert await server.metric("nvfp4_startup_seconds", phase="weights") == 0.2


async def test_tokens_and_latencies_are_counted_once_per_request(serve: Serve) -> None:
    server = await serve()
    await server.complete(prompt="abc", max_tokens=4)
    events(await server.complete(prompt="abcd", max_tokens=6, n=2, stream=True))
    assert await server.metric("vllm:prompt_tokens_total") == 3 + 4 + 4
    assert await server.metric("vllm:generation_tokens_total") == 4 + 6 + 6
    assert await server.metric("vllm:request_success_total", finished_reason="length") == 3
    assert await server.metric("vllm:request_generation_tokens_sum") == 16
    assert await server.metric("vllm:request_params_n_sum") == 1 + 2, "once per HTTP request"
    assert await server.metric("vllm:request_params_n_count") == 2
    assert await server.metric("vllm:inter_token_latency_seconds_count") == 3 + 5 + 5
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert await server.metric(f"vllm:{name}_count") == 3
    assert await server.metric("nvfp4_tokens_per_second", phase="generation") == pytest.approx(1.6)


async def test_stop_string_counts_as_stop_and_not_as_the_abort_that_carries_it_out(serve: Serve) -> None:
    server = await serve()
    await server.complete(max_tokens=39, stop="world")
    assert await server.metric("vllm:request_success_total", finished_reason="stop") == 1
    assert await server.metric("vllm:request_success_total", finished_reason="abort") == 0
    assert await server.metric("vllm:request_generation_tokens_sum") == len("Hello world")


async def test_stop_string_on_the_engines_last_token_counts_as_stop(serve: Serve) -> None:
    server = await serve()
    choice = (await server.complete(max_tokens=len("Hello"), stop="Hello")).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert server.engine.aborted == [], "the engine had ended it already, with length"
    assert await server.metric("vllm:request_success_total", finished_reason="stop") == 1
    assert await server.metric("vllm:request_success_total", finished_reason="length") == 0


async def test_prompt_tokens_found_in_the_prefix_cache_are_counted_once(serve: Serve) -> None:
    server = await serve(FakeEngine(num_cached_tokens=2))
    await server.complete(prompt="abc", max_tokens=4)
    assert await server.metric("vllm:prompt_tokens_cached_total") == 2
    assert await server.metric("vllm:prompt_tokens_total") == 3


def values(metrics: Metrics) -> dict[str, float]:
    """Samples by name; for metrics whose only labels are the model's and the engine's."""
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_step_counters_are_differences_of_the_engines_totals() -> None:
    def stats(queries: int, hits: int, preemptions: int, used: int) -> StepStats:
        return StepStats(
            3, 2, 64 - used, used, 64, prefix_cache_queries=queries, prefix_cache_hits=hits, num_preemptions=preemptions
        )

    metrics = Metrics("tiny", fake_info(), stats(1000, 100, 10, 0))
    metrics.on_step(stats(1070, 140, 12, 16))
    metrics.on_step(stats(1100, 150, 13, 48))
    found = values(metrics)
    assert found["vllm:prefix_cache_queries_total"] == 100
    assert found["vllm:prefix_cache_hits_total"] == 50
    assert found["vllm:num_preemptions_total"] == 3
    assert found["vllm:kv_cache_usage_perc"] == 0.75
    assert found["nvfp4_kv_cache_used_blocks"] == 48
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2


def test_times_between_tokens_are_those_of_their_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("server.metrics.time", SimpleNamespace(monotonic=lambda: clock.now))
    metrics = Metrics("tiny", fake_info(), StepStats(0, 0, 64, 0, 64))
    metrics.start("r", prompt_tokens=3, max_tokens=9)
    for clock.now, tokens in ((100.5, [1]), (101.0, [2]), (104.0, [3, 4])):
        metrics.on_output(TokenOutput("r", tokens))
        assert values(metrics)["vllm:time_to_first_token_seconds_sum"] == 0.5, "known while the request still runs"
    found = values(metrics)
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_sum"] == 0.5 + 1.5 + 1.5
    assert found["vllm:generation_tokens_total"] == 4


async def test_client_that_reads_nothing_distorts_no_latency(serve: Serve) -> None:
    server = await serve()
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"max_tokens": 20, "stream": True})
    client.reading.clear()
    await until(lambda: server.engine.submitted and server.engine.running == 0)
    assert client.sent == []
    assert await server.metric("vllm:time_to_first_token_seconds_count") == 1
    assert await server.metric("vllm:inter_token_latency_seconds_count") == 19
    assert await server.metric("vllm:generation_tokens_total") == 20
    assert await server.metric("vllm:prompt_tokens_total") == 2
    client.reading.set()
    await asyncio.wait_for(client.task, 30)
    assert await server.metric("vllm:request_success_total", finished_reason="length") == 1


async def test_client_that_left_counts_as_abort(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.002))
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True})
    await until(lambda: len(client.sent) > 3)
    assert await server.metric("vllm:num_requests_running") == 1
    client.left.set()
    await client.task
    assert await server.metric("vllm:request_success_total", finished_reason="abort") == 1
    assert await server.metric("vllm:num_requests_running") == 0
    assert await server.metric("nvfp4_kv_cache_used_blocks") == 0


async def test_engine_death_counts_as_error(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.002))
    client = Client(server, "/v1/completions", BODIES["/v1/completions"] | {"stream": True})
    await until(lambda: len(client.sent) > 3)
    server.engine.die()
    await client.task
    assert await server.metric("vllm:request_success_total", finished_reason="error") == 1


def test_token_buckets_are_a_1_2_5_series() -> None:
    assert one_two_five(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(256)[-1] == 200
