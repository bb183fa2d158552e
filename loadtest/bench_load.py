"""From exec to the first streamed token: how long a server takes to be of use, and what it keeps in memory then.

    python -m loadtest.bench_load [--starts 5] [--json FILE]

A synthetic Llama of 1.2B parameters in ModelOpt's NVFP4 layout is written once into ~/.cache/nvfp4 (0.9 GB). Each start
reads it into the page cache, starts `nvfp4 serve`, connects as soon as the port listens (before the model is loaded)
and sends one streamed completion; the clock runs from exec to the first token. One start more than is counted comes
first: it also warms what is not the checkpoint. Phases are the metric nvfp4_startup_seconds; memory is PSS of all
processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtest.bench_cpu import checkpoints, docs
from loadtest.bench_cpu.server_figures import KV_BYTES, pss_by_process, startup_phases, warm
from loadtest.bench_cpu.shapes import LOADED
from loadtest.bench_engine import machine
from loadtest.neighbours import BUSY_CORES, Neighbours
from loadtest.server_process import listening_server

TTFT_SECONDS = 2.0  # asked of two cores
# Interpreters, torch and the web stack, in both processes; activations. Measured 0.33 GB.
BESIDE_BYTES = 450_000_000
PROMPT = list(range(300, 316))


@dataclass(frozen=True)
class Start:
    """One start. `phases`: what the server says of itself; the sum of the engine's own is `load_seconds`."""

    ttft_seconds: float
    listening_seconds: float
    load_seconds: float
    phases: dict[str, float]
    pss: dict[str, int]


def measure_start(folder: Path, threads: int, log: Path) -> Start:
    """Start the server once from a warm page cache, and ask for a token while it loads."""
    warm(folder / "model.safetensors")
    arguments = [str(folder), "--threads", str(threads), "--kv-cache-memory", str(KV_BYTES)]
    body = {"model": folder.name, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True}
    with listening_server(arguments, {}, 120, log) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            lines = response.iter_lines()
            first = next(line for line in lines if line.startswith("data: "))
            ttft = time.monotonic() - server.started
            assert json.loads(first.removeprefix("data: "))["choices"][0]["text"], f"no token in {first}"
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        phases = startup_phases(server.url)
        load = sum(phases[name] for name in ("checkpoint", "weights", "kv_cache", "warm_up"))
        return Start(ttft, server.ready_seconds, load, phases, pss_by_process(server.pid))


def render(starts: Sequence[Start], checkpoint_bytes: int) -> str:
    """Medians of all starts, lowest and highest beside them, and whether the bars are met."""
    lines = [f"{LOADED.name} NVFP4, {checkpoint_bytes / 1e9:.2f} GB, {len(starts)} starts: median (lowest to highest)"]
    rows = {"time to first token": [start.ttft_seconds for start in starts]}
    rows |= {"load alone": [start.load_seconds for start in starts]}
    rows |= {f"  phase {name}": [start.phases[name] for start in starts] for name in starts[0].phases}
    lines += [f"  {name:24} {statistics.median(v):6.3f} s  ({min(v):.3f} to {max(v):.3f})" for name, v in rows.items()]
    last = starts[-1]
    lines += [f"  PSS {name:60} {size / 1e6:7.0f} MB" for name, size in last.pss.items()]
    total, allowed = sum(last.pss.values()), checkpoint_bytes + BESIDE_BYTES
    ttft = statistics.median(rows["time to first token"])
    lines.append(f"  {_verdict(ttft <= TTFT_SECONDS)} first token in {ttft:.2f} s, asked {TTFT_SECONDS:.1f} s")
    lines.append(
        f"  {_verdict(total <= allowed)} {total / 1e6:.0f} MB of memory in all, {(total - checkpoint_bytes) / 1e6:.0f} "
        f"MB beside the checkpoint's size (a second copy of the packed weights: {packed_bytes() / 1e6:.0f} MB more)"
    )
    return "\n".join(lines)


def packed_bytes() -> float:
    """Of what is repacked at load."""
    return LOADED.num_linear * (0.5 + 1 / 16)


def _verdict(met: bool) -> str:
    return "met:   " if met else "MISSED:"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="starts that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="computing threads (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=checkpoints.cache_folder(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, with machine and commit")
    args = parser.parse_args(argv)
    folder = checkpoints.ensure_one(LOADED, args.cache, quantised=True)
    neighbours = Neighbours()
    starts = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(args.starts + 1):
            start = measure_start(folder, args.threads, Path(scratch) / "server.log")
            print(f"start {i}: first token after {start.ttft_seconds:.3f} s", file=sys.stderr, flush=True)
            starts += [start] if i else []
    others = neighbours.cores()
    size = (folder / "model.safetensors").stat().st_size
    print(render(starts, size))
    if others is not None and others > BUSY_CORES:
        print(f"  not a quiet machine: others used {others:.1f} cores meanwhile; do not quote these figures")
    if args.json is not None:
        result: dict[str, Any] = {
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": docs.commit(),
            "command": f"python -m loadtest.bench_load --starts {args.starts} --threads {args.threads}",
            "machine": machine() | {"cores_used_by_others": others},
            "shape": asdict(LOADED),
            "checkpoint_bytes": size,
            "starts": [asdict(start) for start in starts],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
