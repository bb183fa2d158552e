"""What a grammar costs a decode step: steps of constrained and of free requests, in turns, in one engine.

    python -m nvfp4_runtime.engine.bench_structured MODEL [--batches 1 8 32] [--rounds 6] [--json FILE]

Each round decodes the same prompts STEPS steps freely, with a JSON schema, and with a regex; the schema asks for a
long array, so that nothing ends early. A turn counts by the median of its steps, prefill and the first ones left out.
"more" is the median over rounds of a turn's ratio to the free turn of its own round, so that a slow stretch of the
machine hits both. "waited" is the part of a step that sampling spent waiting for masks after the forward pass: 0 where
they overlapped it entirely.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.sampling.masks import Mask, Masks
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.spec import StructuredSpec

STEPS = 48
SKIPPED = 4  # the prefill, and steps that still warm up
PROMPT_TOKENS = 32
_ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "kind": {"enum": ["a", "b", "other"]}},
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
SPECS: dict[str, StructuredSpec | None] = {
    "free": None,
    "schema": StructuredSpec(kind="json", value=json.dumps({"type": "array", "items": _ITEM, "minItems": 500})),
    "regex": StructuredSpec(kind="regex", value=r"([A-Z][a-z]{2,9} [0-9]{1,4}(, |\. )){500}"),
}


class _Waiting:
    """Adds up the seconds sampling waits for masks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        of = Masks.of

        def timed(masks: Masks, grammar: GrammarState) -> Mask:
            started = time.perf_counter()
            masks.wait()
            self.seconds += time.perf_counter() - started
            return of(masks, grammar)

        Masks.of = timed  # type: ignore[assignment, method-assign]


def decode(engine: Engine, name: str, batch: int, round_id: int, temperature: float, waiting: _Waiting) -> list[Any]:
    """(seconds, seconds waited) of each decode step of `batch` requests."""
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=STEPS + 8, ignore_eos=True, structured=SPECS[name]
    )
    for i in range(batch):
        prompt = [1000 + 97 * i + 7 * position + round_id for position in range(PROMPT_TOKENS)]
        engine.add(Submit(f"{name}-{i}", prompt, params, time.monotonic()))
    found = []
    for step in range(STEPS):
        waiting.seconds = 0.0
        outputs, stats = engine.step()
        assert all(output.finish_reason is None for output in outputs), outputs
        if step >= SKIPPED and len(outputs) == batch:
            found.append((stats.step_seconds, waiting.seconds))
    for i in range(batch):
        engine.abort(f"{name}-{i}")
    return found


def measure(model: str, batches: list[int], rounds: int, temperature: float) -> list[dict[str, Any]]:
    cache = CacheConfig(enable_prefix_caching=False, num_blocks=1 + max(batches) * 8)
    scheduler = SchedulerConfig(max_num_seqs=max(batches), max_num_batched_tokens=2048, max_model_len=128)
    engine = build_engine(EngineConfig(model=model, cache=cache, scheduler=scheduler))
    waiting = _Waiting()
    rows = []
    for batch in batches:
        steps: dict[str, list[Any]] = {name: [] for name in SPECS}
        turns: dict[str, list[float]] = {name: [] for name in SPECS}
        for round_id in range(rounds):
            for name in list(SPECS)[:: 1 if round_id % 2 else -1]:
                turn = decode(engine, name, batch, round_id, temperature, waiting)
                steps[name] += turn
                turns[name].append(statistics.median(seconds for seconds, _ in turn))
        row: dict[str, Any] = {"batch": batch, "temperature": temperature}
        for name, times in steps.items():
            row[f"{name}_seconds"] = statistics.median(seconds for seconds, _ in times)
            row[f"{name}_waited_seconds"] = statistics.median(waited for _, waited in times)
            row[f"{name}_ratio"] = statistics.median(
                mine / free for mine, free in zip(turns[name], turns["free"], strict=True)
            )
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['batch']}", f"{row['temperature']:g}", f"{1e3 * row['free_seconds']:.2f}"]
    for name in list(SPECS)[1:]:
        more = row[f"{name}_ratio"] - 1
        cells += [
            f"{1e3 * row[f'{name}_seconds']:.2f}",
            f"{100 * more:+.1f} %",
            f"{1e6 * row[f'{name}_waited_seconds']:.0f}",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| batch | temperature | free ms | schema ms | more | waited us | regex ms | more | waited us |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = [row for t in args.temperature for row in measure(args.model, args.batches, args.rounds, t)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
