"""Random shapes, types, threads and ISA variants: every result within its bound, every row independent of its company.

Derandomised: the examples are the same in every run. To search further, raise max_examples below and derandomize=False.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_runtime.kernels.cpu.backend import NOT_BUILT, CPUBackend
from nvfp4_runtime.kernels.ops import ActivationSpec, LinearSpec, NormSpec, PagedAttentionSpec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight
from tests.kernels.conftest import (
    ISAS,
    Sequence,
    cpu_backend,
    make_batch,
    random_cache,
    random_nvfp4,
    random_tensor,
    same_bits,
)
from tests.kernels.numerics import DTYPES, INPUT_SCALE, NUMERICS, spec, worst_excess

pytestmark = pytest.mark.skipif(not ISAS, reason=NOT_BUILT)

fixed = settings(max_examples=60, deadline=None, derandomize=True, database=None)
BACKENDS: dict[tuple[str, int], CPUBackend] = {}

sizes = st.integers(1, 40) | st.integers(1, 150)
blocks = st.integers(1, 13) | st.integers(1, 60)
isas, threads = st.sampled_from(ISAS or ["none"]), st.integers(1, 3)
dtypes = st.sampled_from(sorted(DTYPES))


def backend_of(isa: str, count: int) -> CPUBackend:
    """One per ISA and thread count: what is tested is the kernels, not the start of threads."""
    if (isa, count) not in BACKENDS:
        BACKENDS[isa, count] = cpu_backend(isa, count)
    return BACKENDS[isa, count]


@st.composite
def linears(draw: st.DrawFn) -> tuple[NVFP4Weight, str, Tensor]:
    """An NVFP4 weight, a numerics, and activations for them, magnitudes of rows far apart."""
    m, n, k = draw(sizes), draw(sizes), 16 * draw(blocks)
    seed = draw(st.integers(0, 2**16))
    cut = draw(st.integers(0, n))
    groups = (cut, n - cut) if 0 < cut < n else None
    weight = random_nvfp4(n, k, seed=seed, groups=groups, bias=draw(st.booleans()), input_scale=INPUT_SCALE)
    scales = torch.tensor(draw(st.lists(st.sampled_from([1.0, 0.0, 1e-3, 300.0, 1e-38, 1e20]), min_size=m, max_size=m)))
    x = (random_tensor(m, k, seed=seed + 1, dtype=torch.float32) * scales.unsqueeze(1)).to(DTYPES[draw(dtypes)])
    return weight, draw(st.sampled_from(sorted(NUMERICS))), x


def run_linear(backend: CPUBackend, weight: NVFP4Weight, numerics: str, x: Tensor, out: Any = "float32") -> Tensor:
    dtype = "bfloat16" if x.dtype == torch.bfloat16 else "float32"
    return backend.linear(weight, spec(weight, numerics, dtype, out))(x)


@fixed
@given(case=linears(), isa=isas, count=threads, out=dtypes)
def test_any_nvfp4_linear_is_within_its_bound(
    case: tuple[NVFP4Weight, str, Tensor], isa: str, count: int, out: str
) -> None:
    weight, numerics, x = case
    y = run_linear(backend_of(isa, count), weight, numerics, x, out)
    assert worst_excess(y, x, weight, numerics) <= 0


@fixed
@given(case=linears(), isa=isas, first=threads, second=threads, data=st.data())
def test_any_rows_of_any_nvfp4_linear_have_the_same_bits_in_other_company(
    case: tuple[NVFP4Weight, str, Tensor], isa: str, first: int, second: int, data: st.DataObject
) -> None:
    weight, numerics, x = case
    whole = run_linear(backend_of(isa, first), weight, numerics, x)
    rows = data.draw(st.lists(st.integers(0, len(x) - 1), min_size=1, max_size=40))
    again = run_linear(backend_of(isa, second), weight, numerics, x[rows])
    assert same_bits(again, whole[rows])


@fixed
@given(case=linears(), isa=isas, count=threads, data=st.data())
def test_any_columns_of_any_nvfp4_linear_have_the_same_bits_alone(
    case: tuple[NVFP4Weight, str, Tensor], isa: str, count: int, data: st.DataObject
) -> None:
    """A layer cut by rows of its weight, as fused and unfused layers are."""
    weight, numerics, x = case
    start = data.draw(st.integers(0, weight.n - 1))
    part = dataclasses.replace(
        weight,
        packed=weight.packed[start:],
        block_scale=weight.block_scale[start:],
        weight_scale_2=weight.row_scale_2()[start:].clone(),
        group_rows=(1,) * (weight.n - start),
        bias=None if weight.bias is None else weight.bias[start:],
    )
    backend = backend_of(isa, count)
    whole = run_linear(backend, weight, numerics, x)
    assert same_bits(run_linear(backend, part, numerics, x), whole[:, start:].contiguous())


@fixed
@given(
    m=sizes, n=sizes, k=st.integers(1, 200), isa=isas, first=threads, second=threads, dtype=dtypes,
    wtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), data=st.data(),
)  # fmt: skip
def test_any_plain_linear_is_within_its_bound_and_its_rows_stand_alone(
    m: int, n: int, k: int, isa: str, first: int, second: int, dtype: Any, wtype: torch.dtype, data: st.DataObject
) -> None:
    weight = DenseWeight(random_tensor(n, k, seed=n + k, dtype=wtype))
    x = random_tensor(m, k, seed=m, dtype=DTYPES[dtype])
    linear = LinearSpec(n, k, weight.format, None, dtype, "float32")  # type: ignore[arg-type]  # format is a name
    y = backend_of(isa, first).linear(weight, linear)(x)
    exact = x.double() @ weight.weight.double().t()
    # NativeLinearDense: K/16 + 6 roundings, one at the end; 2^-126: vdpbf16ps drops subnormal products
    room = (k / 16 + 7) * 2.0**-24 * (x.double().abs() @ weight.weight.double().abs().t()) + k * 2.0**-126
    assert bool(((y.double() - exact).abs() <= room).all())
    rows = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=40))
    assert same_bits(backend_of(isa, second).linear(weight, linear)(x[rows]), y[rows])


@fixed
@given(m=sizes, width=sizes, isa=isas, first=threads, second=threads, dtype=dtypes, out=dtypes, data=st.data())
def test_any_row_of_norm_and_activation_stands_alone(
    m: int, width: int, isa: str, first: int, second: int, dtype: Any, out: Any, data: st.DataObject
) -> None:
    x, residual = (random_tensor(m, 2 * width, seed=s, dtype=DTYPES[dtype]) for s in (1, 2))
    weight = random_tensor(2 * width, seed=3)
    rows = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=20))
    results = []
    for count, picked in ((first, list(range(m))), (second, rows)):
        backend = backend_of(isa, count)
        norm = backend.rms_norm(NormSpec(2 * width, dtype, out))
        normed, total = norm(x[picked], residual[picked].clone(), weight, 1e-5)
        results.append((normed, total, backend.silu_mul(ActivationSpec(width, dtype, out))(x[picked])))
    assert all(same_bits(part, whole[rows]) for whole, part in zip(*results, strict=True))


@fixed
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5), isa=isas, first=threads, second=threads,
    group=st.integers(1, 5), head_dim=st.sampled_from([8, 16, 24, 40, 64]), block_size=st.sampled_from([1, 3, 16, 32]),
    window=st.none() | st.integers(1, 200), kv=st.sampled_from(["bfloat16", "float32", "fp8"]), dtype=dtypes,
    data=st.data(),
)  # fmt: skip
def test_any_query_of_any_ragged_batch_stands_alone(
    lengths: list[int], isa: str, first: int, second: int, group: int, head_dim: int, block_size: int,
    window: int | None, kv: Any, dtype: Any, data: st.DataObject,
) -> None:  # fmt: skip
    """Each sequence in a batch of its own, its new tokens cut in two, gives the bits of the whole batch."""
    new = [data.draw(st.integers(1, length)) for length in lengths]
    num_blocks = sum(-(-length // block_size) for length in lengths) + 1
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}
    cache = random_cache(num_blocks, 2, block_size, head_dim, seed=1, dtype=types[kv])
    batch = make_batch([Sequence(a, b) for a, b in zip(lengths, new, strict=True)], block_size, num_blocks)
    q = random_tensor(sum(new), 2 * group, head_dim, seed=2, dtype=DTYPES[dtype])
    attention = PagedAttentionSpec(2 * group, 2, head_dim, window, kv, dtype, "float32")
    whole = backend_of(isa, first).paged_attention(attention)(q, cache, batch, 0.2)
    assert bool(whole.isfinite().all())
    b = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = int(batch.cu_seqlens_q[b]), int(batch.cu_seqlens_q[b + 1])
    cut = data.draw(st.integers(start, stop))
    for low, high in ((start, cut), (cut, stop)):
        alone = dataclasses.replace(
            batch,
            block_tables=batch.block_tables[b : b + 1],
            seq_lens=batch.seq_lens[b : b + 1] - (stop - high),
            cu_seqlens_q=torch.tensor([0, high - low], dtype=torch.int32),
        )
        if low < high:
            y = backend_of(isa, second).paged_attention(attention)(q[low:high], cache, alone, 0.2)
            assert same_bits(y, whole[low:high])
