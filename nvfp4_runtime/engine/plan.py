"""What the flags allow, what the machine has, and the limits that follow: context length and KV blocks. Torch-free."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from nvfp4_runtime.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from nvfp4_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

# Far more threads than CPUs end in crashes of what starts them (OpenMP's), so they are refused.
THREADS_PER_CPU = 4
MIN_THREAD_LIMIT = 64

# Without a flag, the KV cache takes at most this share of the memory that is free after loading, and this much.
KV_SHARE_OF_FREE = 0.25
KV_DEFAULT_LIMIT_BYTES = 4 << 30
UTILIZATION = "--gpu-memory-utilization"


@dataclass(frozen=True)
class GpuBytes:
    """A GPU's memory as it was measured.

    total, at_start  all of it, and what was free before anything was loaded
    loaded           free with the weights, and everything kernels keep, in place
    step             what the largest step holds for a while
    graphs           what captured launches will keep
    """

    total: int
    at_start: int
    loaded: int
    step: int
    graphs: int

    @property
    def free(self) -> int:
        """For the KV cache, if all that is free were used."""
        return self.loaded - self.step - self.graphs


def check_limits(config: EngineConfig) -> None:
    """Raise ConfigError naming the flag for a count that no engine can work with."""
    counts = (
        ("--max-num-seqs", config.scheduler.max_num_seqs, 1),
        ("--max-num-batched-tokens", config.scheduler.max_num_batched_tokens, 1),
        ("--max-queued-requests", config.scheduler.max_queued_requests, 0),
        ("--max-queued-tokens", config.scheduler.max_queued_tokens, 1),
        ("--max-model-len", config.scheduler.max_model_len, 1),
        ("--threads", config.threads, 1),
        ("--num-kv-blocks", config.cache.num_blocks, 2),
        ("block_size", config.cache.block_size, 1),
    )
    for flag, value, least in counts:
        if value is not None and value < least:
            raise ConfigError(f"{flag} is {value}; expected at least {least}", flag)
    most = max(MIN_THREAD_LIMIT, THREADS_PER_CPU * (os.cpu_count() or 1))
    if config.threads is not None and config.threads > most:
        raise ConfigError(
            f"--threads is {config.threads}; expected at most {most} on this machine, which has {os.cpu_count()} CPUs: "
            "more threads than CPUs only wait for each other",
            "--threads",
        )
    if not -(2**63) <= config.seed < 2**63:
        raise ConfigError(f"--seed is {config.seed}; expected a 64-bit signed integer", "--seed")
    if config.cache.num_blocks is not None and config.cache.memory_bytes is not None:
        raise ConfigError(
            "--num-kv-blocks and --kv-cache-memory both say how large the KV cache is; give one of them",
            "--num-kv-blocks",
        )
    if not 0 < config.cache.gpu_memory_utilization <= 1:
        share = config.cache.gpu_memory_utilization
        raise ConfigError(
            f"{UTILIZATION} is {share}; expected a share of the memory, above 0 and at most 1", UTILIZATION
        )


def context_limit(config: ModelConfig) -> int:
    """The longest sequence the model's positions allow. Rope scaling reaches further than max_position_embeddings
    where config.json leaves that at the original length, as Qwen's published YaRN settings do."""
    rope = config.rope
    stretched = int(rope.original_max_position_embeddings * rope.factor) if rope.kind == "yarn" else 0
    return max(config.max_position_embeddings, stretched)


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


def plan_blocks(
    cache: CacheConfig, scheduler: SchedulerConfig, max_len: int, block_bytes: int, sharers: int = 1
) -> int:
    """How many blocks to allocate, the null block included: the flags, else what could be used, within free memory.

    sharers  engines that start here together, this one among them
    """
    free = available_memory_bytes()
    if cache.num_blocks is not None:
        return _asked_blocks(cache.num_blocks, block_bytes, free)
    per_sequence = -(-max_len // cache.block_size)
    useful = 1 + scheduler.max_num_seqs * per_sequence
    budget = min(int(free * KV_SHARE_OF_FREE) // sharers, KV_DEFAULT_LIMIT_BYTES)
    if cache.memory_bytes is not None:
        budget = _asked_bytes(cache.memory_bytes, free)
    return min(useful, _blocks_in(budget, block_bytes, "--kv-cache-memory"))


def plan_gpu_blocks(cache: CacheConfig, gpu: GpuBytes, block_bytes: int) -> int:
    """The same on a GPU: the flags, else what its share of the memory leaves beside weights, steps and graphs.

    The share is of the whole memory, whoever uses it, as vLLM means it: what others hold already must fit beside it.
    Blocks beyond what running requests need keep prefixes.
    """
    if cache.num_blocks is not None:
        return _asked_blocks(cache.num_blocks, block_bytes, gpu.free)
    if cache.memory_bytes is not None:
        return _blocks_in(_asked_bytes(cache.memory_bytes, gpu.free), block_bytes, "--kv-cache-memory")
    share = int(gpu.total * cache.gpu_memory_utilization)
    if share > gpu.at_start:
        raise ConfigError(
            f"{UTILIZATION} {cache.gpu_memory_utilization} asks for {share / 2**30:.2f} of {gpu.total / 2**30:.2f} GiB "
            f"and {gpu.at_start / 2**30:.2f} GiB were free at start; lower it, or end what else uses the GPU",
            UTILIZATION,
        )
    return _blocks_in(share - (gpu.at_start - gpu.free), block_bytes, UTILIZATION)


def _asked_blocks(num_blocks: int, block_bytes: int, free: int) -> int:
    if num_blocks * block_bytes > free:
        raise ConfigError(
            f"--num-kv-blocks {num_blocks} take {num_blocks * block_bytes / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free",
            "--num-kv-blocks",
        )
    return num_blocks


def _asked_bytes(num_bytes: int, free: int) -> int:
    if num_bytes > free:
        raise ConfigError(
            f"--kv-cache-memory asks for {num_bytes / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            "--kv-cache-memory",
        )
    return num_bytes


def _blocks_in(num_bytes: int, block_bytes: int, flag: str) -> int:
    if num_bytes < 2 * block_bytes:
        raise ConfigError(
            f"{max(num_bytes, 0) / 2**20:.1f} MiB of KV cache hold no block ({block_bytes / 2**20:.2f} MiB each); "
            "give it more memory",
            flag,
        )
    return num_bytes // block_bytes


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
