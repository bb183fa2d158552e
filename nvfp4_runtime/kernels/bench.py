"""Time every backend on the shapes of the default model: `python -m nvfp4_runtime.kernels.bench [--threads N]`.

Prints, per op, the median time of a call, the bytes of weights (or cache) read per second and FLOP per second. Linears
are timed over as many copies as the model has layers, so that weights come from memory as they do in a step. The rounds
of all backends are interleaved: a noisy stretch of the machine hits each of them alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import KVDtype, Numerics
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import Backend, LinearSpec, NormSpec, OpSpec, PagedAttentionSpec
from nvfp4_runtime.kernels.registry import available_backends
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

# SmolLM2-135M
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 30, 9, 3, 64, 49152
LINEARS = {
    "qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_up_proj": (2 * MLP, HIDDEN),
    "down_proj": (HIDDEN, MLP),
}
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Case:
    """One thing to time: `calls` calls that together read `num_bytes` and do `flop` floating-point operations."""

    name: str
    spec: OpSpec
    calls: int
    num_bytes: float
    flop: float
    make: Callable[[Backend], Callable[[], None]]


def random_nvfp4(n: int, k: int, seed: int) -> NVFP4Weight:
    """Uniform codes under block scales near 1."""
    g = torch.Generator().manual_seed(seed)
    return NVFP4Weight(
        packed=torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        block_scale=torch.randint(0x30, 0x40, (n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn),
        weight_scale_2=torch.full((1,), 1e-3),
        group_rows=(n,),
        input_scale=1 / 2688,
    )


def linear_case(name: str, weights: list[Weight], spec: LinearSpec, m: int) -> Case:
    x = torch.randn(m, spec.k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)

    def make(backend: Backend) -> Callable[[], None]:
        kernels = [backend.linear(w, spec) for w in weights]

        def run() -> None:
            for kernel in kernels:
                kernel(x)

        return run

    calls, num_bytes = len(weights), sum(w.nbytes for w in weights)
    label = f"{name} {spec.numerics or spec.weight} M={m}"
    return Case(label, spec, calls, num_bytes, 2.0 * m * spec.n * spec.k * calls, make)


def norm_case(m: int) -> Case:
    spec = NormSpec(HIDDEN, "bfloat16", "bfloat16")
    x, residual = torch.randn(2, m, HIDDEN, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16)

    def make(backend: Backend) -> Callable[[], None]:
        kernel, own = backend.rms_norm(spec), residual.clone()

        def run() -> None:
            kernel(x, own, weight, 1e-5)

        return run

    return Case(f"rms_norm M={m}", spec, 1, 4.0 * 2 * m * HIDDEN, 5.0 * m * HIDDEN, make)


def attention_case(sequences: int, length: int, new: int) -> Case:
    """`sequences` sequences of `length` tokens, the last `new` of each computed in this step, one layer."""
    spec = PagedAttentionSpec(HEADS, KV_HEADS, HEAD_DIM, None, "bfloat16", "bfloat16", "bfloat16")
    width = math.ceil(length / BLOCK_SIZE)
    g = torch.Generator().manual_seed(length)
    blocks = torch.randperm(sequences * width, generator=g).to(torch.int32).view(sequences, width) + 1
    k, v = torch.randn(2, sequences * width + 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM, generator=g).to(torch.bfloat16)
    rows = sequences * new
    q = torch.randn(rows, HEADS, HEAD_DIM, generator=g).to(torch.bfloat16)
    nothing = torch.zeros(rows, dtype=torch.int64)
    batch = ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        block_tables=blocks,
        seq_lens=torch.full((sequences,), length, dtype=torch.int32),
        cu_seqlens_q=torch.arange(sequences + 1, dtype=torch.int32) * new,
        logits_rows=nothing,
        kv=(),
    )
    kv = KVLayer(k, v)

    def make(backend: Backend) -> Callable[[], None]:
        kernel = backend.paged_attention(spec)

        def run() -> None:
            kernel(q, kv, batch, HEAD_DIM**-0.5)

        return run

    seen = sequences * sum(range(length - new + 1, length + 1))
    num_bytes = 2.0 * 2 * sequences * length * KV_HEADS * HEAD_DIM
    return Case(
        f"attention B={sequences} len={length} new={new}", spec, 1, num_bytes, 4.0 * seen * HEADS * HEAD_DIM, make
    )


@dataclass(frozen=True)
class AttentionTime:
    """One layer's decode attention: median seconds of a call, and the bytes of keys and values it reads."""

    name: str
    seconds: float
    num_bytes: int


def attention_cache(kv_dtype: KVDtype, num_blocks: int, kv_heads: int, head_dim: int, seed: int) -> KVLayer:
    """A cache whose every byte was written, so that reading it costs what it will cost in a server.

    It lies in memory from numpy, as a server's does: that asks for huge pages, and 4 KiB ones cost a quarter of the
    time of reading a cache (see docs/kernel-log.md).
    """

    def values(width: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        shape = (num_blocks, kv_heads, BLOCK_SIZE, width)
        bits = torch.randint(low, high, shape, generator=g, dtype=torch.uint8)
        found = torch.from_numpy(np.zeros(bits.numel() * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
        found.copy_(bits if dtype == torch.uint8 else bits.view(torch.float8_e4m3fn))
        return found

    if kv_dtype == "nvfp4":
        k_blocks, v_blocks = (values(head_dim // 16, 0x28, 0x38, torch.float8_e4m3fn) for _ in "kv")
        k, v = (values(head_dim // 2, 0, 256, torch.uint8) for _ in "kv")
        return KVLayer(k, v, 1.0, 1.0, k_blocks, v_blocks)
    dtypes = {"fp8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16, "float32": torch.float32}
    k, v = (values(head_dim, 0, 0x40, dtypes[kv_dtype]) for _ in "kv")
    return KVLayer(k, v)


def time_decode_attention(
    backend: Backend,
    length: int = 8192,
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = 64,
    kv_dtypes: Sequence[KVDtype] = ("bfloat16", "fp8", "nvfp4"),
    total_bytes: int = 128 << 20,
    rounds: int = 8,
) -> list[AttentionTime]:
    """One sequence decodes at `length` tokens: time and bytes per layer, for each type of cache.

    total_bytes  of cache walked layer after layer, so that it comes from memory; more than the last-level cache

    Types that the backend refuses are left out. Seconds are the median over layers and rounds.
    """
    width = math.ceil(length / BLOCK_SIZE)
    g = torch.Generator().manual_seed(length)
    nothing = torch.zeros(1, dtype=torch.int64)
    batch = ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        block_tables=torch.randperm(width, generator=g).to(torch.int32).view(1, width) + 1,
        seq_lens=torch.tensor([length], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        logits_rows=nothing,
        kv=(),
    )
    q = torch.randn(1, heads, head_dim, generator=g)
    found = []
    for kv_dtype in kv_dtypes:
        spec = PagedAttentionSpec(heads, kv_heads, head_dim, None, kv_dtype, "float32", "bfloat16")
        if backend.refuses(spec) is not None:
            continue
        layers = [attention_cache(kv_dtype, width + 1, kv_heads, head_dim, 0)]
        parts = (layers[0].k, layers[0].v, layers[0].k_blocks, layers[0].v_blocks)
        num_bytes = sum(t.nbytes for t in parts if t is not None) // (width + 1) * width
        for seed in range(1, total_bytes // num_bytes):
            layers.append(attention_cache(kv_dtype, width + 1, kv_heads, head_dim, seed))
        kernel, seconds = backend.paged_attention(spec), []
        for _ in range(rounds):
            for kv in layers:
                start = time.perf_counter()
                kernel(q, kv, batch, head_dim**-0.5)
                seconds.append(time.perf_counter() - start)
        name = f"decode attention {heads}/{kv_heads}x{head_dim} at {length}, {kv_dtype} cache"
        found.append(AttentionTime(name, statistics.median(seconds), num_bytes))
    return found


def cases(rows: list[int], numerics: list[Numerics]) -> Iterator[Case]:
    for m in rows:
        for name, (n, k) in LINEARS.items():
            weights: list[Weight] = [random_nvfp4(n, k, seed) for seed in range(LAYERS)]
            for kind in numerics:
                spec = LinearSpec(n, k, "nvfp4", kind, "bfloat16", "bfloat16")
                yield linear_case(name, weights, spec, m)
        if m <= 64:
            head = DenseWeight(torch.randn(VOCAB, HIDDEN).to(torch.bfloat16))
            yield linear_case("lm_head", [head], LinearSpec(VOCAB, HIDDEN, "bf16", None, "bfloat16", "float32"), m)
        yield norm_case(m)
    yield attention_case(1, 128, 1)
    yield attention_case(1, 2048, 1)
    yield attention_case(8, 512, 1)
    yield attention_case(1, 512, 512)


def time_case(case: Case, backends: list[Backend], seconds: float) -> dict[str, list[float] | str]:
    """Seconds per run of each backend, rounds interleaved; or the reason why it refuses."""
    results: dict[str, list[float] | str] = {}
    runs: dict[str, Callable[[], None]] = {}
    for backend in backends:
        if (reason := backend.refuses(case.spec)) is not None:
            results[backend.name] = reason
            continue
        runs[backend.name] = case.make(backend)
        runs[backend.name]()  # warm
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while runs and (time.perf_counter() < end or len(next(iter(times.values()))) < 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return results | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help="auto: all of them")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rows", default="1,8,32,512", help="M of the linears, comma-separated")
    parser.add_argument("--numerics", default="w4a16,w4a8,w4a4")
    parser.add_argument("--seconds", type=float, default=0.3, help="per case and backend")
    args = parser.parse_args()
    backends = available_backends(args.backend, args.threads)
    if not backends:
        raise KernelError("no backend to time")
    for backend in backends:
        print(f"{backend.name}: {backend.describe()}")
    print(f"{'':36}{'backend':>10}{'us/call':>10}{'GB/s':>8}{'GFLOP/s':>9}")
    for case in cases([int(m) for m in args.rows.split(",")], args.numerics.split(",")):
        for name, found in time_case(case, backends, args.seconds).items():
            if isinstance(found, str):
                print(f"{case.name:36}{name:>10}  refused: {found}")
                continue
            median = statistics.median(found)
            print(
                f"{case.name:36}{name:>10}{median / case.calls * 1e6:10.1f}{case.num_bytes / median * 1e-9:8.1f}"
                f"{case.flop / median * 1e-9:9.1f}",
                flush=True,
            )
    for backend in backends:
        if backend.name != "reference":  # which takes a second a call
            for row in time_decode_attention(backend):
                rate = row.num_bytes / row.seconds * 1e-9
                print(f"{row.name:56}{backend.name:>10}{row.seconds * 1e6:10.1f}{rate:8.1f}", flush=True)


if __name__ == "__main__":
    main()
