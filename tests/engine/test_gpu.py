"""Memory of a GPU: what is measured, and what is left for the cache. Arithmetic over a memory that tests make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.gpu import decode_sizes, device_sampler, measure, most_seqs
from nvfp4_runtime.engine.plan import GpuBytes, check_limits, plan_gpu_blocks
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Choice, Kernels

GIB = 1 << 30


class FakeGpu:
    """A memory, and a runner that takes from it as a real one would."""

    def __init__(self, first_graph: int, other_graph: int) -> None:
        self.total, self.now, self.costs = 100 * GIB, 80 * GIB, [first_graph, other_graph]
        self.calls: list[str] = []

    def free(self) -> int:
        return self.now

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return 3 * GIB

    def warm_up(self) -> None:
        self.calls.append("warm_up")
        self.now -= GIB  # workspaces, compiled kernels

    def run_largest(self) -> None:
        self.calls.append("largest")

    def capture(self, sizes: Sequence[int], progress: Callable[[float], None]) -> None:
        self.calls.append(f"capture {list(sizes)}")
        self.now -= self.costs[min(1, len([call for call in self.calls if "capture" in call]) - 1)]


def test_graphs_are_estimated_from_the_two_largest() -> None:
    gpu = FakeGpu(2 * GIB, GIB // 8)
    found = measure(lambda: gpu, [1, 2, 4, 8, 16], gpu, at_start=95 * GIB)
    assert gpu.calls == ["warm_up", "largest", "capture [16]", "capture [8]"]
    assert found == GpuBytes(100 * GIB, 95 * GIB, 79 * GIB, 3 * GIB, 2 * GIB + 4 * GIB // 8)
    assert found.free == 79 * GIB - 3 * GIB - 2 * GIB - GIB // 2


def test_without_graphs_nothing_is_kept_for_them() -> None:
    gpu = FakeGpu(GIB, GIB)
    assert measure(lambda: gpu, [], gpu, at_start=95 * GIB).graphs == 0


def test_a_single_graph_is_counted_once() -> None:
    gpu = FakeGpu(GIB, GIB)
    assert measure(lambda: gpu, [1], gpu, at_start=95 * GIB).graphs == GIB


MEASURED = GpuBytes(total=100 * GIB, at_start=95 * GIB, loaded=79 * GIB, step=3 * GIB, graphs=2 * GIB)


def test_the_cache_gets_what_the_share_leaves_beside_weights_steps_and_graphs() -> None:
    # 90 of 100 GiB are ours; weights took 95 - 79 = 16, steps and graphs take 5
    assert plan_gpu_blocks(CacheConfig(), MEASURED, GIB) == 90 - 16 - 5
    assert plan_gpu_blocks(CacheConfig(gpu_memory_utilization=0.5), MEASURED, GIB) == 50 - 16 - 5


def test_a_share_that_was_not_free_at_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asks for 97\.00 of 100\.00 GiB and 95\.00 GiB were free") as caught:
        plan_gpu_blocks(CacheConfig(gpu_memory_utilization=0.97), MEASURED, GIB)
    assert caught.value.flag == "--gpu-memory-utilization"


def test_a_share_that_leaves_no_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="hold no block") as caught:
        plan_gpu_blocks(CacheConfig(gpu_memory_utilization=0.2), MEASURED, GIB)
    assert caught.value.flag == "--gpu-memory-utilization"


def test_flags_take_what_they_say_or_are_refused() -> None:
    assert plan_gpu_blocks(CacheConfig(num_blocks=74), MEASURED, GIB) == 74
    assert plan_gpu_blocks(CacheConfig(memory_bytes=10 * GIB), MEASURED, GIB) == 10
    for cache, flag in ((CacheConfig(num_blocks=75), "--num-kv-blocks"), (CacheConfig(memory_bytes=75 * GIB), "--kv-")):
        with pytest.raises(ConfigError, match=r"74\.00 GiB are free") as caught:
            plan_gpu_blocks(cache, MEASURED, GIB)
        assert (caught.value.flag or "").startswith(flag)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        check_limits(EngineConfig(cache=CacheConfig(gpu_memory_utilization=share)))


def kernels_of(backend: str) -> Kernels:
    kernels = Kernels([ReferenceBackend()], "bfloat16")
    kernels.choices.append(Choice("o_proj", "nvfp4", 4.5, 100, backend, "w4a16", ""))
    return kernels


def test_decode_is_captured_unless_a_flag_or_a_backend_forbids_it_and_the_report_says_so() -> None:
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=16))
    kernels = kernels_of("triton")
    assert decode_sizes(config, kernels) == [1, 2, 4, 8, 16]
    assert (kernels.choices[-1].backend, kernels.choices[-1].reason) == ("cuda graph", "5 batch sizes up to 16")
    kernels = kernels_of("reference")
    assert decode_sizes(config, kernels) == []
    assert (kernels.choices[-1].backend, "reads lengths" in kernels.choices[-1].reason) == ("op by op", True)
    kernels = kernels_of("triton")
    assert decode_sizes(EngineConfig(cuda_graphs=False), kernels) == []
    assert kernels.choices[-1].reason == "--no-cuda-graphs"


def test_a_step_has_no_more_sequences_than_tokens() -> None:
    assert most_seqs(EngineConfig(scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=10))) == 10


def test_the_report_says_who_samples() -> None:
    kernels = kernels_of("reference")
    sampler = device_sampler(kernels, vocab_size=1000)
    assert sampler.name == "torch"
    assert (kernels.choices[-1].group, kernels.choices[-1].backend) == ("sampling", sampler.name)
