"""From an EngineConfig to a running Engine: checkpoint, kernels, model, memory plan, KV cache."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import CacheConfig, Dtype, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import EngineInfo, LayerGroup
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Choice, Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.sampling.sampler import BatchSampler

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float], None]

# Without a flag, the KV cache takes at most this share of the memory that is free after loading, and this much.
KV_SHARE_OF_FREE = 0.25
KV_DEFAULT_LIMIT_BYTES = 4 << 30


class Phases:
    """Seconds by phase of start-up, reported as they pass."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name, 0.0)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        if self._progress is not None:
            self._progress(name, 1.0)


def build_engine(config: EngineConfig, progress: ProgressCallback | None = None) -> Engine:
    """Load `config.model` and everything around it. Raises ConfigError, CheckpointError, KernelError."""
    phases = Phases(progress)
    with phases.phase("checkpoint"):
        checkpoint = Checkpoint.open(config.model)
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    backends = available_backends(config.backend, threads)
    with phases.phase("weights"):
        kernels = Kernels(backends, _resolve_dtype(config, checkpoint.raw_config), config.numerics)
        model = load_model(checkpoint, kernels, config.cache.kv_dtype, config.scheduler.max_model_len)
    with phases.phase("kv_cache"):
        kv_dtype = model.kv_dtype
        block_bytes = bytes_per_block(model.kv_specs, kv_dtype, config.cache.block_size)
        max_len = resolve_max_model_len(config.scheduler, model.config.max_position_embeddings)
        num_blocks = plan_blocks(config.cache, config.scheduler, max_len, block_bytes)
        max_len = fit_max_model_len(config.scheduler, max_len, num_blocks, config.cache.block_size)
        kv = allocate(model.kv_specs, kv_dtype, num_blocks, config.cache.block_size, torch.device("cpu"))
    runner = ModelRunner(model, kv, BatchSampler())
    with phases.phase("warm_up"):
        runner.warm_up()
    scheduler = Scheduler(
        config.scheduler, BlockPool(num_blocks), config.cache.block_size, config.cache.enable_prefix_caching
    )
    info = EngineInfo(
        model=config.model,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        max_model_len=max_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_queued_requests=config.scheduler.max_queued_requests,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        kv_dtype=kv_dtype,
        kv_bytes=num_blocks * block_bytes,
        dtype=kernels.dtype,
        numerics=_numerics_name(kernels),
        numerics_reason=_numerics_reason(config, kernels),
        weight_bytes=checkpoint.nbytes_by_format(),
        layers=layer_groups(kernels.choices),
        eos_token_ids=eos_token_ids(checkpoint.path, model.config.eos_token_ids),
        startup_seconds=phases.seconds,
        backends={backend.name: {k: str(v) for k, v in backend.describe().items()} for backend in backends},
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    return Engine(scheduler, runner, info, config.seed)


def _resolve_dtype(config: EngineConfig, raw: dict[str, object]) -> Dtype:
    """Activations: the flag, else the checkpoint's dtype. FP16 checkpoints run in BF16, which every backend has."""
    if config.dtype != "auto":
        return config.dtype
    declared = raw.get("dtype") or raw.get("torch_dtype")
    if declared == "float16":
        logger.warning("the checkpoint declares float16; activations run in bfloat16 (see --dtype float32)")
    return "float32" if declared == "float32" else "bfloat16"


def resolve_max_model_len(scheduler: SchedulerConfig, model_limit: int) -> int:
    """The flag if the model's positions allow it, else the model's own limit."""
    asked = scheduler.max_model_len
    if asked is None:
        return model_limit
    if not 1 <= asked <= model_limit:
        raise ConfigError(
            f"--max-model-len {asked} is outside [1, {model_limit}], the model's limit", "--max-model-len"
        )
    return asked


def available_memory_bytes() -> int:
    """MemAvailable of this machine, or of its cgroup if that is less."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
    except FileNotFoundError:  # cgroup v1, or none: the machine's figure stands
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def plan_blocks(cache: CacheConfig, scheduler: SchedulerConfig, max_len: int, block_bytes: int) -> int:
    """How many blocks to allocate, the null block included: the flags, else what could be used, within free memory."""
    if cache.num_blocks is not None:
        if cache.num_blocks < 2:
            raise ConfigError(f"--num-kv-blocks {cache.num_blocks} is too few; expected at least 2", "--num-kv-blocks")
        return cache.num_blocks
    per_sequence = -(-max_len // cache.block_size)
    useful = 1 + scheduler.max_num_seqs * per_sequence
    free = available_memory_bytes()
    budget = cache.memory_bytes
    if budget is None:
        budget = min(int(free * KV_SHARE_OF_FREE), KV_DEFAULT_LIMIT_BYTES)
    elif budget > free:
        raise ConfigError(
            f"--kv-cache-memory asks for {budget / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            "--kv-cache-memory",
        )
    num_blocks = min(useful, budget // block_bytes)
    if num_blocks < 2:
        raise ConfigError(
            f"{budget / 2**20:.1f} MiB of KV cache hold no block ({block_bytes / 2**20:.2f} MiB each); "
            "give it more memory",
            "--kv-cache-memory",
        )
    return num_blocks


def fit_max_model_len(scheduler: SchedulerConfig, max_len: int, num_blocks: int, block_size: int) -> int:
    """A request must fit alone into the cache: lower the limit if it was not asked for, refuse if it was."""
    capacity = (num_blocks - 1) * block_size
    if capacity >= max_len:
        return max_len
    if scheduler.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {max_len} does not fit: the KV cache holds {capacity} tokens; give it more memory "
            "(--kv-cache-memory) or ask for less",
            "--max-model-len",
        )
    logger.warning("max_model_len lowered from %d to %d tokens, which is what the KV cache holds", max_len, capacity)
    return capacity


def layer_groups(choices: Sequence[Choice]) -> list[LayerGroup]:
    """Choices that are alike, counted, in order of first appearance."""
    counts = Counter(dataclasses.replace(choice, num_bytes=0) for choice in choices)
    sizes: Counter[Choice] = Counter()
    for choice in choices:
        sizes[dataclasses.replace(choice, num_bytes=0)] += choice.num_bytes
    return [
        LayerGroup(c.group, n, c.stored, c.bits_per_weight, sizes[c], c.backend, c.numerics, c.reason)
        for c, n in counts.items()
    ]


def eos_token_ids(folder: Path, of_config: Sequence[int]) -> list[int]:
    """Every id that ends a generation: config.json's, and generation_config.json's, which often lists more."""
    path = folder / "generation_config.json"
    declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    more = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return list(dict.fromkeys([*of_config, *more]))


def _numerics_name(kernels: Kernels) -> str:
    packed = any(choice.stored == "nvfp4" for choice in kernels.choices)
    return kernels.resolved_numerics() if packed else kernels.dtype


def _numerics_reason(config: EngineConfig, kernels: Kernels) -> str:
    if not any(choice.stored == "nvfp4" for choice in kernels.choices):
        return "no layer is stored as NVFP4"
    if config.numerics != "auto":
        return "asked for"
    return f"auto: what {kernels.backends[0].name} runs fastest"
