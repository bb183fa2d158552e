"""Decode attention at a long context: what a step costs more there than at a short one, for each type of KV cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.bench_cpu.measure import Limits
from loadtest.bench_cpu.shapes import Shape
from loadtest.bench_cpu.workers import Engine

CONTEXT = 8192
SHORT = 16
KV_VALUE_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}


@dataclass(frozen=True)
class ContextFigure:
    """Medians over rounds, of one type of cache.

    attention_seconds  step at CONTEXT minus step at SHORT tokens
    ratio              bytes of K and V per attention second over the read bandwidth measured around it
    step_ratio         bytes of weights, K and V per second of a whole step over it
    """

    kv_dtype: str
    step_seconds: float
    attention_seconds: float
    kv_bytes: float
    ratio: float
    step_ratio: float


def measure_context(
    shape: Shape, engines: dict[str, Engine], rounds: int, limits: Callable[[], Limits], say: Callable[[str], None]
) -> list[ContextFigure]:
    """`engines` by type of cache, all with prefix caching: the long prompt is computed once and found again after."""
    prompts = {kv: engine.prompt(CONTEXT) for kv, engine in engines.items()}
    for kv, engine in engines.items():
        say(f"computing {CONTEXT} tokens of context, {kv} cache")
        engine.generate([prompts[kv]], 1)
    rows: dict[str, list[tuple[float, float, float]]] = {kv: [] for kv in engines}
    before = limits()
    for turn in range(rounds):
        for kv, engine in engines.items():
            long, short = engine.step_seconds(prompts[kv], 32), engine.step_seconds(prompts[kv][:SHORT], 32)
            after = limits()
            rows[kv].append((long, short, (before["read"] + after["read"]) / 2))
            before = after
            milliseconds = f"{long * 1e3:.1f} ms at {CONTEXT} tokens, {short * 1e3:.1f} at {SHORT}"
            say(f"round {turn + 1} of {rounds}: {kv} KV, step {milliseconds}")
    return [context_figure(shape, kv, engines[kv].token_bytes(), readings) for kv, readings in rows.items()]


def context_figure(
    shape: Shape, kv_dtype: str, weight_bytes: float, readings: Sequence[tuple[float, float, float]]
) -> ContextFigure:
    """From (long step seconds, short step seconds, read bandwidth) of each round."""
    extra = shape.kv_bytes(CONTEXT - SHORT, KV_VALUE_BYTES[kv_dtype])
    everything = weight_bytes + shape.kv_bytes(CONTEXT, KV_VALUE_BYTES[kv_dtype])
    return ContextFigure(
        kv_dtype,
        statistics.median(long for long, _, _ in readings),
        statistics.median(long - short for long, short, _ in readings),
        extra,
        statistics.median(extra / (long - short) / read for long, short, read in readings),
        statistics.median(everything / long / read for long, _, read in readings),
    )
