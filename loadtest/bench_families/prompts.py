"""Prompts of latent attention, expanded and absorbed in turn: seconds to the first token, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.bench_cpu.workers import Engine

WAYS = {"expanded": False, "absorbed": True}
Seconds = dict[str, dict[int, list[float]]]  # way -> tokens of the prompt -> seconds of each round


def measure(config: dict[str, Any], lengths: Sequence[int], rounds: int, log: Path) -> Seconds:
    """Both ways, in turn, for each length and round; no two prompts begin alike."""
    engines = {way: Engine(way, config, log, absorbed=absorbed) for way, absorbed in WAYS.items()}
    found: Seconds = {way: {length: [] for length in lengths} for way in WAYS}
    for engine in engines.values():
        engine.generate([engine.prompt(2)], 2)
    for _ in range(rounds):
        for length in lengths:
            for way, engine in engines.items():
                found[way][length].append(engine.generate([engine.prompt(length)], 1)[0][0][0])
    for engine in engines.values():
        engine.close()
    return found


def table(name: str, seconds: Seconds) -> str:
    """Medians over rounds; lengths down."""
    lines = [
        f"| {name}, prompt | absorbed, tokens/s | expanded, tokens/s | times as fast |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for length, expanded in seconds["expanded"].items():
        fast, slow = statistics.median(expanded), statistics.median(seconds["absorbed"][length])
        lines.append(f"| {length} | {length / slow:.0f} | {length / fast:.0f} | {slow / fast:.2f} |")
    return "\n".join(lines)
