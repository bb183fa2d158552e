"""A model from its files to this process, whole or one rank's part of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nvfp4_runtime.checkpoint.adapter import Adapter
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype, EngineConfig
from nvfp4_runtime.engine.device import resolve_device
from nvfp4_runtime.engine.phases import Phases
from nvfp4_runtime.engine.plan import check_limits, context_limit, resolve_max_model_len
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.cpu.backend import physical_cores
from nvfp4_runtime.kernels.ops import Backend
from nvfp4_runtime.kernels.registry import Kernels, Samples, available_backends
from nvfp4_runtime.kernels.transfer import finish_transfers
from nvfp4_runtime.models import Model, chosen_impl, describe_model, load_model
from nvfp4_runtime.parallel import FLAG, Alone, Team

if TYPE_CHECKING:
    from nvfp4_runtime.engine.gpu import Gpu

logger = logging.getLogger(__name__)

# What a team runs: tests compare each of them with one process, Mistral's by Llama's.
SHARED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "DeepseekV3ForCausalLM",
    "NemotronHForCausalLM",
)


@dataclass(frozen=True)
class Loaded:
    """A model in this process, whole or a rank's part of it, before it has a KV cache.

    gpu      None on a CPU
    threads  of kernels on the CPU
    max_len  what flags and positions allow
    """

    checkpoint: Checkpoint
    backends: list[Backend]
    kernels: Kernels
    model: Model
    device: torch.device
    gpu: Gpu | None
    threads: int
    max_len: int


def load(config: EngineConfig, phases: Phases, meet: Callable[[torch.device], Team] | None = None) -> Loaded:
    """Checkpoint, kernels and model. `meet`: how this rank finds its team, once its device is known."""
    check_limits(config)
    parallel = config.parallel
    index = parallel.rank + parallel.replica * parallel.size if parallel.local_rank is None else parallel.local_rank
    device = resolve_device(config.device, config.backend, index)
    gpu = None
    if device.type == "cuda":
        from nvfp4_runtime.engine.gpu import Gpu  # here, so that a start on a CPU does not pay for it

        gpu = Gpu(device)
    with phases.phase("checkpoint"):
        checkpoint = Checkpoint.open(config.model)
        checkpoint.adapters = tuple(Adapter.open(adapter, config.max_lora_rank) for adapter in config.adapters)
    described = describe_model(checkpoint.raw_config, config.model_impl)
    max_len = resolve_max_model_len(config.scheduler, context_limit(described))
    on_this_host = parallel.replicas * (1 if parallel.address else parallel.size)
    threads = config.threads or max(1, physical_cores() // on_this_host)
    torch.set_num_threads(threads)
    backends = available_backends(config.backend, threads, "cpu" if gpu is None else "cuda")
    team: Team = Alone()
    if meet is not None:
        if chosen_impl(checkpoint.raw_config, config.model_impl) == "transformers" or (
            described.architecture not in SHARED
        ):
            raise ConfigError(
                f"{FLAG} {parallel.size}: {described.architecture} is not split between processes here; leave the flag "
                f"out. These are: {', '.join(SHARED)}, by our own implementations (--model-impl)",
                FLAG,
            )
        with phases.phase("meet"):
            team = meet(device)
    with phases.phase("weights"):
        dtype = resolve_dtype(config, described.dtype)
        stream: Dtype = "float32" if gpu is None else dtype  # on a GPU ops hand over 16 bits, as its other engines do
        samples: Samples | None = {} if config.self_test else None
        kernels = Kernels(backends, dtype, config.numerics, stream, device, samples=samples, team=team)
        model = load_model(checkpoint, kernels, config.cache.kv_dtype, max_len, config.lm_head_dtype, config.model_impl)
        num_uploaded, upload_seconds = finish_transfers(device)
    if num_uploaded:
        phases.carve("upload", upload_seconds, out_of="weights")
    return Loaded(checkpoint, backends, kernels, model, device, gpu, threads, max_len)


def resolve_dtype(config: EngineConfig, declared: Dtype) -> Dtype:
    """Activations: the flag, else the checkpoint's dtype. FP16 checkpoints run in BF16, which every backend has."""
    if config.dtype != "auto":
        return config.dtype
    if declared == "float16":
        logger.warning("the checkpoint declares float16; activations run in bfloat16 (see --dtype float32)")
    return "float32" if declared == "float32" else "bfloat16"
