"""What `nvfp4 top` shows, as plain lines: figures of the last interval and the precision report."""

from __future__ import annotations

from typing import Any

from server.top.scrape import Change

WIDTH = 24  # of bars
NOTHING = "-"


def load_lines(change: Change) -> list[str]:
    """Requests, KV use and prefix hits."""
    now = change.after
    usage = now.total("vllm:kv_cache_usage_perc")
    hits = change.share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    if hits is None and (queries := now.total("vllm:prefix_cache_queries_total")):
        hits = now.total("vllm:prefix_cache_hits_total") / queries
    age, preempted = now.total("nvfp4_queue_age_seconds"), now.total("vllm:num_preemptions_total")
    refused = change.rate("nvfp4_http_responses_total", code="429")
    return [
        f"running    {now.total('vllm:num_requests_running'):>8.0f}",
        f"waiting    {now.total('vllm:num_requests_waiting'):>8.0f}   oldest {seconds(age)}",
        f"ended      {change.rate('vllm:request_success_total'):>8.1f}/s refused {refused:.1f}/s",
        f"KV cache   {usage:>8.1%} {bar(usage)}",
        f"prefix hit {NOTHING if hits is None else f'{hits:.1%}':>8} preempted {preempted:.0f}",
        f"stall      {seconds(now.total('nvfp4_stall_seconds')):>8}",
    ]


def throughput_lines(change: Change) -> list[str]:
    """Tokens per second, and the share of the machine's limits where they are known."""
    limits = sorted(change.after.by("nvfp4_machine_utilization", "limit").items())
    return [
        f"generation {change.rate('vllm:generation_tokens_total'):>8.1f} tok/s",
        f"prompt     {change.rate('vllm:prompt_tokens_total'):>8.1f} tok/s",
        *(f"{name.replace('_', ' '):<18} {share:>6.1%} of the machine's limit" for name, share in limits),
    ]


def latency_lines(change: Change) -> list[str]:
    """Percentiles of what was observed in the interval."""
    rows = [
        ("TTFT", "vllm:time_to_first_token_seconds"),
        ("ITL", "vllm:inter_token_latency_seconds"),
        ("queue", "vllm:request_queue_time_seconds"),
        ("e2e", "vllm:e2e_request_latency_seconds"),
        ("step", "nvfp4_step_duration_seconds"),
    ]
    lines = [f"{'':<6}{'p50':>10}{'p95':>10}{'p99':>10}"]
    for label, name in rows:
        found = [change.percentile(name, q) for q in (0.5, 0.95, 0.99)]
        finest = change.finest(name)
        lines.append(f"{label:<6}" + "".join(f"{_latency(each, finest):>10}" for each in found))
    return lines


def _latency(value: float | None, finest: float) -> str:
    if value is None:
        return NOTHING
    return f"<{seconds(finest)}" if value < finest else seconds(value)


def phase_lines(change: Change) -> list[str]:
    """Where the steps' time went."""
    phases = change.after.by("nvfp4_step_seconds_total", "phase")
    grown = {phase: change.count("nvfp4_step_seconds_total", phase=phase) for phase in phases}
    total = sum(grown.values())
    if not total:
        return ["no step in this interval"]
    return [
        f"{phase:<9}{share / total:>6.1%} {bar(share / total)}"
        for phase, share in sorted(grown.items(), key=lambda item: -item[1])
    ]


def precision_lines(report: dict[str, Any]) -> list[str]:
    """What runs in which precision."""
    kv, totals = report["kv_cache"], report["totals"]
    lines = [
        f"{report['model']}: {report['architecture']} on {report['device']}",
        f"numerics {report['numerics']} ({report['numerics_reason']}), activations {report['activation_dtype']}",
    ]
    head = [] if report["head"] is None else [report["head"]]
    lines += [
        f"{layer['count']:>4} x {layer['name']:<24} {layer['stored']:<7}{layer['bits_per_weight']:>6.2f} bit "
        f"{size(layer['bytes']):>9}  {layer['backend']} {layer['numerics']}"
        + (f"  ({layer['reason']})" if layer["reason"] else "")
        for layer in [*report["layers"], *head]
    ]
    lines.append(
        f"KV {kv['dtype']}, {size(kv['bytes'])}, {kv['tokens']} tokens; weights {size(totals['weight_bytes'])}"
    )
    return lines


def bar(share: float) -> str:
    filled = round(WIDTH * min(1.0, max(0.0, share)))
    return "█" * filled + "░" * (WIDTH - filled)


def seconds(value: float) -> str:
    if value < 1e-3 and value > 0:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
