"""The whole engine on the synthetic model: `python -m loadtest.bench_gpu.end_to_end nvfp4|bf16|transformers`.

    decode    seconds of a step at batch 1, 64 and 256, every sequence about 1k tokens long
    prefill   seconds of one prompt of 2k tokens

One JSON line per finding. The model's folder is written into --scratch where it is not there. --rehearse takes a tiny
model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest.bench_cpu.shapes import Shape
from loadtest.bench_cpu.workers import Engine, Refused, Worker, decode_rate
from loadtest.bench_gpu.model import LLAMA_8B, TINY, ensure, num_bytes

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Load:
    """What is asked of the engine.

    context      tokens of each prompt
    steps        decode steps in which all sequences of a batch take part
    step_tokens  most tokens of one step: as many prompts as fit are read at once
    prefill      tokens of the prompt that is timed alone, `repeats` times
    """

    shape: Shape
    device: str
    batches: tuple[int, ...]
    context: int
    steps: int
    step_tokens: int
    prefill: int
    repeats: int

    def new(self, batch: int) -> int:
        """Tokens to ask for: those that the first sequence makes while the last prompt waits, and the measured ones."""
        return self.steps + 2 + -(-batch * self.context // self.step_tokens)


FULL = Load(LLAMA_8B, "cuda", (1, 64, 256), 1024, 32, 16384, 2048, 5)
REHEARSAL = Load(TINY, "cpu", (1, 3), 20, 100, 64, 40, 1)  # many steps: sequences must meet on a busy machine
# (weights, arithmetic, cache): what is served, the figures of item 5 first
RUNS = {
    "nvfp4": (("w4a16", "fp8"), ("w4a16", "bfloat16"), ("w4a16", "nvfp4"), ("w4a4", "fp8")),
    "bf16": ((None, "bfloat16"), (None, "fp8")),
}
_ROOM = 1.1  # of a folder's bytes, that must be free on the disk


def say(row: dict[str, Any]) -> None:
    print(json.dumps({"part": "end_to_end"} | row), flush=True)


def written(load: Load, scratch: Path, quantised: bool) -> Path | None:
    """The model's folder, or None where the disk has no room for it."""
    scratch.mkdir(parents=True, exist_ok=True)
    label = {"name": "write", "weights": "nvfp4" if quantised else "bf16"}
    wanted, free = num_bytes(load.shape, quantised), shutil.disk_usage(scratch).free
    present = (scratch / f"{load.shape.name}-{'NVFP4' if quantised else 'BF16'}" / "config.json").exists()
    if not present and free < _ROOM * wanted:
        say(label | {"failed": f"{scratch} has {free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB are to be written"})
        return None
    started = time.perf_counter()
    folder = ensure(load.shape, scratch, quantised, torch.device(load.device))
    if load.device == "cuda":
        torch.cuda.empty_cache()  # the engine, another process, plans with what is free
    say(label | {"seconds": time.perf_counter() - started, "bytes": wanted})
    return folder


def config(load: Load, folder: Path, numerics: str | None, kv_dtype: str) -> dict[str, Any]:
    """An EngineConfig whose cache holds the largest batch and no more."""
    batch = max(load.batches)
    longest = max(load.context + load.new(batch), load.prefill) + 1
    blocks = -(-longest // BLOCK_SIZE) + 1
    each = -(-(load.context + load.new(batch) + 1) // BLOCK_SIZE) + 1
    return {
        "model": str(folder),
        "device": load.device,
        **({"numerics": numerics} if numerics else {}),
        "cache": {"kv_dtype": kv_dtype, "num_blocks": 1 + max(each * batch, 2 * blocks)},
        "scheduler": {
            "max_num_seqs": batch,
            "max_num_batched_tokens": load.step_tokens,
            "max_model_len": blocks * BLOCK_SIZE,
        },
    }


def run_engine(load: Load, folder: Path, weights: str, numerics: str | None, kv_dtype: str, log: Path) -> None:
    label = {"weights": weights, "numerics": numerics or "bf16", "kv_dtype": kv_dtype}
    started = time.perf_counter()
    try:
        engine = Engine(f"{weights} {kv_dtype}", config(load, folder, numerics, kv_dtype), log)
    except (Refused, RuntimeError) as refused:
        say(label | {"name": "start", "failed": str(refused)[-600:]})
        return
    try:
        info = engine.info
        kernels = {f"{g['name']} {g['stored']} {g['numerics']}": g["backend"] for g in info["layers"]}
        facts = {"kernels": kernels, "phases": info["startup_seconds"], "num_blocks": info["num_blocks"]}
        say(label | {"name": "start", "seconds": time.perf_counter() - started} | facts)
        measure_engine(load, engine, label)
    except RuntimeError as error:  # the engine ended, or refused what it was asked
        say(label | {"name": "run", "failed": str(error)[-600:]})
        return
    engine.close()


def measure_engine(load: Load, engine: Engine, label: dict[str, Any]) -> None:
    engine.generate([engine.prompt(load.context)], 4)  # what is compiled at first use is compiled now
    for batch in load.batches:
        prompts, new = [engine.prompt(load.context) for _ in range(batch)], load.new(batch)
        rate = decode_rate(engine.generate(prompts, new))
        length = load.context + new - load.steps / 2  # of a measured step's sequences, about
        say(label | {"name": "decode", "batch": batch, "context": length, "seconds": batch / rate, "rate": rate})
    times = [engine.generate([engine.prompt(load.prefill)], 1)[0][0][0] for _ in range(load.repeats)]
    say(label | {"name": "prefill", "tokens": load.prefill, "seconds": statistics.median(times)})


def run_transformers(load: Load, folder: Path, log: Path) -> None:
    """transformers' generate in BF16 on the same twin, one sequence and 64."""
    label = {"weights": "bf16", "numerics": "transformers", "kv_dtype": "bfloat16"}
    try:
        worker = Worker("loadtest.transformers_worker", [str(folder), "--device", load.device, "--threads", "4"], log)
        worker.read()
        worker.ask({"prompts": [[300] * load.context], "max_tokens": 2})
        for batch in [b for b in load.batches if b <= 64]:
            prompts = [[300 + (7 * i + j) % 64 for j in range(load.context)] for i in range(batch)]
            answer = worker.ask({"prompts": prompts, "max_tokens": load.steps + 1})
            seconds = (answer["last_seconds"] - answer["first_seconds"]) / load.steps
            row = {"name": "decode", "batch": batch, "context": load.context + load.steps / 2, "seconds": seconds}
            say(label | row | {"rate": batch / seconds})
        worker.close()
    except RuntimeError as error:
        say(label | {"name": "run", "failed": str(error)[-600:]})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*RUNS, "transformers"))
    parser.add_argument("--scratch", type=Path, required=True, help="where the model's folders are, or are written")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    load = REHEARSAL if args.rehearse else FULL
    folder = written(load, args.scratch, args.what == "nvfp4")
    if folder is None:
        return 0
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "log"
        if args.what == "transformers":
            run_transformers(load, folder, log)
            return 0
        for numerics, kv_dtype in RUNS[args.what]:
            run_engine(load, folder, args.what, numerics, kv_dtype, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
