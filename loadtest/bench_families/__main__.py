"""Decode speed of mixtures, hybrids and latent attention on a CPU, as times what the touched memory alone would take.

    python -m loadtest.bench_families [--only NAME ...] [--batches 1 8 32] [--prompts 512 2048]
                                     [--docs FILE] [--json FILE]

Three synthetic models with random NVFP4 weights (written once into ~/.cache/nvfp4, 3 GB), run by the engine in its own
process, greedy, after 16-token prompts. Of the steps in which every sequence got one token, medians. A step touches

    every linear that is no expert, and the head        once
    the experts that its tokens were sent to            once each, counted in the very steps that are measured
    states of a hybrid                                  read and written, per sequence
    keys and values, or latent vectors                  of all earlier tokens, per sequence

and the bound is these bytes over the read bandwidth measured before and after. Asked: at most 1.3 times that bound.

Of latent attention also prompts of --prompts tokens, expanded and absorbed in turn (prompts.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.bench_cpu import docs
from loadtest.bench_cpu.checkpoints import cache_folder
from loadtest.bench_cpu.measure import Limits
from loadtest.bench_cpu.profile import SKIPPED_STEPS, step_profile
from loadtest.bench_cpu.workers import Engine, MachineLimits
from loadtest.bench_engine import machine
from loadtest.bench_families import prompts as of_prompts
from loadtest.bench_families.checkpoints import ensure
from loadtest.bench_families.families import FAMILIES, LATENT, Family
from loadtest.neighbours import BUSY_CORES, Neighbours

ASKED = 1.3
PROMPT_TOKENS = 16
STEPS = {1: 64, 8: 48, 32: 32}


@dataclass(frozen=True)
class Reading:
    """One batch size of one family, in one round.

    step_seconds  median of the steps with a token for every sequence
    step_bytes    what such a step touches
    read          bytes per second, measured before and after
    """

    batch: int
    step_seconds: float
    step_bytes: float
    read: float

    @property
    def times_bound(self) -> float:
        return self.step_seconds * self.read / self.step_bytes


def dense_bytes(layers: Sequence[dict[str, Any]]) -> float:
    """Weights that every step touches: all but the experts, of the engine's own list of layers."""
    return float(sum(g["num_bytes"] for g in layers if g["stored"] != "-" and not g["name"].startswith("experts.")))


def expert_bytes(layers: Sequence[dict[str, Any]], family: Family) -> float:
    """Weights of one expert; 0 for a model without."""
    total = sum(g["num_bytes"] for g in layers if g["name"].startswith("experts."))
    return total / (family.moe_layers * family.num_experts) if family.num_experts else 0.0


def step_bytes(layers: Sequence[dict[str, Any]], family: Family, batch: int, experts: float, context: float) -> float:
    """What a step over `batch` sequences touches: `experts` experts over all layers, `context` tokens before each."""
    kept = batch * (2 * family.state_bytes + context * family.kv_bytes)
    return dense_bytes(layers) + experts * expert_bytes(layers, family) + kept


def reading(
    steps: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]], family: Family, batch: int, read: float
) -> Reading:
    """From the engine's record of its steps; the first ones prefill and warm up."""
    chosen = [step for step in steps if step["tokens"] == batch][SKIPPED_STEPS:]
    if not chosen:
        raise ValueError(f"no step of {batch} tokens after the first {SKIPPED_STEPS}; expected some")
    experts = statistics.mean(step["experts"] for step in chosen)
    touched = step_bytes(layers, family, batch, experts, PROMPT_TOKENS + SKIPPED_STEPS + len(chosen) / 2)
    return Reading(batch, statistics.median(step["seconds"] for step in chosen), touched, read)


def config(folder: Path, threads: int) -> dict[str, Any]:
    cache = {"num_blocks": 512, "enable_prefix_caching": False}
    return {"model": str(folder), "threads": threads, "cache": cache}


def measure(
    family: Family, folder: Path, args: argparse.Namespace, limits: Callable[[], Limits], log: Path
) -> dict[str, Any]:
    """Every batch size, a fresh engine each and `rounds` times: an engine tells its steps when it ends."""
    readings: list[Reading] = []
    profiles: dict[int, Any] = {}
    before = limits()["read"]
    for _ in range(args.rounds):
        for batch in args.batches:
            engine = Engine(family.name, config(folder, args.threads), log, steps=True, profile=args.profile)
            prompts = [engine.prompt(PROMPT_TOKENS) for _ in range(batch)]
            engine.generate(prompts, STEPS.get(batch, 32) + SKIPPED_STEPS)
            layers, steps = engine.info["layers"], engine.profile()
            engine.close()
            after = limits()["read"]
            found = reading(steps, layers, family, batch, (before + after) / 2)
            before = after
            readings.append(found)
            if args.profile:
                profiles[batch] = asdict(step_profile(steps, batch))
                say(json.dumps(profiles[batch]))
            say(
                f"{family.name} batch {batch}: {batch / found.step_seconds:.1f} tokens/s, step "
                f"{found.step_seconds * 1e3:.2f} ms, {found.step_bytes / 1e6:.0f} MB touched, "
                f"{found.read / 1e9:.1f} GB/s, {found.times_bound:.2f} x the bound"
            )
    return {"readings": [asdict(r) | {"times_bound": r.times_bound} for r in readings], "profiles": profiles}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Families and batch sizes down: medians over rounds."""
    lines = [
        "| model | batch | tokens/s | step, ms | touched, MB | GB/s read | times the bound | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, result in found.items():
        for batch in dict.fromkeys(r["batch"] for r in result["readings"]):
            rows = [r for r in result["readings"] if r["batch"] == batch]
            step, touched, read, times = (
                statistics.median(r[key] for r in rows) for key in ("step_seconds", "step_bytes", "read", "times_bound")
            )
            word = "met" if times <= ASKED else "MISSED"
            lines.append(
                f"| {name} | {batch} | {batch / step:.1f} | {step * 1e3:.2f} | {touched / 1e6:.0f} | {read / 1e9:.1f} "
                f"| {times:.2f} | {word} |"
            )
    return "\n".join(lines)


def describe(family: Family) -> str:
    total, active = family.num_parameters / 1e9, family.num_active / 1e9
    return f"{family.name}: {total:.2f}B parameters, {active:.2f}B of them active for a token"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes; its timers cost some")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table into this document")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: ensure(FAMILIES[name], args.cache) for name in args.only}
        limits = MachineLimits(args.threads, Path(scratch) / "limits.log")
        neighbours = Neighbours()
        for name, folder in folders.items():
            say(describe(FAMILIES[name]))
            found[name] = measure(FAMILIES[name], folder, args, limits, Path(scratch) / f"{name}.log")
        prompts: of_prompts.Seconds | None = None
        if args.prompts and LATENT.name in folders:
            settings, log = config(folders[LATENT.name], args.threads), Path(scratch) / "prompts.log"
            prompts = of_prompts.measure(settings, args.prompts, args.rounds, log)
        others = neighbours.cores()
        limits.close()
    busy = others is not None and others > BUSY_CORES
    what = f"{started} UTC, commit {docs.commit()}, {args.rounds} round(s), {args.threads} threads."
    if busy:
        what += f" NOT A QUIET MACHINE: others used {others:.2f} cores."
    tables = [table(found)]
    if prompts is not None:
        tables.append(of_prompts.table(LATENT.name, prompts))
    body = "\n\n".join([*tables, what])
    print(f"\n{machine()}\n\n{body}")
    if args.docs:
        docs.write_sections(args.docs, {"families": body})
    if args.json:
        report = {
            "made_at": started,
            "machine": machine() | {"cores_used_by_others": others},
            "families": found,
            "prompts": prompts,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
