"""Metrics of the engine's steps (totals, phases, age, stall, shares of the limits) and of HTTP requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvfp4_runtime.engine.messages import MachineLimits, StepStats
from server.metrics import Metrics
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve
from tests.server.test_metrics import values


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    for module in ("server.metrics", "server.engine_metrics"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def stats(step: int, **facts: object) -> StepStats:
    return StepStats(1, 0, 60, 4, 64, num_steps=step, **facts)  # type: ignore[arg-type]


def made(**info: object) -> Metrics:
    return Metrics("tiny", fake_info(**info), StepStats(0, 0, 64, 0, 64))


def lines(metrics: Metrics, name: str) -> dict[str, float]:
    """Samples of `name` by their labels beside the model's and the engine's."""
    families = text_string_to_metric_families(metrics.render().decode())
    found = {}
    for sample in (sample for family in families for sample in family.samples if sample.name == name):
        own = sorted((key, value) for key, value in sample.labels.items() if key not in ("model_name", "engine"))
        found[",".join(f'{key}="{value}"' for key, value in own)] = sample.value
    return found


def test_step_totals_and_phases_are_the_engines_own() -> None:
    metrics = made()
    metrics.engine.on_step(stats(1, phase_seconds={"schedule": 0.1, "model": 2.0}, flops=1e9, step_seconds=0.3))
    metrics.engine.on_step(stats(2, phase_seconds={"schedule": 0.2, "model": 5.0}, flops=3e9, bytes_read=7.0))
    metrics.engine.on_step(StepStats(0, 0, 64, 0, 64))  # after an abort between steps
    found = values(metrics)
    assert found["nvfp4_engine_steps_total"] == 2
    assert found["vllm:estimated_flops_per_gpu_total"] == 3e9
    assert found["vllm:estimated_read_bytes_per_gpu_total"] == 7
    assert found["nvfp4_step_duration_seconds_count"] == 2
    assert found["nvfp4_step_duration_seconds_sum"] == pytest.approx(0.3)
    assert lines(metrics, "nvfp4_step_seconds_total") == {'phase="schedule"': 0.2, 'phase="model"': 5.0}


def test_queue_age_grows_while_no_step_ends_and_is_0_when_nobody_waits(clock: SimpleNamespace) -> None:
    metrics = made()
    assert values(metrics)["nvfp4_queue_age_seconds"] == 0
    metrics.engine.on_step(stats(1, oldest_waiting=997.0))
    clock.now = 1010.0
    assert values(metrics)["nvfp4_queue_age_seconds"] == 13
    metrics.engine.on_step(stats(2))
    assert values(metrics)["nvfp4_queue_age_seconds"] == 0


def test_a_stall_is_time_without_a_step_while_requests_are_in_the_engine(clock: SimpleNamespace) -> None:
    metrics = made()
    clock.now = 1500.0
    assert values(metrics)["nvfp4_stall_seconds"] == 0, "idle is no stall"
    metrics.start("r", prompt_tokens=3, max_tokens=9)
    clock.now = 1504.0
    assert values(metrics)["nvfp4_stall_seconds"] == 4, "not since the last step of an idle engine"
    metrics.engine.on_step(stats(1))
    clock.now = 1507.0
    assert values(metrics)["nvfp4_stall_seconds"] == 3
    metrics.failed("r")
    assert values(metrics)["nvfp4_stall_seconds"] == 0


def test_shares_of_the_limits_are_of_the_time_that_steps_took(clock: SimpleNamespace) -> None:
    metrics = made(limits=MachineLimits(100.0, 1000.0, "configured"))
    share = "nvfp4_machine_utilization"
    assert lines(metrics, share) == {'limit="memory_bandwidth"': 0, 'limit="compute"': 0}
    for i in range(3):
        clock.now += 1
        metrics.engine.on_step(
            stats(i + 1, step_seconds=0.5, flops=100.0 * i, bytes_read=20.0 * i, bytes_written=5.0 * i)
        )
    assert lines(metrics, share) == {'limit="memory_bandwidth"': 0.5, 'limit="compute"': 0.2}
    assert lines(metrics, "nvfp4_machine_flops_per_second") == {'how="configured"': 1000}
    clock.now += 60
    assert lines(metrics, share) == {'limit="memory_bandwidth"': 0, 'limit="compute"': 0}, "of the last 10 s"


def test_without_limits_nothing_is_compared() -> None:
    assert "nvfp4_machine" not in made().render().decode()


def test_what_is_held_is_told_by_purpose_and_by_line_of_the_report() -> None:
    metrics = made(scratch_bytes={"step": 5, "cuda_graphs": 7})
    assert lines(metrics, "nvfp4_scratch_bytes") == {'purpose="step"': 5, 'purpose="cuda_graphs"': 7}
    sizes = lines(metrics, "nvfp4_layer_weight_bytes")
    assert sizes == {'layer="qkv_proj",line="0",stored="nvfp4"': 1000, 'layer="lm_head",line="1",stored="bf16"': 500}
    assert 'isa="avx2",status="",threads="2"' in next(iter(lines(metrics, "nvfp4_backend_info")))


async def test_http_requests_are_counted_by_route_and_not_by_path(serve: Serve) -> None:
    server = await serve()
    await server.complete(max_tokens=4)
    await server.complete(max_tokens=-1)
    await server.http.get("/wp-admin/setup.php")
    for probe in ("/health", "/metrics", "/ping"):
        await server.http.get(probe)
    completions = {"handler": "/v1/completions", "method": "POST"}
    assert await server.metric("http_requests_total", **completions, status="2xx") == 1
    assert await server.metric("http_requests_total", **completions, status="4xx") == 1
    assert await server.metric("http_requests_total", handler="none", status="4xx") == 1
    await server.http.request("PROPFIND", "/v1/completions")
    await server.http.request("MKCOL", "/v1/completions")
    assert await server.metric("http_requests_total", method="other", status="4xx") == 2
    assert await server.metric("http_request_duration_seconds_count", **completions) == 2
    for code, count in (("200", 1), ("400", 1), ("404", 1)):
        assert await server.metric("nvfp4_http_responses_total", code=code) == count
    assert "wp-admin" not in (await server.http.get("/metrics")).text


async def test_a_requests_longest_choice_and_computed_prompt_are_observed(serve: Serve) -> None:
    server = await serve(FakeEngine(num_cached_tokens=2))
    await server.complete(prompt="abcd", n=3, max_tokens=5)
    assert await server.metric("vllm:request_max_num_generation_tokens_count") == 1
    assert await server.metric("vllm:request_max_num_generation_tokens_sum") == 5
    assert await server.metric("vllm:request_prefill_kv_computed_tokens_sum") == 3 * 2
    assert await server.metric("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 3 * 2
    assert await server.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 3 * 2
