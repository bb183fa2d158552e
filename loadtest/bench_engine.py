"""Prefill and decode speed of our server beside transformers' BF16 `generate`, on one machine, in one run.

    python -m loadtest.bench_engine [--quick] [--json FILE]

Ours is `nvfp4 serve` in a child process, measured from outside over HTTP streams, as a user sees it; transformers runs
in another child process, measured inside around `generate`, which favours it. Both are loaded, and only one computes
at a time: they take turns, A B A B, so that a slow stretch of the machine hits both. Figures are medians of the turns.

prefill  batch x prompt tokens / time until the last sequence's first token
decode   tokens after that moment / time after it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from loadtest.client import Stream, complete_together
from loadtest.neighbours import BUSY_CORES, Neighbours
from loadtest.server_process import serving

Prompts = list[list[int]]
LEGS = ("prefill", "decode")


@dataclass(frozen=True)
class Plan:
    """What is measured: per batch size and repeat, one prefill and one decode turn for each side."""

    batches: tuple[int, ...]
    repeats: int
    prefill_tokens: int
    decode_prompt_tokens: int
    decode_tokens: int


FULL = Plan(batches=(1, 8, 32), repeats=3, prefill_tokens=512, decode_prompt_tokens=32, decode_tokens=64)
QUICK = Plan(batches=(1, 8), repeats=1, prefill_tokens=128, decode_prompt_tokens=16, decode_tokens=16)


class Side(Protocol):
    name: str

    def prefill(self, prompts: Prompts) -> float:
        """Seconds until every prompt has its first token."""
        ...

    def decode(self, prompts: Prompts, max_tokens: int) -> float:
        """Tokens per second, all sequences together, once each has its first token."""
        ...


class Ours:
    """The server at `url`, over HTTP."""

    name = "nvfp4"

    def __init__(self, url: str) -> None:
        self._url = url
        self.card: dict[str, Any] = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]

    def _streams(self, prompts: Prompts, max_tokens: int) -> list[Stream]:
        async def run() -> list[Stream]:
            limits = httpx.Limits(max_connections=None)  # the default of 100 would queue in the client
            async with httpx.AsyncClient(base_url=self._url, timeout=600, limits=limits) as client:
                return await complete_together(client, self.card["id"], prompts, max_tokens)

        return asyncio.run(run())

    def prefill(self, prompts: Prompts) -> float:
        return max(stream.first_seconds for stream in self._streams(prompts, 1))

    def decode(self, prompts: Prompts, max_tokens: int) -> float:
        streams = self._streams(prompts, max_tokens)
        begin = max(stream.first_seconds for stream in streams)
        end = max(stream.last_seconds for stream in streams)
        return sum(stream.tokens_after(begin) for stream in streams) / (end - begin)


class Transformers:
    """`loadtest.transformers_worker` in a child process."""

    name = "transformers"

    def __init__(self, model: str, threads: int, dtype: str, environment: dict[str, str], log: Path) -> None:
        command = [sys.executable, "-m", "loadtest.transformers_worker", model, "--threads", str(threads)]
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, "--dtype", dtype],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the transformers worker ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _generate(self, prompts: Prompts, max_tokens: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def prefill(self, prompts: Prompts) -> float:
        return self._generate(prompts, 1)["first_seconds"]

    def decode(self, prompts: Prompts, max_tokens: int) -> float:
        times = self._generate(prompts, max_tokens)
        return len(prompts) * (max_tokens - 1) / (times["last_seconds"] - times["first_seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def make_prompts(rng: random.Random, count: int, length: int, vocab_size: int) -> Prompts:
    """Random tokens above the special ones; no two prompts share a beginning, so no prefix cache can help."""
    return [rng.choices(range(vocab_size // 8, vocab_size), k=length) for _ in range(count)]


def measure(sides: Sequence[Side], plan: Plan, vocab_size: int, seed: int = 0) -> list[dict[str, Any]]:
    """One row per batch size: each side's tokens/s of every turn."""
    rng = random.Random(seed)
    rows = []
    for batch in plan.batches:
        row: dict[str, Any] = {"batch": batch}
        for side in sides:
            warm_up = make_prompts(rng, batch, plan.decode_prompt_tokens, vocab_size)
            side.decode(warm_up, 4)
            row[side.name] = {"prefill": [], "decode": []}
        for repeat in range(plan.repeats):
            long = make_prompts(rng, batch, plan.prefill_tokens, vocab_size)
            short = make_prompts(rng, batch, plan.decode_prompt_tokens, vocab_size)
            for side in sides:
                say(f"batch {batch}, turn {repeat + 1} of {plan.repeats}: {side.name}")
                row[side.name]["prefill"].append(batch * plan.prefill_tokens / side.prefill(long))
                row[side.name]["decode"].append(side.decode(short, plan.decode_tokens))
        rows.append(row)
    return rows


def summarise(rows: Sequence[dict[str, Any]], ours: str, theirs: str) -> list[dict[str, Any]]:
    """Medians and their ratios, one entry per batch size."""
    summary = []
    for row in rows:
        entry: dict[str, Any] = {"batch": row["batch"]}
        for leg in LEGS:
            a, b = statistics.median(row[ours][leg]), statistics.median(row[theirs][leg])
            entry[leg] = {ours: a, theirs: b, "ratio": a / b}
        summary.append(entry)
    return summary


def bars(summary: Sequence[dict[str, Any]], ours: str, theirs: str) -> list[str]:
    """What this project asks of itself, where the batch sizes were measured."""
    decode = {entry["batch"]: entry["decode"] for entry in summary}
    if 1 not in decode:
        return []
    single = decode[1][theirs]
    wanted = [(1, 1.0)] + ([(8, 4.0)] if 8 in decode else [])
    return [
        f"decode at batch {batch}: {decode[batch][ours] / single:.2f} x {theirs}' single stream "
        f"(asked: {factor:g} x) {'reached' if decode[batch][ours] >= factor * single else 'MISSED'}"
        for batch, factor in wanted
    ]


def table(summary: Sequence[dict[str, Any]], ours: str, theirs: str) -> str:
    """tokens/s, medians."""
    head = f"{'':>5} | {'prefill, tokens/s':^35} | {'decode, tokens/s':^35}"
    names = f"{ours:>10} {theirs:>14} {'ratio':>9}"
    lines = [head, f"{'batch':>5} | {names} | {names}"]
    for entry in summary:
        cells = [f"{entry[leg][ours]:10.1f} {entry[leg][theirs]:14.1f} {entry[leg]['ratio']:9.2f}" for leg in LEGS]
        lines.append(f"{entry['batch']:>5} | {cells[0]} | {cells[1]}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    facts: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "cpu family", "model"):
            facts.setdefault(key, value)
        if key == "flags":
            flags = set(value.split())
            facts["isa"] = sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "avx_vnni"})
            break
    return facts


def bf16_sibling(root: str) -> Path:
    """The default model's BF16 folder lies beside its NVFP4 folder."""
    path = Path(root)
    sibling = path.with_name(path.name.removesuffix("-NVFP4") + "-BF16")
    if not path.name.endswith("-NVFP4") or not sibling.is_dir():
        raise SystemExit(f"no BF16 folder found beside {root}: name it with --baseline-model")
    return sibling


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder for `nvfp4 serve`; the default model without it")
    parser.add_argument("--baseline-model", help="BF16 folder for transformers; beside the served one without it")
    parser.add_argument("--baseline-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2, help="computing threads of each side")
    parser.add_argument("--quick", action="store_true", help="one short turn at batch 1 and 8")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--ready-seconds", type=float, default=600, help="the first start makes the default model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn and the medians")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    plan = QUICK if args.quick else FULL
    plan = Plan(
        **asdict(plan)
        | ({"batches": tuple(args.batches)} if args.batches else {})
        | ({"repeats": args.repeats} if args.repeats else {})
    )
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    arguments = [args.model] if args.model else []
    arguments += ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        say("starting nvfp4 serve")
        with serving(arguments, environment, args.ready_seconds, Path(folder) / "server.log") as url:
            ours = Ours(url)
            baseline = Path(args.baseline_model) if args.baseline_model else bf16_sibling(ours.card["root"])
            say("starting transformers")
            log = Path(folder) / "transformers.log"
            theirs = Transformers(str(baseline), args.threads, args.baseline_dtype, environment, log)
            try:
                neighbours = Neighbours()
                rows = measure([ours, theirs], plan, theirs.facts["vocab_size"])
                others = neighbours.cores()
            finally:
                theirs.close()
    summary = summarise(rows, ours.name, theirs.name)
    kernels = sorted({f"{group['kernel']} {group['numerics']}" for group in ours.card["quantization"]})
    print(
        f"\nmodel {Path(ours.card['root']).name} on {', '.join(kernels)}; {theirs.facts}; {machine()}\n{asdict(plan)}\n"
    )
    print(table(summary, ours.name, theirs.name))
    print("\n".join(["", *bars(summary, ours.name, theirs.name)]))
    if others is not None and others > BUSY_CORES:
        print(f"\nNOT A QUIET MACHINE: others used {others:.2f} cores meanwhile; do not quote these figures")
    if args.json:
        report = {
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "plan": asdict(plan),
            "machine": machine() | {"cores_used_by_others": others},
            "nvfp4": {key: ours.card.get(key) for key in ("numerics", "dtype", "kv_cache_dtype", "quantization")},
            "transformers": theirs.facts,
            "summary": summary,
            "turns": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
