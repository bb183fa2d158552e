"""From an EngineConfig to a running Engine: checkpoint, kernels, model, memory plan, KV cache."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Sequence

import torch

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block, state_bytes
from nvfp4_runtime.checkpoint.eos import eos_token_ids
from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.cost import ModelCost
from nvfp4_runtime.engine.device import describe
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.limits import machine_limits
from nvfp4_runtime.engine.load import load
from nvfp4_runtime.engine.messages import AdapterInfo, EngineInfo, LayerGroup
from nvfp4_runtime.engine.phases import Phases, Placement, ProgressCallback
from nvfp4_runtime.engine.plan import fit_max_model_len, plan_blocks
from nvfp4_runtime.engine.ranks import Ranks
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.engine.step_clock import StepClock
from nvfp4_runtime.engine.tensor_parallel import Lead
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Choice, Kernels
from nvfp4_runtime.models import Model
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
from nvfp4_runtime.structured.worker import GrammarTrial

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig, progress: ProgressCallback | None = None, ranks: Ranks | None = None) -> Engine:
    """Load `config.model` and everything around it. Raises ConfigError, CheckpointError, KernelError.

    ranks  the other ranks of a tensor-parallel engine, where they were started already
    """
    phases = Phases(progress)
    if config.parallel.size > 1 and ranks is None:
        ranks = Ranks.of(config, lambda why: logger.error("%s", why))
    lead = None if ranks is None else Lead(config, ranks)
    loaded = load(config, phases, None if lead is None else lead.meet)
    checkpoint, kernels, model, gpu = loaded.checkpoint, loaded.kernels, loaded.model, loaded.gpu
    backends, device, max_len = loaded.backends, loaded.device, loaded.max_len
    _warn_of_missing_scales(model)
    states = state_bytes(model.kv_specs, config.scheduler.max_num_seqs + 1)
    if states and config.cache.enable_prefix_caching:
        logger.info("no prefix caching: %s keeps states that are not found again by prefix", model.config.architecture)
    caching = config.cache.enable_prefix_caching and not states
    if lead is not None:
        placed = lead.place(loaded, phases)
    elif gpu is None:
        placed = _on_cpu(config, model, max_len, phases)
    else:
        placed = gpu.place(config, model, max_len, phases, kernels)
    scheduler = Scheduler(
        config.scheduler,
        BlockPool(placed.num_blocks),
        config.cache.block_size,
        caching,
        config.scheduler.max_num_seqs if states else 0,
    )
    numerics, numerics_reason = _numerics(kernels)
    if config.numerics not in ("auto", numerics):
        raise ConfigError(
            f"--numerics {config.numerics} was asked for, and no layer of {config.model} is stored as NVFP4; "
            "leave it out, or quantise the model first: nvfp4 quantize SRC OUT",
            "--numerics",
        )
    layers = layer_groups(kernels.choices)
    limits = None
    if config.machine_limits != "off":
        with phases.phase("machine_limits"):
            limits = machine_limits(config.machine_limits, device, loaded.threads, numerics)
    kv_bytes = states + placed.num_blocks * bytes_per_block(model.kv_specs, model.kv_dtype, config.cache.block_size)
    info = EngineInfo(
        model=config.model,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        max_model_len=placed.max_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_queued_requests=config.scheduler.max_queued_requests,
        max_queued_tokens=config.scheduler.max_queued_tokens,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=placed.num_blocks,
        kv_dtype=model.kv_dtype,
        kv_bytes=kv_bytes if lead is None else lead.kv_bytes,
        dtype=kernels.dtype,
        numerics=numerics,
        numerics_reason=numerics_reason,
        weight_bytes=checkpoint.nbytes_by_format(),
        layers=layers,
        eos_token_ids=eos_token_ids(checkpoint.path, model.config.eos_token_ids),
        startup_seconds=phases.seconds,
        backends={backend.name: {k: str(v) for k, v in backend.describe().items()} for backend in backends},
        enable_prefix_caching=caching,
        device=describe(device),
        scratch_bytes=placed.scratch_bytes,
        limits=limits,
        adapters=[AdapterInfo(a.name, str(a.path), a.rank) for a in checkpoint.adapters],
        tensor_parallel_size=config.parallel.size,
        rank_pids=[] if ranks is None else ranks.pids,
    )
    cost = ModelCost.of(model.config, layers, model.kv_specs, model.kv_dtype)
    vocabulary = Vocabulary(info.vocab_size, tuple(info.eos_token_ids), checkpoint.path / "tokenizer.json")
    grammars = GrammarCompiler(vocabulary, GrammarTrial(vocabulary))
    engine: Engine = placed.make(scheduler=scheduler, info=info, seed=config.seed, grammars=grammars, cost=cost)
    if config.self_test:
        with phases.phase("self_test"):
            _self_test(engine, kernels)
    if lead is not None:
        lead.ready(engine)
    return engine


def _self_test(engine: Engine, kernels: Kernels) -> None:
    from nvfp4_runtime.engine.sanity import check_sanity  # here: engines made for evaluation do without
    from nvfp4_runtime.kernels.self_test import self_test

    assert isinstance(engine.executor, ModelRunner)
    count = self_test(kernels)
    check_sanity(engine.executor, engine.info)
    logger.info("self-test: %d distinct ops agree with the reference, and the sanity prompt makes sense", count)


def _on_cpu(config: EngineConfig, model: Model, max_len: int, phases: Phases) -> Placement:
    with phases.phase("kv_cache"):
        block_bytes = bytes_per_block(model.kv_specs, model.kv_dtype, config.cache.block_size)
        num_blocks = plan_blocks(config.cache, config.scheduler, max_len, block_bytes, config.parallel.replicas)
        max_len = fit_max_model_len(config.scheduler, max_len, num_blocks, config.cache.block_size)
        slots, cpu = config.scheduler.max_num_seqs + 1, torch.device("cpu")
        kv = allocate(model.kv_specs, model.kv_dtype, num_blocks, config.cache.block_size, cpu, slots)
    clock = StepClock()
    runner = ModelRunner(model, kv, BatchSampler(), [adapter.name for adapter in config.adapters], clock)
    with phases.phase("warm_up"):
        runner.warm_up()
    return Placement(num_blocks, max_len, functools.partial(Engine, executor=runner, clock=clock))


def _warn_of_missing_scales(model: Model) -> None:
    if all(spec.has_scales for spec in model.kv_specs):
        return
    if model.kv_dtype == "fp8":
        logger.warning("the checkpoint has no scales for an FP8 KV cache; 1.0 is used: values beyond 448 saturate")
    if model.kv_dtype == "nvfp4":
        logger.warning(
            "the checkpoint has no scales for its KV cache; 1.0 is used: in an NVFP4 cache values beyond 2688 "
            "saturate and blocks of 16 below 0.006 become zeros"
        )


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
