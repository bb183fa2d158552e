"""What nobody should hand to a kernel, and what nobody expects: the right result or a clear error, never a crash.

The first half runs every op with each of its tensors beside a forbidden page (see guarded.py): reading or writing one
byte too many ends the child process. The second half hands over shapes, strides, types, addresses and indices that lie.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.backend import CPUBackend
from nvfp4_runtime.kernels.ops import ActivationSpec, LinearSpec, NormSpec, OpSpec, PagedAttentionSpec, RopeSpec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight
from tests.kernels.conftest import (
    Sequence,
    cpu_backend,
    make_batch,
    random_cache,
    random_nvfp4,
    random_tensor,
    same_bits,
)
from tests.kernels.guarded import (
    Side,
    guarded,
    guarded_batch,
    guarded_empty,
    guarded_kv,
    guarded_results,
    guarded_weight,
    survives,
)
from tests.kernels.numerics import DTYPES, INPUT_SCALE, NUMERICS, spec, worst_excess

SIDES: list[Side] = ["end", "start"]
NAMES: dict[torch.dtype, Any] = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "fp8",
    torch.uint8: "nvfp4",
}


# ---- no byte beyond the tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("reach", [0, 1])
def test_a_guarded_tensor_ends_the_process_one_byte_too_far(side: Side, reach: int) -> None:
    """The guard itself: the last byte may be touched, the next may not."""
    tensor = guarded_empty((5, 3), torch.bfloat16, side)
    address = tensor.data_ptr() + (tensor.nbytes - 1 + reach if side == "end" else -reach)

    def touch() -> bool:
        faulthandler.disable()  # this death is meant
        return ctypes.string_at(address, 1) is not None

    outcome = survives(touch)
    assert ("SIGSEGV" in outcome) == bool(reach), outcome


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_linear_touches_its_own_memory_only(isa: str, side: Side, numerics: str, dtype: str) -> None:
    backend = cpu_backend(isa)

    def every_shape() -> bool:
        for m, n, k in [(1, 16, 16), (3, 1, 48), (5, 17, 80), (18, 31, 208)]:
            weight = random_nvfp4(
                n, k, seed=n, groups=(1, n - 1) if n > 1 else None, bias=True, input_scale=INPUT_SCALE
            )
            x = random_tensor(m, k, seed=k, dtype=DTYPES[dtype])
            for out_dtype in DTYPES:
                want = backend.linear(weight, spec(weight, numerics, dtype, out_dtype))(x)
                kernel = backend.linear(guarded_weight(weight, side), spec(weight, numerics, dtype, out_dtype))
                with guarded_results(side):
                    y = kernel(guarded(x, side))
                if not same_bits(y, want):
                    return False
        return True

    assert survives(every_shape) == ""


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("wtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_linear_touches_its_own_memory_only(isa: str, side: Side, wtype: torch.dtype, dtype: str) -> None:
    backend = cpu_backend(isa)

    def every_shape() -> bool:
        for m, n, k in [(1, 1, 1), (2, 7, 33), (9, 17, 64), (20, 19, 101)]:
            weight = DenseWeight(random_tensor(n, k, seed=n, dtype=wtype), random_tensor(n, seed=3))
            x = random_tensor(m, k, seed=k, dtype=DTYPES[dtype])
            for out_dtype in DTYPES:
                linear = LinearSpec(n, k, weight.format, None, dtype, out_dtype)  # type: ignore[arg-type]  # names
                want = backend.linear(weight, linear)(x)
                kernel = backend.linear(guarded_weight(weight, side), linear)
                with guarded_results(side):
                    y = kernel(guarded(x, side))
                if not same_bits(y, want):
                    return False
        return True

    assert survives(every_shape) == ""


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_activation_touch_their_own_memory_only(isa: str, side: Side, dtype: Any) -> None:
    backend = cpu_backend(isa)

    def every_width() -> bool:
        for width in (1, 15, 16, 17, 40, 131):
            x, residual = (random_tensor(3, width, seed=s, dtype=DTYPES[dtype]) for s in (1, 2))
            both = torch.cat([x, residual], dim=1)
            for out_dtype in ("bfloat16", "float32"):
                for wtype in (torch.bfloat16, torch.float16, torch.float32):
                    weight = random_tensor(width, seed=4, dtype=wtype)
                    norm = backend.rms_norm(NormSpec(width, dtype, out_dtype))  # type: ignore[arg-type]  # names
                    want, total = norm(x, residual.clone(), weight, 1e-5)
                    with guarded_results(side):
                        y, carried = norm(guarded(x, side), guarded(residual, side), guarded(weight, side), 1e-5)
                        if not (same_bits(y, want) and same_bits(carried, total)):
                            return False
                        if not same_bits(norm(guarded(x, side), None, weight, 1e-5)[0], norm(x, None, weight, 1e-5)[0]):
                            return False
                silu = backend.silu_mul(ActivationSpec(width, dtype, out_dtype))  # type: ignore[arg-type]
                want = silu(both)
                with guarded_results(side):
                    if not same_bits(silu(guarded(both, side)), want):
                        return False
        return True

    assert survives(every_width) == ""


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "block_size"), [(24, 20, 5), (16, 2, 5), (80, 80, 5), (7, 6, 5), (64, 64, 5), (64, 2, 4)]
)
def test_rope_and_attention_touch_their_own_memory_only(
    isa: str, side: Side, kv_dtype: torch.dtype, head_dim: int, rotary_dim: int, block_size: int
) -> None:
    if kv_dtype == torch.uint8 and head_dim % 16:
        pytest.skip("an nvfp4 cache needs a head_dim divisible by 16")
    backend, kv_name = cpu_backend(isa), NAMES[kv_dtype]
    sequences = [Sequence(1, 1), Sequence(40, 3), Sequence(75, 70), Sequence(21, 1)]
    num_blocks = sum(-(-s.length // block_size) for s in sequences) + 1  # the last one is in use
    batch = make_batch(sequences, block_size, num_blocks, seed=1)
    tokens = int(batch.cu_seqlens_q[-1])
    angle = random_tensor(75, rotary_dim // 2, seed=3, dtype=torch.float32)

    def work() -> bool:
        for dtype in DTYPES:
            kv = random_cache(num_blocks, 2, block_size, head_dim, seed=2, dtype=kv_dtype)
            qkv = random_tensor(tokens, 8 * head_dim, seed=4, dtype=DTYPES[dtype])
            norms = [random_tensor(head_dim, seed=s) for s in (5, 6)]
            rope_spec = RopeSpec(4, 2, head_dim, rotary_dim, True, kv_name, dtype)  # type: ignore[arg-type]  # a name
            attention_spec = PagedAttentionSpec(4, 2, head_dim, None, kv_name, dtype, dtype)  # type: ignore[arg-type]
            safe_kv, safe_batch = guarded_kv(kv, side), guarded_batch(batch, side)
            rope = backend.rope_and_cache(rope_spec)
            want_q = rope(qkv, batch.positions, angle.cos(), angle.sin(), *norms, 1e-6, kv, batch.slot_mapping)
            want = backend.paged_attention(attention_spec)(want_q, kv, batch, 0.2)
            with guarded_results(side):
                tables = [guarded(t, side) for t in (angle.cos(), angle.sin())]
                safe_norms = [guarded(t, side) for t in norms]
                at, slots = safe_batch.positions, safe_batch.slot_mapping
                rope = backend.rope_and_cache(rope_spec)
                q = rope(guarded(qkv, side), at, *tables, *safe_norms, 1e-6, safe_kv, slots)
                y = backend.paged_attention(attention_spec)(q, safe_kv, safe_batch, 0.2)
            pairs = [(q, want_q), (safe_kv.k, kv.k), (safe_kv.v, kv.v), (y, want)]
            if not all(same_bits(a, b) for a, b in pairs):
                return False
        return True

    assert survives(work) == ""


# ---- strange values and shapes: the right result --------------------------------------------------------------------


def strange_rows(k: int, dtype: torch.dtype) -> Tensor:
    """One kind of trouble per row, ordinary rows between."""
    normal = random_tensor(12, k, seed=k, dtype=torch.float32)
    rows = normal.clone()
    rows[1], rows[2] = 0.0, -0.0
    rows[3] *= 1e30
    rows[4] *= 1e-30
    rows[5] *= 1e-42  # subnormal
    rows[6, k // 2] = torch.nan
    rows[7, 0] = torch.inf
    rows[8, -1] = -torch.inf
    rows[9, ::2] = 0.0
    rows[9, 1] = 3e38 / 2**40
    rows[10, k - 1] = 1e-38
    return rows.to(dtype)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (15, 48), (17, 80), (33, 144), (16, 208)])
def test_strange_activations_give_the_right_rows(isa: str, numerics: str, dtype: str, n: int, k: int) -> None:
    weight = random_nvfp4(n, k, seed=n, bias=True, input_scale=INPUT_SCALE)
    kernel = cpu_backend(isa).linear(weight, spec(weight, numerics, dtype))
    x = strange_rows(k, DTYPES[dtype])
    y = kernel(x)
    assert worst_excess(y, x, weight, numerics) <= 0
    ordinary = [0, 11]
    assert same_bits(y[ordinary], kernel(x[ordinary]))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_multipliers_and_biases_that_are_not_finite_spoil_their_own_outputs_only(isa: str, numerics: str) -> None:
    weight = random_nvfp4(40, 48, seed=1, groups=(8, 24, 8), bias=True, input_scale=INPUT_SCALE)
    kernel = cpu_backend(isa).linear(weight, spec(weight, numerics))
    x = random_tensor(5, 48, seed=2)
    clean = kernel(x)
    assert weight.bias is not None
    scale, bias = weight.weight_scale_2.clone(), weight.bias.clone()
    scale[1], bias[35] = torch.nan, torch.inf
    broken = dataclasses.replace(weight, weight_scale_2=scale, bias=bias)
    y = cpu_backend(isa).linear(broken, spec(broken, numerics))(x)
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[8:32], spoilt[35] = True, True
    assert not bool(y[:, spoilt].isfinite().any())
    assert same_bits(y[:, ~spoilt].contiguous(), clean[:, ~spoilt].contiguous())


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_views_at_odd_offsets_give_the_same_bits(isa: str, numerics: str, offset: int) -> None:
    """Addresses of x, codes, scales and weights that are multiples of their element's size and of nothing more."""
    weight = random_nvfp4(17, 80, seed=1, bias=True, input_scale=INPUT_SCALE)
    plain = DenseWeight(random_tensor(17, 80, seed=2), weight.bias)

    def moved(t: Tensor) -> Tensor:
        flat = torch.zeros(t.numel() + offset, dtype=t.dtype)
        view = flat[offset:].view(t.shape)
        view.view(torch.uint8).copy_(t.view(torch.uint8))
        return view

    for dtype in DTYPES:
        x = random_tensor(6, 80, seed=4, dtype=DTYPES[dtype])
        backend = cpu_backend(isa)
        shifted = dataclasses.replace(
            weight,
            packed=moved(weight.packed),
            block_scale=moved(weight.block_scale),
            bias=moved(weight.bias),  # type: ignore[arg-type]  # has a bias
        )
        want = backend.linear(weight, spec(weight, numerics, dtype))(x)
        assert same_bits(backend.linear(shifted, spec(weight, numerics, dtype))(moved(x)), want)
        dense = LinearSpec(17, 80, "bf16", None, dtype, "float32")  # type: ignore[arg-type]  # a name
        shifted_plain = DenseWeight(moved(plain.weight), plain.bias)
        assert same_bits(backend.linear(shifted_plain, dense)(moved(x)), backend.linear(plain, dense)(x))


def test_no_rows_are_fine_in_every_op(isa: str) -> None:
    backend = cpu_backend(isa)
    for numerics in NUMERICS:
        weight = random_nvfp4(17, 48, seed=1, input_scale=INPUT_SCALE)
        assert backend.linear(weight, spec(weight, numerics))(random_tensor(0, 48, seed=1)).shape == (0, 17)
    x = random_tensor(0, 48, seed=1)
    assert backend.rms_norm(NormSpec(48, "bfloat16", "float32"))(x, None, random_tensor(48, seed=2), 1e-5)[0].shape == (
        0,
        48,
    )
    assert backend.silu_mul(ActivationSpec(24, "bfloat16", "float32"))(x).shape == (0, 24)
    nothing = make_batch([Sequence(17, 0)], 16, 4)
    kv = random_cache(4, 1, 16, 16, seed=1)
    attend = backend.paged_attention(PagedAttentionSpec(2, 1, 16, None, "bfloat16", "bfloat16", "float32"))
    assert attend(random_tensor(0, 2, 16, seed=1), kv, nothing, 0.25).shape == (0, 32)


# ---- lies: a clear error --------------------------------------------------------------------------------------------


def memory_of(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of any size whose pages are never touched, so that none is needed."""
    count = 1
    for size in shape:
        count *= size
    reserve_nothing = 0x4000  # MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    except (OSError, ValueError) as e:
        pytest.skip(f"no {count * dtype.itemsize >> 30} GiB of address space here: {e}")
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def test_more_rows_than_csrc_counts_are_refused_before_any_arithmetic() -> None:
    backend, rows = cpu_backend(), 2**30 + 1
    x = memory_of(rows, 16, dtype=torch.bfloat16)
    weight, plain = random_nvfp4(16, 16, seed=1), DenseWeight(random_tensor(16, 16, seed=1))
    calls: list[Callable[[], Any]] = [
        lambda: backend.linear(weight, spec(weight, "w4a16"))(x),
        lambda: backend.linear(plain, LinearSpec(16, 16, "bf16", None, "bfloat16", "float32"))(x),
        lambda: backend.silu_mul(ActivationSpec(8, "bfloat16", "float32"))(x),
        lambda: backend.rms_norm(NormSpec(16, "bfloat16", "float32"))(x, None, random_tensor(16, seed=1), 1e-5),
        lambda: backend.rope_and_cache(RopeSpec(2, 1, 4, 0, False, "bfloat16", "bfloat16"))(
            x,
            *([torch.zeros(1, dtype=torch.int64)] * 3),
            None,
            None,
            1e-5,
            random_cache(1, 1, 1, 4, seed=1),
            x,  # type: ignore[arg-type]
        ),
        lambda: backend.paged_attention(PagedAttentionSpec(2, 1, 8, None, "bfloat16", "bfloat16", "bfloat16"))(
            x.view(rows, 2, 8), random_cache(1, 1, 1, 8, seed=1), make_batch([Sequence(1, 1)], 1, 2), 1.0
        ),
    ]
    for call in calls:
        with pytest.raises(KernelError, match="found 1073741825 rows, expected at most 1073741824"):
            call()


HUGE = 2**30 + 64
IMPOSSIBLE: list[OpSpec] = [
    LinearSpec(0, 16, "nvfp4", "w4a16", "bfloat16", "float32"),
    LinearSpec(HUGE, 16, "bf16", None, "bfloat16", "float32"),
    LinearSpec(16, HUGE, "bf16", None, "bfloat16", "float32"),
    LinearSpec(16, 0, "fp32", None, "bfloat16", "float32"),
    NormSpec(0, "bfloat16", "float32"),
    NormSpec(HUGE, "bfloat16", "float32"),
    ActivationSpec(0, "bfloat16", "float32"),
    ActivationSpec(HUGE // 2, "bfloat16", "float32"),
    RopeSpec(0, 1, 64, 64, False, "bfloat16", "bfloat16"),
    RopeSpec(4, 0, 64, 64, False, "bfloat16", "bfloat16"),
    RopeSpec(4, 2, -64, 0, False, "bfloat16", "bfloat16"),
    RopeSpec(HUGE // 64, 1, 64, 64, False, "bfloat16", "bfloat16"),
    PagedAttentionSpec(4, 0, 64, None, "bfloat16", "bfloat16", "bfloat16"),
    PagedAttentionSpec(HUGE // 64, 1, 64, None, "bfloat16", "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_sizes_that_cannot_be_are_refused_by_the_spec(impossible: OpSpec) -> None:
    reason = cpu_backend().refuses(impossible)
    assert reason is not None
    assert "is between 1 and 1073741824" in reason


def odd_address(t: Tensor) -> Tensor:
    """The same values one byte past where an element may lie, as a mapped file can give them."""
    memory = bytearray(t.nbytes + 1)
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=1).view(torch.uint8)
    copy.copy_(t.contiguous().view(torch.uint8).flatten())
    result = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)
    return result if result.data_ptr() % t.element_size() else odd_address_shifted(t)


def odd_address_shifted(t: Tensor) -> Tensor:
    """For an allocator that gave the bytearray itself an odd start."""
    memory = bytearray(t.nbytes + 2)
    torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=2).copy_(
        t.contiguous().view(torch.uint8).flatten()
    )
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=2).view(t.shape)


def test_weights_at_impossible_addresses_are_moved_and_activations_there_refused(isa: str) -> None:
    backend = cpu_backend(isa)
    x = random_tensor(3, 33, seed=1, dtype=torch.float32)
    for wtype in (torch.bfloat16, torch.float16, torch.float32):
        plain = DenseWeight(random_tensor(5, 33, seed=2, dtype=wtype), random_tensor(5, seed=3, dtype=torch.float32))
        linear = LinearSpec(5, 33, plain.format, None, "float32", "float32")  # type: ignore[arg-type]  # a name
        kernel = backend.linear(plain, linear)
        assert plain.bias is not None
        moved = backend.linear(DenseWeight(odd_address(plain.weight), odd_address(plain.bias)), linear)
        assert same_bits(moved(x), kernel(x))
        with pytest.raises(KernelError, match="not a multiple of its element size, expected a multiple of 4; clone"):
            kernel(odd_address(x))


def lying_calls() -> dict[str, Callable[[CPUBackend], Any]]:
    """name -> a call that must be refused. Block tables, lengths and slots first: what they point at is memory."""
    kv, q = random_cache(8, 1, 16, 32, seed=1), random_tensor(2, 2, 32, seed=1)
    good = make_batch([Sequence(20, 2)], 16, 8)
    ints = torch.int32

    def attend(changed: dict[str, Tensor], cache: KVLayer = kv, query: Tensor = q) -> Callable[[CPUBackend], Any]:
        batch: ForwardBatch = dataclasses.replace(good, **changed)
        attention = PagedAttentionSpec(2, 1, 32, None, "bfloat16", "bfloat16", "bfloat16")
        return lambda backend: backend.paged_attention(attention)(query, cache, batch, 0.2)

    def rope(**changed: Tensor | KVLayer) -> Callable[[CPUBackend], Any]:
        arguments: dict[str, Any] = {
            "qkv": random_tensor(1, 64, seed=1), "positions": torch.tensor([1]), "cos": torch.ones(8, 8),
            "sin": torch.ones(8, 8), "q_norm": None, "k_norm": None, "eps": 1e-6,
            "kv": random_cache(2, 1, 16, 16, seed=1), "slot_mapping": torch.tensor([1]),
        }  # fmt: skip
        arguments |= changed
        rotate = RopeSpec(2, 1, 16, 16, False, "bfloat16", "bfloat16")
        return lambda backend: backend.rope_and_cache(rotate)(**arguments)

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> Callable[[CPUBackend], Any]:
        return lambda backend: backend.rms_norm(NormSpec(32, "bfloat16", "bfloat16"))(x, residual, weight, 1e-5)

    def dense(weight: Tensor, bias: Tensor | None) -> Callable[[CPUBackend], Any]:
        linear = LinearSpec(4, 32, "bf16", None, "bfloat16", "bfloat16")
        return lambda backend: backend.linear(DenseWeight(weight, bias), linear)(random_tensor(2, 32, seed=1))

    def nvfp4(weight: NVFP4Weight) -> Callable[[CPUBackend], Any]:
        return lambda backend: backend.linear(weight, spec(weight, "w4a16"))

    x, weight = random_tensor(4, 32, seed=1), random_tensor(32, seed=2)
    packed = random_nvfp4(16, 32, seed=1, bias=True)
    nan_scale = random_nvfp4(16, 32, seed=1)
    nan_scale.block_scale.view(torch.uint8)[15, 1] = 0xFF
    empty_cache = KVLayer(
        torch.zeros(8, 1, 0, 32, dtype=torch.bfloat16), torch.zeros(8, 1, 0, 32, dtype=torch.bfloat16)
    )
    return {
        "a length of 2^31 - 1": attend({"seq_lens": torch.tensor([2**31 - 1], dtype=ints)}),
        "a negative length": attend({"seq_lens": torch.tensor([-1], dtype=ints)}),
        "a negative block id": attend({"block_tables": torch.tensor([[1, -1]], dtype=ints)}),
        "the smallest block id there is": attend({"block_tables": torch.tensor([[-(2**31), 1]], dtype=ints)}),
        "a block id past the cache": attend({"block_tables": torch.tensor([[1, 8]], dtype=ints)}),
        "no block table columns": attend({"block_tables": torch.zeros(1, 0, dtype=ints)}),
        "fewer block tables than sequences": attend({"block_tables": torch.zeros(0, 2, dtype=ints)}),
        "bounds that start late": attend({"cu_seqlens_q": torch.tensor([1, 2], dtype=ints)}),
        "bounds that end late": attend({"cu_seqlens_q": torch.tensor([0, 2**31 - 1], dtype=ints)}),
        "bounds that run backwards": attend(
            {
                "cu_seqlens_q": torch.tensor([0, 5, 2], dtype=ints),
                "seq_lens": torch.tensor([20, 20], dtype=ints),
                "block_tables": torch.tensor([[1, 2], [3, 4]], dtype=ints),
            }
        ),
        "bounds whose difference overflows": attend(
            {
                "cu_seqlens_q": torch.tensor([0, -(2**31), 2], dtype=ints),
                "seq_lens": torch.tensor([20, 2**31 - 1], dtype=ints),
                "block_tables": torch.tensor([[1, 2], [3, 4]], dtype=ints),
            }
        ),
        "bounds whose difference overflows into tokens": attend(
            {
                "cu_seqlens_q": torch.tensor([0, 5, -(2**31), 2], dtype=ints),
                "seq_lens": torch.tensor([20, 2**31 - 1, 20], dtype=ints),
                "block_tables": torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=ints),
            }
        ),
        "64-bit lengths": attend({"seq_lens": torch.tensor([20])}),
        "a transposed block table": attend({"block_tables": torch.tensor([[1], [2]], dtype=ints).t()[:, ::2]}),
        "a cache of blocks without tokens": attend({}, cache=empty_cache),
        "a cache of another type": attend({}, cache=random_cache(8, 1, 16, 32, seed=1, dtype=torch.float32)),
        "keys and values of different shapes": attend({}, cache=KVLayer(kv.k, kv.v[:4])),
        "a strided cache": attend({}, cache=KVLayer(kv.k[:, :, ::2], kv.v[:, :, ::2])),
        "queries of another width": attend({}, query=random_tensor(2, 2, 16, seed=1)),
        "a slot past the cache": rope(slot_mapping=torch.tensor([32])),
        "the largest slot there is": rope(slot_mapping=torch.tensor([2**63 - 1])),
        "the smallest slot there is": rope(slot_mapping=torch.tensor([-(2**63)])),
        "a position past the tables": rope(positions=torch.tensor([8])),
        "the smallest position there is": rope(positions=torch.tensor([-(2**63)])),
        "32-bit slots": rope(slot_mapping=torch.tensor([1], dtype=ints)),
        "more positions than tokens": rope(positions=torch.tensor([1, 2])),
        "tables of another width": rope(cos=torch.ones(8, 7)),
        "a cos and a sin of different lengths": rope(sin=torch.ones(7, 8)),
        "norm weights where none belong": rope(q_norm=torch.ones(16), k_norm=torch.ones(16)),
        "a rope cache without tokens": rope(kv=KVLayer(*[torch.zeros(0, 1, 16, 16, dtype=torch.bfloat16)] * 2)),
        "a residual of another type": norm(x, x.float(), weight),
        "a residual of another length": norm(x, x[:3], weight),
        "a strided residual": norm(x, random_tensor(8, 32, seed=1)[::2], weight),
        "a narrow norm weight": norm(x, None, weight[:31]),
        "a strided norm weight": norm(x, None, random_tensor(64, seed=1)[::2]),
        "a norm weight of integers": norm(x, None, torch.ones(32, dtype=torch.int32)),
        "a short bias": dense(random_tensor(4, 32, seed=1), random_tensor(3, seed=1)),
        "a bias with two axes": dense(random_tensor(4, 32, seed=1), random_tensor(4, 1, seed=1)),
        "a short bias of packed rows": nvfp4(dataclasses.replace(packed, bias=random_tensor(15, seed=1))),
        "a NaN block scale": nvfp4(nan_scale),
    }


@pytest.mark.parametrize("name", lying_calls())
def test_a_lie_is_refused_with_an_error_that_says_what_was_found(name: str) -> None:
    call, backend = lying_calls()[name], cpu_backend()

    def refused() -> bool:
        try:
            call(backend)
        except (KernelError, IndexError) as e:
            return len(str(e)) > 20
        return False

    # in a child first: the price of a check that is missing may be the process
    assert survives(refused) == "", "not refused"
    with pytest.raises((KernelError, IndexError)):
        call(backend)


@pytest.mark.parametrize("case", ["reversed", "expanded", "every other row", "columns", "transposed"])
@pytest.mark.parametrize("op", ["nvfp4", "dense", "norm", "silu"])
def test_strided_activations_are_refused_with_their_strides(case: str, op: str) -> None:
    views: dict[str, Callable[[], Tensor]] = {
        "reversed": lambda: random_tensor(32, 4, seed=1).t(),
        "expanded": lambda: random_tensor(1, 32, seed=1).expand(4, 32),
        "every other row": lambda: random_tensor(8, 32, seed=1)[::2],
        "columns": lambda: random_tensor(4, 64, seed=1)[:, 32:],
        "transposed": lambda: random_tensor(4, 32, seed=1).as_strided((4, 32), (1, 4)),
    }
    backend, x, weight = cpu_backend(), views[case](), random_nvfp4(16, 32, seed=1)
    dense = LinearSpec(16, 32, "bf16", None, "bfloat16", "float32")
    calls: dict[str, Callable[[], Any]] = {
        "nvfp4": lambda: backend.linear(weight, spec(weight, "w4a16"))(x),
        "dense": lambda: backend.linear(DenseWeight(random_tensor(16, 32, seed=1)), dense)(x),
        "norm": lambda: backend.rms_norm(NormSpec(32, "bfloat16", "float32"))(x, None, random_tensor(32, seed=1), 1e-5),
        "silu": lambda: backend.silu_mul(ActivationSpec(16, "bfloat16", "float32"))(x),
    }
    with pytest.raises(KernelError, match=r"with strides \[\d+, \d+\] on cpu; convert it before the call"):
        calls[op]()
