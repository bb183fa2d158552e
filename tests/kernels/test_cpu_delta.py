"""The native gated delta rule against the reference and an FP64 loop; alone and together; hostile tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import cpu_backend, random_tensor, same_bits
from tests.kernels.guarded import guarded, survives
from tests.kernels.test_cpu_states import step_of

SPECS = [
    DeltaSpec(2, 4, 16, 24, 4, "float32"),
    DeltaSpec(3, 3, 7, 5, 2, "bfloat16"),
    DeltaSpec(1, 2, 128, 32, 4, "float32"),
]


def weights_of(spec: DeltaSpec) -> DeltaWeights:
    return DeltaWeights(
        conv_weight=random_tensor(spec.conv_dim, spec.conv_width, seed=1, dtype=torch.float32),
        a=-random_tensor(spec.num_value_heads, seed=3, dtype=torch.float32).abs() - 0.1,
        dt_bias=random_tensor(spec.num_value_heads, seed=4, dtype=torch.float32),
    )


def empty_state(spec: DeltaSpec, slots: int = 6) -> StateLayer:
    """Whatever was there before must not matter to a sequence that begins."""
    conv = torch.full((slots, spec.conv_width - 1, spec.conv_dim), 7.0)
    return StateLayer(conv, torch.full((slots, spec.num_value_heads, spec.value_dim, spec.key_dim), 7.0))


def tokens(spec: DeltaSpec, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, spec.dtype)
    qkv = random_tensor(count, spec.conv_dim, seed=seed, dtype=dtype)
    b, dt = (random_tensor(count, spec.num_value_heads, seed=seed + i, dtype=dtype) for i in (50, 60))
    return qkv, b, dt


def slowly(spec: DeltaSpec, qkv: Tensor, b: Tensor, dt: Tensor, weights: DeltaWeights) -> Tensor:
    """One sequence from its beginning in FP64, as the paper writes the rule."""
    qkv, b, dt = qkv.double(), b.double(), dt.double()
    padded = torch.cat([torch.zeros(spec.conv_width - 1, spec.conv_dim).double(), qkv])
    taps, rows = weights.conv_weight.double(), []
    each = spec.num_value_heads // spec.num_key_heads
    memory = torch.zeros(spec.num_value_heads, spec.key_dim, spec.value_dim).double()
    for t in range(len(qkv)):
        mixed = torch.nn.functional.silu((padded[t : t + spec.conv_width] * taps.t()).sum(0))
        q, k, v = torch.split(mixed, [spec.keys, spec.keys, spec.values])
        q, k = (x.view(-1, spec.key_dim) for x in (q, k))
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        step = torch.nn.functional.softplus(dt[t] + weights.dt_bias.double())
        out = []
        for h in range(spec.num_value_heads):
            key, query, value = k[h // each], q[h // each] * spec.key_dim**-0.5, v.view(-1, spec.value_dim)[h]
            memory[h] *= (step[h] * weights.a[h].double()).exp()
            memory[h] += torch.outer(key, b[t, h].sigmoid() * (value - key @ memory[h]))
            out.append(query @ memory[h])
        rows.append(torch.cat(out))
    return torch.stack(rows)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_rule_agrees_with_fp64_and_the_reference_and_leaves_its_states(isa: str, spec: DeltaSpec) -> None:
    """Relative 1e-5 of the largest value: FP32 sums of up to 128 terms, carried over 40 tokens."""
    weights, given = weights_of(spec), tokens(spec, 40, 9)
    exact = slowly(spec, *given, weights)
    assert exact.abs().max() > 0.1
    room = 1e-5 * float(exact.abs().max())
    states = [empty_state(spec), empty_state(spec)]
    for kernel, state in zip(
        (cpu_backend(isa).gated_delta(spec), ReferenceBackend().gated_delta(spec)), states, strict=True
    ):
        torch.testing.assert_close(
            kernel(*given, weights, state, step_of([(3, 0, 40)])).double(), exact, rtol=0, atol=room
        )
    torch.testing.assert_close(states[0].conv, states[1].conv, rtol=0, atol=0)
    torch.testing.assert_close(states[0].ssm, states[1].ssm, rtol=1e-5, atol=room)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_how_a_prompt_is_cut_and_who_runs_beside_it_changes_no_bit(isa: str, spec: DeltaSpec) -> None:
    weights, given = weights_of(spec), tokens(spec, 40, 9)
    whole_state, cut_state = empty_state(spec), empty_state(spec)
    whole = cpu_backend(isa).gated_delta(spec)(*given, weights, whole_state, step_of([(3, 0, 40)]))
    kernel, parts, at = cpu_backend(isa, threads=3).gated_delta(spec), [], 0
    for count in (1, 17, 2, 1, 19):
        others = tokens(spec, 3, at)
        together = [torch.cat([other, mine[at : at + count]]) for other, mine in zip(others, given, strict=True)]
        parts.append(kernel(*together, weights, cut_state, step_of([(1, 0, 3), (3, at, count)]))[3:])
        at += count
    assert same_bits(torch.cat(parts), whole)
    assert same_bits(cut_state.ssm[3], whole_state.ssm[3])
    assert same_bits(cut_state.conv[3], whole_state.conv[3])


@pytest.mark.parametrize("side", ["end", "start"])
def test_the_kernel_stays_inside_its_tensors(side: Any) -> None:
    spec = SPECS[1]
    plain, state = weights_of(spec), empty_state(spec)
    weights = DeltaWeights(*(guarded(getattr(plain, name), side) for name in ("conv_weight", "a", "dt_bias")))
    beside = StateLayer(guarded(state.conv, side), guarded(state.ssm, side))
    kernel, batch = cpu_backend().gated_delta(spec), step_of([(5, 0, 4), (0, 3, 1)])
    expected = kernel(*tokens(spec, 5, 1), plain, state, batch)
    given = [guarded(part, side) for part in tokens(spec, 5, 1)]
    assert survives(lambda: same_bits(kernel(*given, weights, beside, batch), expected)) == ""


def test_wrong_shapes_slots_and_specs_are_refused() -> None:
    spec = SPECS[0]
    kernel, weights, state = cpu_backend().gated_delta(spec), weights_of(spec), empty_state(spec)
    qkv, b, dt = tokens(spec, 2, 1)
    with pytest.raises(KernelError, match="b: expected"):
        kernel(qkv, b[:, :-1], dt, weights, state, step_of([(1, 0, 2)]))
    with pytest.raises(KernelError, match=r"state\.ssm: expected"):
        kernel(qkv, b, dt, weights, StateLayer(state.conv, state.ssm.mT.contiguous()), step_of([(1, 0, 2)]))
    with pytest.raises(IndexError, match=r"state_slots\[0\] is 6; there are 6"):
        kernel(qkv, b, dt, weights, state, step_of([(6, 0, 2)]))
    batch = step_of([(1, 0, 2)])
    with pytest.raises(KernelError, match="needs batch"):
        kernel(qkv, b, dt, weights, state, ForwardBatch(**{**batch.__dict__, "state_slots": None}))
    assert "do not divide" in str(cpu_backend().refuses(DeltaSpec(3, 4, 16, 16, 4, "float32")))
    assert "key_dim is at most" in str(cpu_backend().refuses(DeltaSpec(2, 4, 1024, 16, 4, "float32")))
