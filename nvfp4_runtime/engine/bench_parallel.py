"""What tensor parallelism costs and gains on one host: one process with N threads against N ranks of one, in turns.

    python -m nvfp4_runtime.engine.bench_parallel MODEL [--size 2] [--batches 1 8] [--prompt 512] [--rounds 4]

Milliseconds of a decode step by sequences in it, and of a step that computes a prompt; medians over all rounds. Both
engines are there all the time, and only one of them computes at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time

from nvfp4_runtime.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.sampling.params import SamplingParams

STEPS, SKIPPED, PROMPT_TOKENS = 40, 4, 32


def load(model: str, size: int, threads: int) -> Engine:
    cache = CacheConfig(num_blocks=400, enable_prefix_caching=False)
    scheduler = SchedulerConfig(max_model_len=2048)
    parallel = ParallelConfig(size=size)
    return build_engine(
        EngineConfig(model, device="cpu", cache=cache, scheduler=scheduler, parallel=parallel, threads=threads)
    )


def run(engine: Engine, num_seqs: int, prompt_tokens: int, num_steps: int) -> list[float]:
    """Seconds of each step."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 8, ignore_eos=True)
    for i in range(num_seqs):
        prompt = [1000 + 97 * i + 7 * position for position in range(prompt_tokens)]
        engine.add(Submit(str(i), prompt, params, time.monotonic()))
    seconds = [engine.step()[1].step_seconds for _ in range(num_steps)]
    for i in range(num_seqs):
        engine.abort(str(i))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    engines = {
        f"1 process, {args.size} threads": load(args.model, 1, args.size),
        f"{args.size} ranks, 1 thread each": load(args.model, args.size, 1),
    }
    found: dict[tuple[str, str], list[float]] = {}
    for round_id in range(args.rounds):
        for name in list(engines)[:: 1 if round_id % 2 == 0 else -1]:
            for batch in args.batches:
                steps = run(engines[name], batch, PROMPT_TOKENS, STEPS)[SKIPPED:]
                found.setdefault((f"decode, {batch} sequences", name), []).extend(steps)
            prompt = run(engines[name], 1, args.prompt, 1)
            found.setdefault((f"prompt of {args.prompt} tokens", name), []).extend(prompt)
    for (what, name), seconds in sorted(found.items()):
        print(f"{what:<24} {name:<24} {1000 * statistics.median(seconds):8.1f} ms  ({len(seconds)} steps)")
    for engine in engines.values():
        engine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
