"""What LoRA adapters cost a decode step: steps of a batch without, with one, and with several adapters, in turns.

    python -m nvfp4_runtime.engine.bench_adapters MODEL [--rank 16] [--adapters 4] [--batches 1 8 32] [--rounds 6]

The adapters are random and sit on every linear layer but the head. "loaded": they are there and no request has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvfp4_runtime.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.models.expected import expected
from nvfp4_runtime.sampling.params import SamplingParams

STEPS, SKIPPED, PROMPT_TOKENS = 40, 4, 32


def write_adapter(model: Path, folder: Path, rank: int, seed: int) -> AdapterConfig:
    """A random adapter for every linear layer of `model` but its head."""
    table = expected(json.loads((model / "config.json").read_text()))
    if table is None:
        raise SystemExit(f"{model} has an architecture that takes no adapters here")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in table.modules.items():
        if module.linear and name.startswith("model.layers."):
            n, k = module.shape
            for half, shape in (("A", (rank, k)), ("B", (n, rank))):
                matrix = torch.randn(shape, generator=generator) * 0.01
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = matrix.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return AdapterConfig(folder.name, str(folder))


def decode(engine: Engine, names: list[str], round_id: int) -> list[float]:
    """Seconds of each decode step of one request per name."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 8, ignore_eos=True)
    for i, name in enumerate(names):
        prompt = [1000 + 97 * i + 7 * position + round_id for position in range(PROMPT_TOKENS)]
        engine.add(Submit(str(i), prompt, params, time.monotonic(), adapter=name))
    steps = [engine.step() for _ in range(STEPS)]
    for i in range(len(names)):
        engine.abort(str(i))
    return [stats.step_seconds for outputs, stats in steps[SKIPPED:] if len(outputs) == len(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    most = max(args.batches)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [write_adapter(args.model, Path(scratch) / f"a{i}", args.rank, i) for i in range(args.adapters)]
        config = EngineConfig(
            model=str(args.model),
            cache=CacheConfig(enable_prefix_caching=False, num_blocks=1 + most * 8),
            scheduler=SchedulerConfig(max_num_seqs=most, max_num_batched_tokens=2048, max_model_len=128),
        )
        engines = {
            "without": (build_engine(config), [""]),
            "loaded": (build_engine(EngineConfig(**{**config.__dict__, "adapters": tuple(adapters)})), [""]),
        }
        engines["one"] = (engines["loaded"][0], ["a0"])
        engines[f"{args.adapters}"] = (engines["loaded"][0], [adapter.name for adapter in adapters])
        print(f"| batch | without ms | {' | '.join(f'{name} | more' for name in list(engines)[1:])} |")
        for batch in args.batches:
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for round_id in range(args.rounds):
                for name, (engine, names) in list(engines.items())[:: 1 if round_id % 2 else -1]:
                    seconds[name] += decode(engine, [names[i % len(names)] for i in range(batch)], round_id)
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            base = medians.pop("without")
            cells = [f"{1e3 * m:.2f} | {100 * (m / base - 1):+.1f} %" for m in medians.values()]
            print(f"| {batch} | {1e3 * base:.2f} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
