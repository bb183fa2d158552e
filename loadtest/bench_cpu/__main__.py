"""NVFP4 on a CPU, as shares of what the machine can do, and beside llama.cpp where one is at hand.

    python -m loadtest.bench_cpu [--quick] [--only speed context server profile http] [--json FILE]

speed     whole-engine decode at batch 1, 8 and 16 and a 512-token prefill, two synthetic Llamas, each arithmetic, the
          BF16 twin, and llama.cpp's NVFP4, Q4_0, Q4_K_M and BF16 on the same weights, in turns
context   decode attention over 8192 tokens of BF16, FP8 and NVFP4 KV
server    seconds from exec to ready, and memory (PSS) of all server processes
profile   a batch-1 decode step of the default model by part
http      the default model under 1, 8 and 32 streams beside llama.cpp's server

Read bandwidth and arithmetic peaks are measured before and after every reading, and a ratio uses those two. llama.cpp
is found by LLAMA_CPP_BIN, the bin folder of a build (make bench-cpu LLAMA_CPP_BIN=...), else as the package
llama-cpp-python (extra `peers`, no server); without either our figures stand alone. Models are written once into
~/.cache/nvfp4 (about 8 GB with the GGUF files).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.bench_cpu import checkpoints, context, docs, http_peer, llama_cpp, report
from loadtest.bench_cpu.measure import Figure, Side, limit_spread, measure, summarise
from loadtest.bench_cpu.profile import step_profile
from loadtest.bench_cpu.server_figures import measure_server
from loadtest.bench_cpu.shapes import LARGE, SHAPES, SMALL, Shape
from loadtest.bench_cpu.workers import Engine, MachineLimits, Refused
from loadtest.bench_engine import machine
from loadtest.neighbours import BUSY_CORES, Neighbours

SECTIONS = ("speed", "context", "server", "profile", "http")
NUMERICS = ("w4a16", "w4a8", "w4a4")
HEADS = ("fp8", "nvfp4")
FIGURES = (Figure("decode", 64), Figure("decode", 48, batch=8), Figure("decode", 32, batch=16), Figure("prefill", 512))
QUICK = (Figure("decode", 16), Figure("decode", 8, batch=8), Figure("prefill", 128))
CACHE_BYTES = 640 << 20


class Benchmark:
    """One run: its options, its findings (`result`, for the JSON file) and its bars."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.cache: Path = args.cache
        self.build = llama_cpp.find_build()
        self.limits = MachineLimits(args.threads, scratch / "limits.log")
        self.result: dict[str, Any] = {}
        self.bars: list[report.Bar] = []
        self.sections: dict[str, str] = {}  # Markdown of what was measured, for the document

    def run(self) -> None:
        if self.build is None:
            say(f"no llama.cpp at hand ({llama_cpp.VARIABLE} not set, extra `peers` not installed): our figures alone")
        sections: dict[str, Callable[[], None]] = {
            "speed": self.speed,
            "context": self.context,
            "server": self.server,
            "profile": self.profile,
            "http": self.http,
        }
        for name in SECTIONS:
            if name in self.args.only:
                say(f"== {name}")
                started, neighbours = time.strftime("%Y-%m-%d %H:%M", time.gmtime()), Neighbours()
                num_bars = len(self.bars)
                sections[name]()
                warning = busy(neighbours)  # first: a bar that was met beside a neighbour has proved nothing
                what = f"{started} UTC, commit {docs.commit()}, {self.args.rounds} round(s)."
                self.show(name, warning, what, "\n".join(f"    {bar}" for bar in self.bars[num_bars:]))

    def show(self, section: str, *parts: str) -> None:
        """Print Markdown, and keep it for the document."""
        text = "\n\n".join(part for part in parts if part) + "\n\n"
        print(text, flush=True)
        self.sections[section] = self.sections.get(section, "") + text

    def speed(self) -> None:
        for shape in self.shapes():
            folders = checkpoints.ensure(shape, self.cache)
            engines = self.speed_engines(shape, folders)
            sides: list[Side] = [*engines, *self.peers(shape)]
            figures = QUICK if self.args.quick else FIGURES
            try:
                readings = measure(sides, figures, self.args.rounds, self.limits, say)
            finally:
                for engine in engines:
                    engine.close()
            token_bytes = {engine.name: engine.token_bytes() for engine in engines}
            token_bytes |= {side.name: touched for side, touched in self.peer_bytes(shape)}
            summaries = summarise(readings, report.ratio_to_limit(shape, token_bytes))
            spread = limit_spread(readings)
            head = f"### {shape.name}: {shape.num_parameters / 1e6:.0f} M parameters"
            self.show("speed", head, report.speed_table(summaries), report.limits_table(spread))
            self.bars += report.speed_bars(shape, summaries, NUMERICS)
            self.result.setdefault("speed", {})[shape.name] = {
                "shape": asdict(shape),
                "token_bytes": token_bytes,
                "summaries": [asdict(summary) for summary in summaries],
                "limits": spread,
                "readings": [asdict(reading) for reading in readings],
            }

    def speed_engines(self, shape: Shape, folders: checkpoints.Folders) -> list[Engine]:
        wanted: dict[str, dict[str, Any]] = {
            f"nvfp4 {numerics}": {"model": str(folders.nvfp4), "numerics": numerics} for numerics in NUMERICS
        }
        for head in HEADS:
            wanted[f"nvfp4 w4a16, {head} head"] = {"model": str(folders.nvfp4), "lm_head_dtype": head}
        wanted["bf16"] = {"model": str(folders.bf16)}
        engines = (self.engine(name, config) for name, config in wanted.items() if self.chosen(name))
        return [engine for engine in engines if engine is not None]

    def chosen(self, name: str) -> bool:
        return self.args.sides is None or name in self.args.sides

    def engine(
        self, name: str, config: dict[str, Any], profile: bool = False, cache: dict[str, Any] | None = None
    ) -> Engine | None:
        """The engine, or None with a word of why it refused; a refusal is part of the result."""
        cached = {"memory_bytes": CACHE_BYTES, "enable_prefix_caching": False} | (cache or {})
        full = {"threads": self.args.threads, "cache": cached} | config
        say(f"loading {name}")
        try:
            return Engine(name, full, self.scratch / "engine.log", profile)
        except Refused as refusal:
            say(f"{name}: refused: {refusal}")
            self.result.setdefault("refused", {})[name] = str(refusal)
            return None

    def peers(self, shape: Shape) -> list[llama_cpp.LlamaCpp]:
        if self.build is None:
            return []
        sides = []
        for kind in llama_cpp.KINDS:
            if self.chosen(f"llama.cpp {kind}"):
                path = self.gguf(shape, kind)
                sides.append(llama_cpp.LlamaCpp(self.build, path, kind, self.args.threads))
        return sides

    def gguf(self, shape: Shape, kind: str) -> Path:
        assert self.build is not None
        return llama_cpp.ensure_gguf(self.build, self.cache, shape, kind, self.args.threads)

    def peer_bytes(self, shape: Shape) -> list[tuple[llama_cpp.LlamaCpp, float]]:
        """A GGUF's bytes less its embedding: what it reads for a token. Header and norms are below a thousandth."""
        pairs = []
        for side in self.peers(shape):
            embedding = llama_cpp.embedding_bytes(side.kind, shape)
            pairs.append((side, side.gguf.stat().st_size - embedding))
        return pairs

    def context(self) -> None:
        shape = SHAPES[self.args.context_shape]
        folder = checkpoints.ensure(shape, self.cache).nvfp4
        engines: dict[str, Engine] = {}
        for kv in context.KV_VALUE_BYTES:
            more = {"kv_dtype": kv, "enable_prefix_caching": True}
            engine = self.engine(f"{kv} KV", {"model": str(folder)}, cache=more)
            if engine is not None:
                engines[kv] = engine
        try:
            figures = context.measure_context(shape, engines, self.args.rounds, self.limits, say)
        finally:
            for engine in engines.values():
                engine.close()
        self.show("context", f"Model {shape.name}:", report.context_table(figures))
        self.bars += report.context_bars(figures)
        self.result["context"] = {"shape": shape.name, "figures": [asdict(figure) for figure in figures]}

    def server(self) -> None:
        figures = {}
        for shape in self.shapes():
            folder = checkpoints.ensure(shape, self.cache).nvfp4
            say(f"starting the server on {shape.name}, {self.args.starts + 1} times")
            figures[shape.name] = measure_server(folder, self.args.threads, self.args.starts, self.scratch)
        self.show("server", report.server_table(figures))
        self.bars += report.server_bars(figures, LARGE.name)
        self.result["server"] = {name: asdict(f) for name, f in figures.items()}

    def profile(self) -> None:
        model = self.args.default_model or default_model(self.scratch)
        engine = self.engine("default model", {"model": model}, profile=True)
        assert engine is not None, "the default model was refused"
        for _ in range(self.args.rounds):
            engine.generate([engine.prompt(16)], 96)
        profile = step_profile(engine.profile())
        self.show("profile", report.profile_table(profile))
        self.bars += report.profile_bars(profile)
        self.result["profile"] = asdict(profile)

    def http(self) -> None:
        gguf = http_peer.default_gguf()
        load = http_peer.Load((1, 8), 16, 1) if self.args.quick else http_peer.Load(rounds=self.args.rounds)
        say(f"serving the default model to {', '.join(map(str, load.streams))} streams")
        readings = http_peer.measure_http(
            None if self.build is None else self.build.server, gguf, self.args.threads, load, self.scratch
        )
        rows = http_peer.summarise_http(readings)
        self.show("http", report.http_table(rows))
        self.result["http"] = {"rows": rows, "readings": [asdict(reading) for reading in readings]}

    def shapes(self) -> list[Shape]:
        return [SHAPES[name] for name in self.args.shapes]


def default_model(scratch: Path) -> str:
    """The default model's folder, as the server names it."""
    import httpx

    from loadtest.server_process import serving

    with serving(["--kv-cache-memory", "64MiB"], {}, 600, scratch / "default.log") as url:
        root: str = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["root"]
        return root


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def busy(neighbours: Neighbours) -> str:
    """A warning to stand beside the figures, where others computed meanwhile."""
    others = neighbours.cores()
    if others is None or others <= BUSY_CORES:
        return ""
    return f"**Not a quiet machine: others used {others:.1f} cores meanwhile; do not quote these figures.**"


def json_path(threads: int) -> Path:
    facts = machine()
    name = "-".join(str(facts.get(key, "")) for key in ("model name", "cpu family", "model"))
    slug = "".join(char if char.isalnum() else "-" for char in name.lower())
    return Path("docs/benchmarks") / f"cpu-{threads}-core-{slug.strip('-')}.json"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--context-shape", choices=list(SHAPES), default=SMALL.name)
    parser.add_argument("--sides", nargs="+", metavar="NAME", help='of speed, such as "nvfp4 w4a16" "llama.cpp q4_0"')
    parser.add_argument("--threads", type=int, default=2, help="computing threads of each side (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--starts", type=int, default=5, help="starts of the server that count (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one round of short figures: does it work?")
    parser.add_argument("--default-model", metavar="FOLDER", help="instead of SmolLM2-135M, for profile")
    parser.add_argument("--cache", type=Path, default=checkpoints.cache_folder(), help="default: %(default)s")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="every reading; default: docs/benchmarks/cpu-N-core-<machine>.json for a complete run, none for a part",
    )
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="replace the tables of what is measured in this document"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.starts = 1, 1
    if args.json is None and is_complete(args):
        args.json = json_path(args.threads)
    return args


def is_complete(args: argparse.Namespace) -> bool:
    """Whether the run measures everything: a part must not take the place of a complete run's record."""
    return set(args.only) == set(SECTIONS) and set(args.shapes) == set(SHAPES) and not args.sides and not args.quick


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers, which have sessions of their own, end
    neighbours = Neighbours()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with tempfile.TemporaryDirectory() as scratch:
        benchmark = Benchmark(args, Path(scratch))
        benchmark.run()
        benchmark.limits.close()
    met = sum(bar.met for bar in benchmark.bars)
    print(f"{met} of {len(benchmark.bars)} bars met. {busy(neighbours)}")
    facts = machine() | {"cores_used_by_others": neighbours.cores(), "load": os.getloadavg()}
    options = {key: value for key, value in vars(args).items() if key not in ("cache", "json", "docs")}
    peer = None if benchmark.build is None else benchmark.build.version()
    bars = [asdict(bar) | {"met": bar.met} for bar in benchmark.bars]
    whole = {
        "made_at": started,
        "commit": docs.commit(),
        "machine": facts,
        "options": options,
        "llama.cpp": peer,
        "bars": bars,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(whole | benchmark.result, indent=1) + "\n")
        say(f"wrote {args.json}")
    if args.docs is not None:
        docs.write_sections(args.docs, benchmark.sections)
        say(f"wrote its tables into {args.docs}")


if __name__ == "__main__":
    main()
