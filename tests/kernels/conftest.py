"""Weights, activations and ragged batches for kernel tests, all from a seed; and the backends to try."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.kernels.cpu.backend import NOT_BUILT, CPUBackend, supported_isas
from nvfp4_runtime.kernels.ops import Backend, OpSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

ISAS = supported_isas()


def cpu_backend(isa: str | None = None, threads: int = 2) -> CPUBackend:
    """The native backend, or a skip that says why not."""
    if not ISAS:
        pytest.skip(NOT_BUILT)
    return CPUBackend(threads=threads, isa=isa)


@pytest.fixture(params=ISAS or ["none"])
def isa(request: pytest.FixtureRequest) -> str:
    """Every ISA variant this machine runs."""
    if request.param == "none":
        pytest.skip(NOT_BUILT)
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Triton's kernels run on the GPU where there is one: then `-m gpu` is what selects them."""
    if not torch.cuda.is_available():
        return
    for item in items:
        if {"triton_backend", "place"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


def skip_if_refused(backend: Backend, spec: OpSpec) -> None:
    """Skip with the backend's own reason."""
    if (reason := backend.refuses(spec)) is not None:
        pytest.skip(f"{backend.name}: {reason}")


def random_nvfp4(
    n: int,
    k: int,
    seed: int,
    groups: tuple[int, ...] | None = None,
    bias: bool = False,
    input_scale: float | None = None,
) -> NVFP4Weight:
    """Uniform codes, block scales spread over e4m3's range (subnormals too), one weight_scale_2 per row group."""
    g = torch.Generator().manual_seed(seed)
    rows = groups or (n,)
    scale_bytes = torch.randint(0, 0x7F, (n, k // 16), generator=g, dtype=torch.uint8)
    return NVFP4Weight(
        packed=torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        block_scale=scale_bytes.view(torch.float8_e4m3fn),
        weight_scale_2=torch.rand(len(rows), generator=g) * 1e-3 + 1e-5,
        group_rows=rows,
        input_scale=input_scale,
        bias=torch.randn(n, generator=g).to(torch.bfloat16) if bias else None,
    )


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal values of `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return a.dtype == b.dtype and torch.equal(a.view(as_int[a.element_size()]), b.view(as_int[b.element_size()]))


@dataclass(frozen=True)
class Sequence:
    """One sequence of a ragged batch: `length` tokens visible, the last `new` of them in this step."""

    length: int
    new: int


def random_cache(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> KVLayer:
    """A cache full of random values; an FP8 one has scales, and so has an NVFP4 one (`dtype` uint8)."""
    k = random_tensor(num_blocks, num_kv_heads, block_size, head_dim, seed=seed, dtype=torch.float32)
    v = random_tensor(num_blocks, num_kv_heads, block_size, head_dim, seed=seed + 1, dtype=torch.float32)
    if dtype == torch.float8_e4m3fn:
        return KVLayer((k * 8).to(dtype), (v * 16).to(dtype), k_scale=0.125, v_scale=0.0625)
    if dtype == torch.uint8:
        (k, k_blocks), (v, v_blocks) = nvfp4_rows(k, 0.125), nvfp4_rows(v, 0.0625)
        return KVLayer(k, v, k_scale=0.125, v_scale=0.0625, k_blocks=k_blocks, v_blocks=v_blocks)
    return KVLayer(k.to(dtype), v.to(dtype))


def nvfp4_rows(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """float [.., D] as packed codes [.., D/2] and block scales [.., D/16] of an NVFP4 cache."""
    codes, blocks = codec.quantize_activation(x.flatten(0, -2), torch.tensor(scale))
    return codec.pack_codes(codes).view(*x.shape[:-1], -1), blocks.view(*x.shape[:-1], -1)


def cached_values(kv: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a whole cache in FP64, [num_blocks, H_kv, block_size, D]."""
    found = []
    for cache, blocks, scale in ((kv.k, kv.k_blocks, kv.k_scale), (kv.v, kv.v_blocks, kv.v_scale)):
        wide = cache.float() if blocks is None else codec.dequantize(cache, blocks, torch.ones(()))
        found.append(wide.double() * scale)
    return found[0], found[1]


def make_batch(sequences: list[Sequence], block_size: int, num_blocks: int, seed: int = 0) -> ForwardBatch:
    """Block tables of distinct random blocks (0 stays the null block), and everything that follows from them."""
    order = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    widths = [-(-s.length // block_size) for s in sequences]
    tables = torch.zeros(len(sequences), max(widths), dtype=torch.int32)
    positions, slots, bounds = [], [], [0]
    for b, (s, width) in enumerate(zip(sequences, widths, strict=True)):
        blocks = [order.pop() for _ in range(width)]
        tables[b, :width] = torch.tensor(blocks, dtype=torch.int32)
        for p in range(s.length - s.new, s.length):
            positions.append(p)
            slots.append(blocks[p // block_size] * block_size + p % block_size)
        bounds.append(bounds[-1] + s.new)
    return ForwardBatch(
        input_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_tables=tables,
        seq_lens=torch.tensor([s.length for s in sequences], dtype=torch.int32),
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32),
        logits_rows=torch.arange(len(positions)),
        kv=(),
    )
