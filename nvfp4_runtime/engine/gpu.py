"""A loaded model on a GPU: what steps and graphs take is measured, the KV cache gets the rest, decode is captured."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from nvfp4_runtime.cache.paged_kv import allocate, bytes_per_block
from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.device import CudaDevice, Device
from nvfp4_runtime.engine.device_runner import Capacity, DeviceRunner
from nvfp4_runtime.engine.graphs import capture_sizes
from nvfp4_runtime.engine.overlap import OverlappedEngine
from nvfp4_runtime.engine.phases import Phases, Placement
from nvfp4_runtime.engine.plan import GpuBytes, fit_max_model_len, plan_gpu_blocks
from nvfp4_runtime.kernels.registry import Choice, Kernels
from nvfp4_runtime.sampling.on_device import DeviceSampler, TorchSampler
from nvfp4_runtime.sampling.sampler import BatchSampler

if TYPE_CHECKING:
    from nvfp4_runtime.models import Model

logger = logging.getLogger(__name__)

# Backends whose ops wait for the device inside a step, and why: what they run cannot be captured.
NOT_CAPTURED = {"reference": "the reference's attention, or recurrence, reads lengths on the host"}
_CHOSEN_ON_HOST = (
    "rows with logprobs, a grammar, min_tokens, penalties, edited logits or a thinking budget that may be spent are "
    "chosen on the host"
)


class Memory(Protocol):
    """A device's memory, in bytes."""

    total: int

    def free(self) -> int:
        """Free now, with all that was cached given back."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """The most that `work` held at once, beyond what was held before."""
        ...


class CudaMemory:
    """One GPU's memory: what the driver says is free, and PyTorch's account of what it handed out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def peak(self, work: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        held = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - held


class Measurable(Protocol):
    """What is measured: a runner over a provisional cache."""

    def warm_up(self) -> None: ...

    def run_largest(self) -> None: ...

    def capture(self, sizes: Sequence[int], progress: Callable[[float], None]) -> None: ...


def measure(make: Callable[[], Measurable], sizes: Sequence[int], memory: Memory, at_start: int) -> GpuBytes:
    """What a runner's steps and graphs take. It is made, warmed up and dropped again: another like it is made for good.

    Of the graphs only the two largest are captured: the first brings the memory that all share, every other one about
    as much as the second.
    """
    runner = make()
    runner.warm_up()
    step = memory.peak(runner.run_largest)
    free = [memory.free()]
    for size in sorted(sizes, reverse=True)[:2]:
        runner.capture([size], lambda _: None)
        free.append(memory.free())
    taken = [max(0, before - after) for before, after in pairwise(free)]
    graphs = sum(taken) + sum(taken[1:]) * (len(sizes) - len(taken))
    return GpuBytes(memory.total, at_start, free[0], step, graphs)


def decode_sizes(config: EngineConfig, kernels: Kernels) -> list[int]:
    """The batch sizes to capture, none where decode runs op by op; recorded in the kernels' report."""
    used = {choice.backend for choice in kernels.choices}
    reason = next((why for backend, why in NOT_CAPTURED.items() if backend in used), "")
    if not config.cuda_graphs:
        reason = "--no-cuda-graphs"
    sizes = [] if reason else capture_sizes(most_seqs(config))
    how = "cuda graph" if sizes else "op by op"
    reason = reason or f"{len(sizes)} batch sizes up to {sizes[-1]}"
    kernels.choices.append(Choice("decode step", "-", 0.0, 0, how, kernels.stream, reason))
    logger.info("decode step -> %s (%s)", how, reason)
    return sizes


def most_seqs(config: EngineConfig) -> int:
    """Sequences of one step at most: each brings a token."""
    return min(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)


def device_sampler(kernels: Kernels, vocab_size: int) -> DeviceSampler:
    """What chooses tokens on the device; recorded in the kernels' report."""
    sampler: DeviceSampler = TorchSampler()
    if any(choice.backend == "triton" for choice in kernels.choices):  # so it runs here
        from nvfp4_runtime.kernels.triton.sampling import TritonSampler
        from nvfp4_runtime.kernels.triton.sampling_kernels import MOST_TOKENS

        sampler = TritonSampler() if vocab_size <= MOST_TOKENS else sampler
    kernels.choices.append(Choice("sampling", "-", 0.0, 0, sampler.name, "float32", _CHOSEN_ON_HOST))
    return sampler


class Gpu:
    """One GPU, and what was free on it before anything was loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: Memory = CudaMemory(device)
        self.free = self.memory.free()

    def stream(self) -> Device:
        """Where one runner's steps go, in order; its graphs share their memory with no other's."""
        return CudaDevice(self.device)

    def place(self, config: EngineConfig, model: Model, max_len: int, phases: Phases, kernels: Kernels) -> Placement:
        """Warm up and measure over two blocks, give the cache what is left, capture the decode steps."""
        vocab_size, block_size = model.config.vocab_size, config.cache.block_size
        sampler, sizes = device_sampler(kernels, vocab_size), decode_sizes(config, kernels)

        def runner(num_blocks: int, longest: int) -> DeviceRunner:
            slots = config.scheduler.max_num_seqs + 1  # as many when measured: states leave less for blocks
            kv = allocate(model.kv_specs, model.kv_dtype, num_blocks, block_size, self.device, slots)
            capacity = Capacity(config.scheduler.max_num_batched_tokens, most_seqs(config), longest, vocab_size)
            names = [adapter.name for adapter in config.adapters]
            return DeviceRunner(model, kv, BatchSampler(), self.stream(), sampler, capacity, names)

        with phases.phase("warm_up"):
            measured = measure(lambda: runner(2, max_len), sizes, self.memory, self.free)
        with phases.phase("kv_cache"):
            block_bytes = bytes_per_block(model.kv_specs, model.kv_dtype, block_size)
            num_blocks = plan_gpu_blocks(config.cache, measured, block_bytes)
            max_len = fit_max_model_len(config.scheduler, max_len, num_blocks, block_size)
            executor = runner(num_blocks, max_len)
        if sizes:
            with phases.phase("capture") as report:
                executor.capture(sizes, report)
        scratch = {"step": measured.step, "cuda_graphs": measured.graphs}
        return Placement(num_blocks, max_len, functools.partial(OverlappedEngine, executor=executor), scratch)
