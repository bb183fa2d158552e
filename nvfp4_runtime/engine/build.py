"""From an EngineConfig to a running Engine: checkpoint, kernels, model, memory plan, KV cache."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.eos import eos_token_ids
from nvfp4_runtime.config import Dtype, EngineConfig
from nvfp4_runtime.engine.device import describe, resolve_device
from nvfp4_runtime.engine.device_runner import DeviceRunner
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.gpu import Gpu, decode_sizes, device_sampler, measure
from nvfp4_runtime.engine.messages import EngineInfo, LayerGroup
from nvfp4_runtime.engine.overlap import OverlappedEngine
from nvfp4_runtime.engine.plan import (
    check_limits,
    context_limit,
    fit_max_model_len,
    plan_blocks,
    plan_gpu_blocks,
    resolve_max_model_len,
)
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.cpu.backend import physical_cores
from nvfp4_runtime.kernels.registry import Choice, Kernels, available_backends
from nvfp4_runtime.kernels.transfer import finish_transfers
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.hf_config import parse_model_config
from nvfp4_runtime.sampling.sampler import BatchSampler

if TYPE_CHECKING:
    from nvfp4_runtime.models.llama import Decoder

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float], None]


class Phases:
    """Seconds by phase of start-up, reported as they pass."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        """Times what happens inside, which may report how far it is, 0 to 1."""

        def report(fraction: float) -> None:
            if self._progress is not None:
                self._progress(name, fraction)

        report(0.0)
        started = time.perf_counter()
        yield report
        self.seconds[name] = time.perf_counter() - started
        report(1.0)

    def carve(self, name: str, seconds: float, out_of: str) -> None:
        """Part of what `out_of` took was a phase of its own."""
        self.seconds[out_of] -= seconds
        self.seconds[name] = seconds


def build_engine(config: EngineConfig, progress: ProgressCallback | None = None) -> Engine:
    """Load `config.model` and everything around it. Raises ConfigError, CheckpointError, KernelError."""
    check_limits(config)
    phases = Phases(progress)
    device = resolve_device(config.device, config.backend)
    gpu = Gpu(device) if device.type == "cuda" else None
    with phases.phase("checkpoint"):
        checkpoint = Checkpoint.open(config.model)
    max_len = resolve_max_model_len(config.scheduler, context_limit(parse_model_config(checkpoint.raw_config)))
    torch.set_num_threads(config.threads or physical_cores())
    backends = available_backends(config.backend, config.threads, "cpu" if gpu is None else "cuda")
    with phases.phase("weights"):
        dtype = _resolve_dtype(config, checkpoint.raw_config)
        stream: Dtype = "float32" if gpu is None else dtype  # on a GPU ops hand over 16 bits, as its other engines do
        kernels = Kernels(backends, dtype, config.numerics, stream, device)
        model = load_model(checkpoint, kernels, config.cache.kv_dtype, max_len, config.lm_head_dtype)
        num_uploaded, upload_seconds = finish_transfers(device)
    if num_uploaded:
        phases.carve("upload", upload_seconds, out_of="weights")
    _warn_of_missing_scales(model)
    runner, num_blocks, max_len = (
        _on_cpu(config, model, max_len, phases)
        if gpu is None
        else _on_gpu(config, model, max_len, phases, kernels, gpu)
    )
    scheduler = Scheduler(
        config.scheduler, BlockPool(num_blocks), config.cache.block_size, config.cache.enable_prefix_caching
    )
    numerics, numerics_reason = _numerics(kernels)
    if config.numerics not in ("auto", numerics):
        raise ConfigError(
            f"--numerics {config.numerics} was asked for, and no layer of {config.model} is stored as NVFP4; "
            "leave it out, or quantise the model first: nvfp4 quantize SRC OUT",
            "--numerics",
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
        kv_dtype=model.kv_dtype,
        kv_bytes=num_blocks * bytes_per_block(model.kv_specs, model.kv_dtype, config.cache.block_size),
        dtype=kernels.dtype,
        numerics=numerics,
        numerics_reason=numerics_reason,
        weight_bytes=checkpoint.nbytes_by_format(),
        layers=layer_groups(kernels.choices),
        eos_token_ids=eos_token_ids(checkpoint.path, model.config.eos_token_ids),
        startup_seconds=phases.seconds,
        backends={backend.name: {k: str(v) for k, v in backend.describe().items()} for backend in backends},
        enable_prefix_caching=config.cache.enable_prefix_caching,
        device=describe(device),
    )
    if isinstance(runner, DeviceRunner):
        return OverlappedEngine(scheduler, runner, info, config.seed)
    return Engine(scheduler, runner, info, config.seed)


def _on_cpu(config: EngineConfig, model: Decoder, max_len: int, phases: Phases) -> tuple[ModelRunner, int, int]:
    """The runner, the number of KV blocks, and the longest sequence these hold."""
    with phases.phase("kv_cache"):
        block_bytes = bytes_per_block(model.kv_specs, model.kv_dtype, config.cache.block_size)
        num_blocks = plan_blocks(config.cache, config.scheduler, max_len, block_bytes)
        max_len = fit_max_model_len(config.scheduler, max_len, num_blocks, config.cache.block_size)
        kv = allocate(model.kv_specs, model.kv_dtype, num_blocks, config.cache.block_size, torch.device("cpu"))
    runner = ModelRunner(model, kv, BatchSampler())
    with phases.phase("warm_up"):
        runner.warm_up()
    return runner, num_blocks, max_len


def _on_gpu(
    config: EngineConfig, model: Decoder, max_len: int, phases: Phases, kernels: Kernels, gpu: Gpu
) -> tuple[DeviceRunner, int, int]:
    """The same on a GPU: warmed up and measured over two blocks first, since the cache gets what is left."""
    sampler, sizes = device_sampler(kernels, model.config.vocab_size), decode_sizes(config, kernels)
    block_size = config.cache.block_size

    def cache(num_blocks: int) -> tuple[KVLayer, ...]:
        return allocate(model.kv_specs, model.kv_dtype, num_blocks, block_size, gpu.device)

    with phases.phase("warm_up"):
        kv = cache(2)
        measured = measure(
            lambda: gpu.runner(config, model, kv, sampler, max_len, model.config.vocab_size),
            sizes,
            gpu.memory,
            gpu.free,
        )
    with phases.phase("kv_cache"):
        block_bytes = bytes_per_block(model.kv_specs, model.kv_dtype, block_size)
        num_blocks = plan_gpu_blocks(config.cache, measured, block_bytes)
        max_len = fit_max_model_len(config.scheduler, max_len, num_blocks, block_size)
        runner = gpu.runner(config, model, cache(num_blocks), sampler, max_len, model.config.vocab_size)
    if sizes:
        with phases.phase("capture") as report:
            runner.capture(sizes, report)
    return runner, num_blocks, max_len


def _warn_of_missing_scales(model: Decoder) -> None:
    if all(spec.has_scales for spec in model.kv_specs):
        return
    if model.kv_dtype == "fp8":
        logger.warning("the checkpoint has no scales for an FP8 KV cache; 1.0 is used: values beyond 448 saturate")
    if model.kv_dtype == "nvfp4":
        logger.warning(
            "the checkpoint has no scales for its KV cache; 1.0 is used: in an NVFP4 cache values beyond 2688 "
            "saturate and blocks of 16 below 0.006 become zeros"
        )


def _resolve_dtype(config: EngineConfig, raw: dict[str, object]) -> Dtype:
    """Activations: the flag, else the checkpoint's dtype. FP16 checkpoints run in BF16, which every backend has."""
    if config.dtype != "auto":
        return config.dtype
    declared = raw.get("dtype") or raw.get("torch_dtype")
    if declared == "float16":
        logger.warning("the checkpoint declares float16; activations run in bfloat16 (see --dtype float32)")
    return "float32" if declared == "float32" else "bfloat16"


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


def _numerics(kernels: Kernels) -> tuple[str, str]:
    """What runs, and why."""
    if any(choice.stored == "nvfp4" for choice in kernels.choices):
        return kernels.resolved_numerics()
    return kernels.dtype, "no layer is stored as NVFP4"
