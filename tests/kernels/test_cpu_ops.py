"""Native norm, activation and rotary embedding against FP64 expressions and the reference; rows alone and together."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import KVLayer
from nvfp4_runtime.config import Gate
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import ActivationSpec, Backend, NormSpec, PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import (
    Sequence,
    cpu_backend,
    make_batch,
    random_cache,
    random_tensor,
    same_bits,
    skip_if_refused,
)

NAMES: dict[torch.dtype, Any] = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "fp8",
}
# one rounding to the result's type, on top of FP32 arithmetic whose error is far below it (bf16) or a few ulp (fp32)
RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
DTYPES = [torch.bfloat16, torch.float32]


def assert_close(y: Tensor, exact: Tensor, scale: Tensor | float = 0.0) -> None:
    """Within one rounding of `exact` (fp64); `scale` adds 2^-22 of the size of cancelling terms."""
    room = RELATIVE[y.dtype] * exact.abs() + 2.0**-22 * scale
    worst = ((y.double() - exact).abs() - room).max()
    assert worst <= 0, f"off by {float(worst)} more than the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 40, 576, 1001])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("wtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_agrees_with_fp64(
    isa: str, dtype: torch.dtype, width: int, with_residual: bool, wtype: torch.dtype
) -> None:
    x, weight = random_tensor(9, width, seed=1, dtype=dtype), random_tensor(width, seed=2, dtype=wtype)
    residual = random_tensor(9, width, seed=3, dtype=dtype) if with_residual else None
    total = x if residual is None else (x.float() + residual.float()).to(dtype)
    normed, carried = cpu_backend(isa).rms_norm(NormSpec(width, NAMES[dtype], NAMES[dtype]))(x, residual, weight, 1e-5)
    assert same_bits(carried, total)
    wide = total.double()
    assert_close(normed, weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1536])
def test_silu_mul_agrees_with_fp64(isa: str, dtype: torch.dtype, width: int) -> None:
    x = random_tensor(5, 2 * width, seed=1, dtype=dtype) * 6
    gate, up = x.double().chunk(2, dim=-1)
    y = cpu_backend(isa).silu_mul(ActivationSpec(width, NAMES[dtype], NAMES[dtype]))(x)
    assert_close(y, gate / (1 + (-gate).exp()) * up)


GATES = [Gate("gelu_tanh"), Gate("clamped", 1.702, 1.0)]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.form)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_gates_agree_with_fp64(isa: str, dtype: torch.dtype, gate: Gate) -> None:
    x = random_tensor(5, 2 * 33, seed=1, dtype=dtype) * 2
    spec = ActivationSpec(33, NAMES[dtype], NAMES[dtype], gate)
    g, up = x.double().chunk(2, dim=-1)
    if gate.form == "gelu_tanh":
        exact = torch.nn.functional.gelu(g, approximate="tanh") * up
    else:
        g, up = g.clamp(max=1.0), up.clamp(-1.0, 1.0)
        exact = g * torch.sigmoid(1.702 * g) * (up + 1)
    for y in (cpu_backend(isa).silu_mul(spec)(x), ReferenceBackend().silu_mul(spec)(x)):
        assert_close(y, exact, scale=g.abs() * up.abs())  # 1 + tanh cancels in the reference


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.form)
def test_other_gates_at_the_ends_of_their_range_are_finite_and_nan_stays_nan(isa: str, gate: Gate) -> None:
    x = torch.tensor([[-1e30, -100.0, 100.0, float("nan"), 1.0, 2.0, 2.0, 2.0, 2.0, float("nan")]])
    y = cpu_backend(isa).silu_mul(ActivationSpec(5, "float32", "float32", gate))(x)[0]
    assert y[:2].tolist() == [0, 0]
    assert bool(y[2].isfinite())
    assert bool(y[3:].isnan().all())


def test_silu_at_the_ends_of_its_range_is_zero_or_the_gate(isa: str) -> None:
    gate = torch.tensor([-1e4, -104.0, -90.0, -88.0, -0.0, 0.0, 88.0, 90.0, 1e4, torch.nan])
    x = torch.cat([gate, torch.ones(10)]).unsqueeze(0)
    y = cpu_backend(isa).silu_mul(ActivationSpec(10, "float32", "float32"))(x)[0]
    wide = gate.double()
    exact = wide / (1 + (-wide).exp())
    assert bool(y[-1].isnan())
    # e^x is good to 2 ulp; beyond 2^128 it is infinity and the result 0, which is right to float32's smallest normal
    assert bool(((y - exact)[:-1].abs() <= 2.0**-21 * exact[:-1].abs() + 2.0**-120).all())


def test_exp_is_within_two_ulp_over_its_whole_range(isa: str) -> None:
    """Seen through silu: for a gate of -x it is -x / (1 + e^x), so it carries the relative error of e^x."""
    gate = -torch.linspace(0.01, 87.0, 40000)
    x = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    y = cpu_backend(isa).silu_mul(ActivationSpec(40000, "float32", "float32"))(x)[0]
    wide = gate.double()
    exact = wide / (1 + (-wide).exp())
    error = ((y.double() - exact) / exact).abs().max()
    # two roundings (1 +, /) of half an ulp (2^-24) each, and e^x: 2 ulp of 2^-23. The portable variant multiplies and
    # adds in two roundings; its argument reduction loses up to half an ulp of x more: 87 * 2^-24
    bound = 2 * 2.0**-24 + 2 * 2.0**-23 + (0 if isa != "portable" else 87 * 2.0**-24)
    assert error <= bound


def tables(rotary_dim: int, positions: int = 64) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(rotary_dim // 2) * 2 / max(rotary_dim, 1))
    return angle.cos().float(), angle.sin().float()


def rope_call(backend: Any, spec: RopeSpec, qkv: Tensor, kv: KVLayer, positions: Tensor, slots: Tensor) -> Tensor:
    cos, sin = tables(spec.rotary_dim)
    norms = [random_tensor(spec.head_dim, seed=s) if spec.qk_norm else None for s in (5, 6)]
    return backend.rope_and_cache(spec)(qkv, positions, cos, sin, *norms, 1e-6, kv, slots)  # type: ignore[no-any-return]  # Any in


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (32, 16), (80, 80), (24, 20), (16, 0), (128, 128)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_agrees_with_the_reference(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, rotary_dim: int, qk_norm: bool
) -> None:
    spec = RopeSpec(4, 2, head_dim, rotary_dim, qk_norm, NAMES[kv_dtype], NAMES[dtype])
    qkv = random_tensor(7, 8 * head_dim, seed=1, dtype=dtype)
    positions, slots = torch.arange(20, 27), torch.tensor([3, 17, 18, 40, 41, 0, 63])
    ours, theirs = (random_cache(4, 2, 16, head_dim, seed=7, dtype=kv_dtype) for _ in range(2))
    q = rope_call(cpu_backend(isa), spec, qkv, ours, positions, slots)
    want = rope_call(ReferenceBackend(), spec, qkv, theirs, positions, slots)
    assert_close(q, want.double(), scale=8.0)
    for a, b in ((ours.k, theirs.k), (ours.v, theirs.v)):
        # half a step of the stored type where FP32 results straddle a tie: bf16 2^-8, e4m3 2^-3 of the value
        step = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20, torch.float8_e4m3fn: 2.0**-3}[kv_dtype]
        difference = (a.float() - b.float()).abs()
        assert bool((difference <= step * b.float().abs() + 2.0**-20).all())
        assert bool((difference == 0).float().mean() > 0.99) or kv_dtype == torch.float32
    assert same_bits(ours.v, theirs.v)  # values only pass through


def test_fp8_cache_saturates_and_keeps_nan(isa: str) -> None:
    spec = RopeSpec(1, 1, 16, 0, False, "fp8", "float32")
    special = torch.tensor(
        [
            0.0,
            -0.0,
            500.0,
            -1e9,
            torch.inf,
            -torch.inf,
            torch.nan,
            448.0,
            464.0,
            2.0**-9,
            2.0**-10,
            3 * 2.0**-10,
            0.0146,
        ]
    )
    special = torch.cat([special, torch.tensor([0.0175, 17.0, 19.0])])
    qkv = torch.cat([torch.zeros(16), torch.linspace(-2, 2, 16), special]).unsqueeze(0)
    kv = KVLayer(*(torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn) for _ in range(2)))
    rope_call(cpu_backend(isa), spec, qkv, kv, torch.tensor([0]), torch.tensor([2]))
    want = special.clamp(-448, 448).to(torch.float8_e4m3fn)
    got = kv.v[0, 0, 2]
    assert bool(got[6].float().isnan())
    keep = torch.arange(16) != 6
    assert torch.equal(got.view(torch.uint8)[keep], want.view(torch.uint8)[keep])


def test_every_float32_rounds_to_fp8_as_torch_does(isa: str) -> None:
    values = torch.cat([random_tensor(4096, seed=s, dtype=torch.float32) * 2.0**e for s, e in enumerate(range(-12, 9))])
    midpoints = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (midpoints[1:] + midpoints[:-1]) / 2
    below, above = midpoints.nextafter(torch.tensor(-1e9)), midpoints.nextafter(torch.tensor(1e9))
    values = torch.cat([values, midpoints, below, above, -midpoints])
    values = torch.cat([values, torch.zeros(-len(values) % 16)]).view(-1, 16)
    rows = len(values)
    qkv = torch.cat([torch.zeros(rows, 32), values], dim=1)
    kv = KVLayer(*(torch.zeros(rows, 1, 1, 16, dtype=torch.float8_e4m3fn) for _ in range(2)))
    spec = RopeSpec(1, 1, 16, 0, False, "fp8", "float32")
    rope_call(cpu_backend(isa), spec, qkv, kv, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    want = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(kv.v.flatten().view(torch.uint8), want.flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_alone_and_together(isa: str, dtype: torch.dtype) -> None:
    rows, width = 600, 72
    x, residual = (random_tensor(rows, width, seed=s, dtype=dtype) for s in (1, 2))
    weight = random_tensor(width, seed=3)
    backends = [cpu_backend(isa, t) for t in (1, 2, 3)]
    norms = [
        b.rms_norm(NormSpec(width, NAMES[dtype], NAMES[dtype]))(x, residual.clone(), weight, 1e-5)[0] for b in backends
    ]
    acts = [b.silu_mul(ActivationSpec(width // 2, NAMES[dtype], NAMES[dtype]))(x) for b in backends]
    norm = backends[0].rms_norm(NormSpec(width, NAMES[dtype], NAMES[dtype]))
    act = backends[0].silu_mul(ActivationSpec(width // 2, NAMES[dtype], NAMES[dtype]))
    alone = torch.cat([norm(x[i : i + 1], residual[i : i + 1].clone(), weight, 1e-5)[0] for i in range(rows)])
    assert all(same_bits(n, alone) for n in norms)
    alone = torch.cat([act(x[i : i + 1]) for i in range(rows)])
    assert all(same_bits(a, alone) for a in acts)


def test_a_value_has_the_same_bits_in_every_lane(isa: str) -> None:
    """Width 1 to 33: the last column is a tail of every length, and always computed as in a full vector."""
    backend = cpu_backend(isa)
    gate, up = random_tensor(1, 33, seed=1, dtype=torch.float32), random_tensor(1, 33, seed=2, dtype=torch.float32)
    whole = backend.silu_mul(ActivationSpec(33, "float32", "float32"))(torch.cat([gate, up], dim=1))
    for i in range(33):
        for width in range(i + 1, 34):
            x = torch.cat([gate[:, :width], up[:, :width]], dim=1)
            assert same_bits(backend.silu_mul(ActivationSpec(width, "float32", "float32"))(x)[:, i], whole[:, i])


def test_slots_and_positions_outside_are_refused() -> None:
    spec = RopeSpec(2, 1, 16, 16, False, "bfloat16", "bfloat16")
    qkv, one = random_tensor(1, 64, seed=1), torch.tensor([1])
    kv = random_cache(2, 1, 16, 16, seed=1)
    with pytest.raises(IndexError, match=r"slot_mapping\[0\] is 32; the cache has slots 0 to 31"):
        rope_call(cpu_backend(), spec, qkv, kv, one, torch.tensor([32]))
    with pytest.raises(IndexError, match=r"slot_mapping\[0\] is -1"):
        rope_call(cpu_backend(), spec, qkv, kv, one, torch.tensor([-1]))
    with pytest.raises(IndexError, match=r"positions\[0\] is 64; the cos and sin tables hold 64 positions"):
        rope_call(cpu_backend(), spec, qkv, kv, torch.tensor([64]), one)


def test_wrong_tensors_are_refused() -> None:
    backend = cpu_backend()
    norm = backend.rms_norm(NormSpec(32, "bfloat16", "bfloat16"))
    x, weight = random_tensor(4, 32, seed=1), random_tensor(32, seed=2)
    with pytest.raises(KernelError, match="x has 4 rows and its residual 3"):
        norm(x, x[:3], weight, 1e-5)
    with pytest.raises(KernelError, match="weight: expected"):
        norm(x, None, weight.double(), 1e-5)
    with pytest.raises(KernelError, match="gate_up: expected"):
        backend.silu_mul(ActivationSpec(16, "bfloat16", "bfloat16"))(random_tensor(4, 64, seed=1)[:, ::2])
    spec = RopeSpec(2, 1, 16, 16, False, "bfloat16", "bfloat16")
    qkv, one = random_tensor(1, 64, seed=1), torch.tensor([1])
    kv, wide = random_cache(2, 1, 16, 16, seed=1), random_cache(2, 1, 16, 16, seed=1, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"kv.k: expected a contiguous torch.bfloat16"):
        rope_call(backend, spec, qkv, wide, one, one)
    rope = backend.rope_and_cache(RopeSpec(2, 1, 16, 16, True, "bfloat16", "bfloat16"))
    cos, sin = tables(16)
    with pytest.raises(KernelError, match="qk_norm=True"):
        rope(qkv, one, cos, sin, None, None, 1e-6, kv, one)


def test_two_python_threads_may_share_one_backend() -> None:
    backend = cpu_backend(threads=2)
    act = backend.silu_mul(ActivationSpec(64, "float32", "float32"))
    inputs = [random_tensor(400, 128, seed=s, dtype=torch.float32) for s in range(4)]
    want = [act(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not same_bits(act(inputs[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    backend = cpu_backend(threads=3)
    act = backend.silu_mul(ActivationSpec(64, "float32", "float32"))
    x = random_tensor(2000, 128, seed=1, dtype=torch.float32)
    want = act(x).numpy().tobytes()  # bytes, because torch's own OpenMP threads do not survive a fork
    child = os.fork()
    if child == 0:
        os._exit(0 if all(act(x).numpy().tobytes() == want for _ in range(3)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert act(x).numpy().tobytes() == want


def test_a_narrow_result_is_the_wide_one_rounded_once(backend: Backend) -> None:
    """float32 in and bfloat16 out, as the model runs them: one rounding of what float32 out gives."""
    skip_if_refused(backend, NormSpec(50, "float32", "bfloat16"))
    x, residual = (random_tensor(5, 50, seed=i, dtype=torch.float32) for i in (1, 2))
    weight = random_tensor(50, seed=3)
    wide, total = backend.rms_norm(NormSpec(50, "float32", "float32"))(x, residual.clone(), weight, 1e-5)
    narrow, same_total = backend.rms_norm(NormSpec(50, "float32", "bfloat16"))(x, residual.clone(), weight, 1e-5)
    assert same_bits(narrow, wide.to(torch.bfloat16))
    assert same_bits(total, same_total)
    assert total.dtype == torch.float32

    wide = backend.silu_mul(ActivationSpec(25, "float32", "float32"))(x)
    assert same_bits(backend.silu_mul(ActivationSpec(25, "float32", "bfloat16"))(x), wide.to(torch.bfloat16))

    batch = make_batch([Sequence(length=40, new=3), Sequence(length=17, new=1)], block_size=16, num_blocks=8)
    # BF16 on either side may multiply queries as BF16, so over a BF16 cache BF16 queries are compared
    kv, q = random_cache(8, 2, 16, 16, seed=5), random_tensor(4, 4, 16, seed=4)
    wide = backend.paged_attention(PagedAttentionSpec(4, 2, 16, None, "bfloat16", "bfloat16", "float32"))(
        q, kv, batch, 0.25
    )
    narrow_spec = PagedAttentionSpec(4, 2, 16, None, "bfloat16", "float32", "bfloat16")
    assert same_bits(backend.paged_attention(narrow_spec)(q.float(), kv, batch, 0.25), wide.to(torch.bfloat16))
    kv, q = random_cache(8, 2, 16, 16, seed=5, dtype=torch.float32), random_tensor(4, 4, 16, seed=4).float()
    wide_spec = PagedAttentionSpec(4, 2, 16, None, "float32", "float32", "float32")
    narrow_spec = PagedAttentionSpec(4, 2, 16, None, "float32", "float32", "bfloat16")
    wide = backend.paged_attention(wide_spec)(q, kv, batch, 0.25)
    assert same_bits(backend.paged_attention(narrow_spec)(q, kv, batch, 0.25), wide.to(torch.bfloat16))
