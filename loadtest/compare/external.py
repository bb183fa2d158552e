"""Files of other tools as runs of ours: `vllm bench serve --save-result` and guidellm's benchmarks.json.

Their definitions stay theirs: vLLM counts from when a request was sent, which behind a client's own limit is later than
when it was due; its gaps are between chunks. A report says which engine a run came from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.compare.report import Arrival, Run
from loadtest.traffic.figures import SLO, Figures, Spread, curve


def read_runs(file: Path, label: str, slo: SLO) -> list[Run]:
    """ValueError where it is neither tool's file, or lacks what every such file has."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    try:
        if isinstance(content, dict) and "benchmarks" in content:
            return [_guidellm(each, label, visit) for visit, each in enumerate(content["benchmarks"])]
        if isinstance(content, dict) and "output_throughput" in content:
            return [_vllm(content, label, slo)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: a field that was expected is missing: {error}") from error
    raise ValueError(f"{file}: expected JSON of `vllm bench serve --save-result` or of guidellm")


# -- vllm bench serve -------------------------------------------------------------------------------------------------


def _vllm(content: dict[str, Any], label: str, slo: SLO) -> Run:
    seconds, whole = float(content["duration"]), int(content["completed"])
    rate, users = content.get("request_rate"), content.get("max_concurrency")
    arrival = Arrival("poisson", float(rate)) if rate not in (None, "inf") else Arrival("closed", float(users or whole))
    tokens = int(content["total_output_tokens"])
    failures = {"vllm bench: failed": missing} if (missing := int(content["num_prompts"]) - whole) > 0 else {}
    ttfts, gaps = content.get("ttfts") or [], [gap for each in content.get("itls") or [] for gap in each]
    tpot = _vllm_spread(content, "tpot")
    goodput = content.get("request_goodput")
    if goodput is None and content.get("itls"):
        goodput = _vllm_good(content, slo) / seconds
    found = Figures(
        requests=int(content["num_prompts"]),
        failures=failures,
        seconds=seconds,
        prompt_tokens=int(content["total_input_tokens"]),
        cached_tokens=None,
        output_tokens=tokens,
        requests_per_second=float(content["request_throughput"]),
        output_per_second=float(content["output_throughput"]),
        per_user=1 / tpot.mean if tpot is not None and tpot.mean else None,
        goodput=goodput,
        attainment=None if goodput is None else goodput * seconds / int(content["num_prompts"]),
        events_per_token=(len(gaps) + len(ttfts)) / tokens if gaps and tokens else None,
        ttft=_vllm_spread(content, "ttft"),
        gap=_vllm_spread(content, "itl"),
        tpot=tpot,
        e2e=_vllm_spread(content, "e2el"),
        ttft_curve=curve(ttfts),
        gap_curve=curve(gaps),
    )
    return Run(label, "vllm bench", arrival, 0, "vllm", found)


def _vllm_spread(content: dict[str, Any], name: str) -> Spread | None:
    if f"mean_{name}_ms" not in content:
        return None
    shares = [content.get(f"p{share}_{name}_ms") for share in (90, 95, 99)]
    p90, p95, p99 = (None if value is None else value / 1e3 for value in shares)
    return Spread(content[f"mean_{name}_ms"] / 1e3, content[f"median_{name}_ms"] / 1e3, p90, p95, p99)


def _vllm_good(content: dict[str, Any], slo: SLO) -> int:
    """Requests that kept `slo`, by the details of --save-detailed."""
    good = 0
    rows = zip(content.get("ttfts") or [], content.get("itls") or [], content.get("output_lens") or [], strict=False)
    for ttft, gaps, count in rows:
        good += ttft <= slo.ttft and count > 0 and (count < 2 or sum(gaps) / (count - 1) <= slo.tpot)
    return good


# -- guidellm ---------------------------------------------------------------------------------------------------------


def _guidellm(benchmark: dict[str, Any], label: str, visit: int) -> Run:
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    seconds = float(benchmark["duration"])
    output = round(_total(metrics, "output_token_count"))
    tpot = _guidellm_spread(metrics, "time_per_output_token_ms", 1e3)
    failed = {f"guidellm: {kind}": int(totals[kind]) for kind in ("errored", "incomplete") if totals.get(kind)}
    found = Figures(
        requests=int(totals["successful"]) + sum(failed.values()),
        failures=failed,
        seconds=seconds,
        prompt_tokens=round(_total(metrics, "prompt_token_count")),
        cached_tokens=None,
        output_tokens=output,
        requests_per_second=int(totals["successful"]) / seconds,
        output_per_second=output / seconds,
        per_user=1 / tpot.mean if tpot is not None and tpot.mean else None,
        goodput=None,
        attainment=None,
        events_per_token=None,
        ttft=_guidellm_spread(metrics, "time_to_first_token_ms", 1e3),
        gap=_guidellm_spread(metrics, "inter_token_latency_ms", 1e3),
        tpot=tpot,
        e2e=_guidellm_spread(metrics, "request_latency", 1.0),
        ttft_curve=[],
        gap_curve=[],
    )
    return Run(label, "guidellm", _strategy(benchmark["config"]["strategy"]), visit, "guidellm", found)


def _strategy(strategy: dict[str, Any]) -> Arrival:
    for name in ("rate", "constant_rate"):
        if isinstance(strategy.get(name), (int, float)):
            return Arrival("poisson", float(strategy[name]))
    users = strategy.get("streams") or strategy.get("max_concurrency") or 1
    return Arrival("closed", float(users))


def _total(metrics: dict[str, Any], name: str) -> float:
    return float(metrics[name]["successful"]["total_sum"])


def _guidellm_spread(metrics: dict[str, Any], name: str, per_second: float) -> Spread | None:
    found = metrics.get(name, {}).get("successful")
    if not found or not found.get("count"):
        return None
    shares: Sequence[float] = [found["percentiles"][share] / per_second for share in ("p90", "p95", "p99")]
    return Spread(found["mean"] / per_second, found["median"] / per_second, *shares)
