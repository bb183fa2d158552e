"""Results of other tools become runs, in their own definitions; files of neither are refused."""

from __future__ import annotations

import json

import pytest

from loadtest.compare.external import read_runs
from loadtest.compare.report import Arrival
from loadtest.traffic.figures import SLO

VLLM = {
    "date": "20260101-000000", "backend": "openai", "model_id": "m", "num_prompts": 3, "request_rate": "inf",
    "max_concurrency": 2, "duration": 2.0, "completed": 2, "total_input_tokens": 20, "total_output_tokens": 6,
    "request_throughput": 1.0, "output_throughput": 3.0, "mean_ttft_ms": 300.0, "median_ttft_ms": 200.0,
    "p99_ttft_ms": 900.0, "mean_tpot_ms": 25.0, "median_tpot_ms": 20.0, "p99_tpot_ms": 40.0, "mean_itl_ms": 25.0,
    "median_itl_ms": 20.0, "p99_itl_ms": 40.0, "ttfts": [0.1, 1.5], "itls": [[0.01, 0.02], [0.03, 0.04]],
    "output_lens": [3, 3],
}  # fmt: skip


def spread(scale: float, count: int = 2) -> dict:
    names = ("p001", "p01", "p05", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p999")
    values = {"mean": 1.5 * scale, "median": scale, "count": count, "total_sum": 3 * scale}
    return {"successful": values | {"percentiles": {name: (i + 1) * scale for i, name in enumerate(names)}}}


def guidellm(**strategy: object) -> dict:
    metrics = {
        "request_totals": {"successful": 2, "errored": 1, "incomplete": 0, "total": 3},
        "prompt_token_count": spread(10), "output_token_count": spread(20), "time_to_first_token_ms": spread(100),
        "inter_token_latency_ms": spread(10), "time_per_output_token_ms": spread(10), "request_latency": spread(1),
    }  # fmt: skip
    return {"duration": 4.0, "config": {"strategy": strategy}, "metrics": metrics}


def read(tmp_path, content):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    return read_runs(file, "peer", SLO())


def test_vllm_bench_serve_is_read(tmp_path):
    (run,) = read(tmp_path, VLLM)
    assert (run.side, run.engine, run.arrival) == ("peer", "vllm", Arrival("closed", 2.0))
    assert run.figures.failures == {"vllm bench: failed": 1}
    assert run.figures.output_per_second == 3.0
    assert run.figures.ttft is not None
    assert (run.figures.ttft.p50, run.figures.ttft.p95, run.figures.ttft.p99) == (0.2, None, 0.9)
    assert run.figures.goodput == 0.5  # one of two kept its SLO, in two seconds
    assert run.figures.attainment == pytest.approx(1 / 3)
    assert run.figures.per_user == 40


def test_without_details_nobody_knows_the_goodput(tmp_path):
    (run,) = read(tmp_path, {key: value for key, value in VLLM.items() if key not in ("ttfts", "itls", "output_lens")})
    assert run.figures.goodput is None
    (run,) = read(tmp_path, VLLM | {"request_goodput": 0.25, "request_rate": 7.0})
    assert (run.figures.goodput, run.arrival) == (0.25, Arrival("poisson", 7.0))


def test_guidellm_is_read_benchmark_by_benchmark(tmp_path):
    content = {"benchmarks": [guidellm(type_="concurrent", streams=8), guidellm(type_="poisson", rate=2.5)]}
    one, two = read(tmp_path, content)
    assert (one.arrival, two.arrival) == (Arrival("closed", 8.0), Arrival("poisson", 2.5))
    assert one.figures.failures == {"guidellm: errored": 1}
    assert one.figures.output_per_second == pytest.approx(60 / 4)
    assert one.figures.ttft is not None
    assert one.figures.ttft.p95 == pytest.approx(0.9)
    assert one.figures.e2e is not None
    assert one.figures.e2e.p99 == 10
    assert one.figures.goodput is None


@pytest.mark.parametrize("content", [{"a": 1}, [], {"benchmarks": [{"metrics": {}}]}, {"output_throughput": 3}])
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"r\.json: "):
        read(tmp_path, content)
