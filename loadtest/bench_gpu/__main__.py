"""One GPU's limits, kernels and engine, measured in one call: `make bench-gpu`.

    rcp          what rcp.approx returns, bit by bit (kept as rcp.bin beside the JSON file)
    limits       copy and read bandwidth, BF16 rate, launch gap: what the figures below are shares of
    check        every kernel of every backend against the reference
    linear       NVFP4 linears at Llama-3.1-8B's shapes, M = 1 to 2048, weights cold, beside cuBLAS BF16
    attention    paged decode attention at batch 1, 64, 256 and 1k, 8k tokens of BF16, FP8 and NVFP4
    nvfp4, bf16  the engine on a synthetic Llama-3.1-8B and its BF16 twin: decode steps and prefill
    transformers the twin in transformers' generate, where that is installed

Prints each part's findings when it ends, then the table of targets, and writes JSON. Each part is a process of its own:
one that fails is one line, and the others run. --rehearse walks through all of it on a CPU at tiny sizes, which proves
that it runs and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.bench_cpu.docs import commit
from loadtest.bench_engine import machine
from loadtest.bench_gpu.children import Budget, Outcome, Rows, run_part
from loadtest.bench_gpu.model import LLAMA_8B, TINY
from loadtest.bench_gpu.report import describe
from loadtest.bench_gpu.targets import Target, targets

KERNELS, ENGINE = "nvfp4_runtime.kernels.gpu_bench", "loadtest.bench_gpu.end_to_end"
# part -> most seconds it may take; in order of what is missed most if time runs out
PARTS = {
    "rcp": 40.0,
    "limits": 40.0,
    "check": 120.0,
    "linear": 140.0,
    "nvfp4": 150.0,
    "attention": 60.0,
    "bf16": 110.0,
    "transformers": 60.0,
}
BUDGET_SECONDS = 470.0
LINEAR_SHAPES = ("qkv", "o", "gate_up", "down")


def run(args: argparse.Namespace) -> list[Outcome]:
    budget = Budget(args.budget)
    environment = {"TRITON_INTERPRET": "1"} if args.rehearse else {}
    outcomes = []
    for part, at_most in PARTS.items():
        if part not in args.only:
            continue
        say(f"== {part}")
        outcome = run_part(part, *command(part, args), budget, at_most, environment)
        for row in outcome.rows:
            say(f"   {describe(row)}")
        if outcome.trouble:
            say(f"   {part} DID NOT FINISH: {outcome.trouble}")
        say(f"   {outcome.seconds:.0f} s, {max(0.0, budget.left):.0f} s left")
        outcomes.append(outcome)
    return outcomes


def command(part: str, args: argparse.Namespace) -> tuple[str, list[str]]:
    """(module, arguments) of a part."""
    rehearse = ["--rehearse"] if args.rehearse else []
    if part in ("nvfp4", "bf16", "transformers"):
        return ENGINE, [part, "--scratch", str(args.scratch), *rehearse]
    dump = ["--dump", str(args.json.parent / "rcp.bin")] if part == "rcp" else []
    return KERNELS, [part, "--seconds", str(args.seconds), *dump, *rehearse]


def document(args: argparse.Namespace, outcomes: list[Outcome], table: list[Target], seconds: float) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "rehearsal": args.rehearse,
        "host": machine(),
        "seconds": seconds,
        "targets": [
            {
                "name": t.name,
                "wanted": t.wanted,
                "at_least": t.at_least,
                "value": t.value,
                "verdict": t.verdict,
                "detail": t.detail,
            }
            for t in table
        ],
        "parts": [{"part": o.part, "trouble": o.trouble, "seconds": o.seconds, "findings": o.rows} for o in outcomes],
    }


def troubles(outcomes: list[Outcome]) -> list[str]:
    """Everything that failed or was found wrong, one line each. What a backend refuses is neither."""
    found = [f"{o.part}: {o.trouble}" for o in outcomes if o.trouble]
    for outcome in outcomes:
        found += [
            f"{outcome.part}: {describe(row)}" for row in outcome.rows if "failed" in row or row.get("ok") is False
        ]
    return found


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--scratch", type=Path, required=True, help="for the model's folders, 22 GB")
    parser.add_argument("--json", type=Path, default=Path("build/bench-gpu.json"))
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing per case")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: proves that it runs")
    args = parser.parse_args(argv)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes = run(args)
    rows: Rows = [row for outcome in outcomes for row in outcome.rows]
    measured = [] if args.rehearse else rows  # a rehearsal's times belong to no GPU
    table = targets(measured, TINY if args.rehearse else LLAMA_8B, LINEAR_SHAPES)
    say("\n" + "\n".join(str(target) for target in table))
    wrong = troubles(outcomes)
    if wrong:
        say("\nnot as it should be:\n" + "\n".join(f"    {line}" for line in wrong))
    found = document(args, outcomes, table, time.monotonic() - started)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(f"\n{args.json} written, {found['seconds']:.0f} s in all")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
