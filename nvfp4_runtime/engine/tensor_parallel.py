"""Start-up of a tensor-parallel engine: what cannot be had is refused, ranks meet, and agree on the KV cache."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from nvfp4_runtime.batch import CacheLayer
from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block, state_bytes
from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.leader import Leader
from nvfp4_runtime.engine.load import Loaded, load
from nvfp4_runtime.engine.phases import Phases, Placement
from nvfp4_runtime.engine.plan import fit_max_model_len, plan_blocks
from nvfp4_runtime.engine.ranks import Ranks
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.step_clock import StepClock
from nvfp4_runtime.engine.team import TorchTeam
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.models import Model
from nvfp4_runtime.parallel import FLAG
from nvfp4_runtime.sampling.sampler import BatchSampler

logger = logging.getLogger(__name__)


class Lead:
    """Rank 0's side of it.

    kv_bytes  of all ranks' caches and states, once they are placed
    """

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        check(config)
        self.kv_bytes = 0
        self._config, self._ranks = config, ranks

    def meet(self, device: torch.device) -> TorchTeam:
        self._team = _team(self._config, self._ranks.file, device)
        self._ranks.met()
        if self._ranks.file is None:
            self._team.watch(self._ranks.ended)
        return self._team

    def place(self, loaded: Loaded, phases: Phases) -> Placement:
        """The KV cache of all ranks, alike in blocks; on one host they share its memory."""
        config, model, team = self._config, loaded.model, self._team
        cache, block_size = config.cache, config.cache.block_size
        with phases.phase("kv_cache"):
            each = team.exchange(bytes_per_block(model.kv_specs, model.kv_dtype, block_size))
            if loaded.gpu is None:
                num_blocks = plan_blocks(cache, config.scheduler, loaded.max_len, sum(each), config.parallel.replicas)
            else:
                num_blocks = cache.num_blocks or (cache.memory_bytes or 0) // max(each)
            max_len = fit_max_model_len(config.scheduler, loaded.max_len, num_blocks, block_size)
            team.tell(torch.tensor([num_blocks]))
            kv, num_bytes = _caches(config, loaded, num_blocks)
            self.kv_bytes = sum(team.exchange(num_bytes))
        clock = StepClock()
        self._leader = Leader(model, team)
        runner = ModelRunner(self._leader, kv, BatchSampler(), clock=clock)
        with phases.phase("warm_up"):
            runner.warm_up()
        return Placement(num_blocks, max_len, functools.partial(Engine, executor=runner, clock=clock))

    def ready(self, engine: Engine) -> None:
        """All is loaded. From now on the others end when `engine` is closed, and it ends when one of them does."""
        self._ranks.ready = True
        engine.on_close = self._close

    def _close(self) -> None:
        self._ranks.close()
        self._leader.stop()


def build_rank(
    config: EngineConfig, file: Path | None
) -> tuple[Model, TorchTeam, tuple[CacheLayer, ...], torch.device]:
    """The other ranks' side, up to the point where they follow. Raises what rank 0 raises, and for the same reasons."""
    check(config)
    loaded = load(config, Phases(None), lambda device: _team(config, file, device))
    team, model = loaded.kernels.team, loaded.model
    assert isinstance(team, TorchTeam)
    team.exchange(bytes_per_block(model.kv_specs, model.kv_dtype, config.cache.block_size))
    kv, num_bytes = _caches(config, loaded, int(team.hear()[0]))
    team.exchange(num_bytes)
    if config.self_test:
        from nvfp4_runtime.kernels.self_test import self_test

        self_test(loaded.kernels)
    return model, team, kv, loaded.device


def check(config: EngineConfig) -> None:
    """Raise ConfigError for what a team cannot do."""
    size, wanted = config.parallel.size, f"{FLAG} {config.parallel.size}"
    if not 0 <= config.parallel.rank < size:
        raise ConfigError(f"rank {config.parallel.rank} is not one of {size} ranks", FLAG)
    if config.adapters:
        raise ConfigError(
            f"{wanted} runs no LoRA adapters: leave --lora-modules out, or run one process for each replica", FLAG
        )
    on_gpus = config.device != "cpu" and config.backend not in ("cpu", "reference") and torch.cuda.is_available()
    if on_gpus and config.cache.num_blocks is None and config.cache.memory_bytes is None:
        raise ConfigError(
            f"{wanted} on GPUs does not measure what is left for the KV cache: give --kv-cache-memory, of each GPU",
            "--kv-cache-memory",
        )


def _team(config: EngineConfig, file: Path | None, device: torch.device) -> TorchTeam:
    if file is None:
        return TorchTeam.across_hosts(config.parallel, device)
    return TorchTeam.on_this_host(config.parallel, file, device)


def _caches(config: EngineConfig, loaded: Loaded, num_blocks: int) -> tuple[tuple[CacheLayer, ...], int]:
    """This rank's caches and states, and their bytes."""
    model, block_size, slots = loaded.model, config.cache.block_size, config.scheduler.max_num_seqs + 1
    kv = allocate(model.kv_specs, model.kv_dtype, num_blocks, block_size, loaded.device, slots)
    blocks = num_blocks * bytes_per_block(model.kv_specs, model.kv_dtype, block_size)
    return kv, blocks + state_bytes(model.kv_specs, slots)
