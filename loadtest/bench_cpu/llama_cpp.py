"""llama.cpp's own benchmark programs as sides. LLAMA_CPP_BIN names the folder that holds them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.bench_cpu import gguf_files
from loadtest.bench_cpu.measure import Figure
from loadtest.bench_cpu.shapes import Shape

VARIABLE = "LLAMA_CPP_BIN"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
SERVER = "llama-server"
QUANTISED = {"q4_0": "Q4_0", "q4_k_m": "Q4_K_M"}  # ours -> llama-quantize's name
# bits per weight of the embedding matrix, which a token reads one row of: Q4_0 and Q4_K where it is quantised
EMBEDDING_BITS = {"q4_0": 4.5, "q4_k_m": 4.5, "nvfp4": 16.0, "bf16": 16.0}
KINDS = ("nvfp4", *QUANTISED, "bf16")
FOUR_BIT = tuple(QUANTISED)  # "its fastest 4-bit type" is the faster of these


def find_build() -> Path | None:
    """The folder that LLAMA_CPP_BIN names, or None when it is not set. SystemExit when programs are missing there."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    missing = [name for name in PROGRAMS if not (Path(folder) / name).is_file()]
    if missing:
        raise SystemExit(
            f"{VARIABLE}={folder} has no {', '.join(missing)}; expected the bin folder of a llama.cpp build "
            f"(targets {', '.join((*PROGRAMS, SERVER))})"
        )
    return Path(folder)


def ensure_gguf(quantize: Path | None, cache: Path, shape: Shape, kind: str, threads: int) -> Path:
    """The shape in `kind`, made in `cache` when missing: NVFP4 and BF16 by us, the rest from BF16 by llama-quantize."""
    path = cache / f"{shape.name}-{kind}.gguf"
    if path.exists():
        return path
    if kind not in QUANTISED:
        gguf_files.write(path, shape, kind)
        return path
    assert quantize is not None
    source = ensure_gguf(quantize, cache, shape, "bf16", threads)
    partial = path.with_suffix(".partial")
    run([str(quantize), str(source), str(partial), QUANTISED[kind], str(threads)])
    partial.rename(path)
    return path


def embedding_bytes(kind: str, shape: Shape) -> float:
    return shape.num_head * EMBEDDING_BITS[kind] / 8


@dataclass(frozen=True)
class LlamaCpp:
    """One GGUF under llama-bench (single sequence) and llama-batched-bench (several). Each reading is a process."""

    build: Path
    gguf: Path
    kind: str
    threads: int

    @property
    def name(self) -> str:
        return f"llama.cpp {self.kind}"

    def measure(self, figure: Figure) -> float:
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

    def _program(self, name: str) -> list[str]:
        return [str(self.build / name), "-m", str(self.gguf), "-t", str(self.threads)]


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


def version(build: Path) -> str:
    """The build's own words, for the record."""
    command = [str(build / "llama-bench"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("version")]
    return lines[0] if lines else "unknown version"
