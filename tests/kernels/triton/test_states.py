"""Mamba-2, the gated delta rule and relu(x)^2 on Triton against the reference and FP64; cut, in company, hostile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights, Mamba2Spec, Mamba2Weights, ReluSquaredSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton.backend import MOST_STATE, TritonBackend
from tests.kernels import test_cpu_delta as delta
from tests.kernels import test_cpu_states as mamba
from tests.kernels.conftest import random_tensor, same_bits
from tests.kernels.guarded import guarded, survives

REFERENCE = ReferenceBackend()
MAMBA = [
    Mamba2Spec(4, 16, 16, 2, 4, "float32", "bfloat16"),
    Mamba2Spec(6, 5, 7, 3, 2, "bfloat16", "float32"),
    Mamba2Spec(2, 80, 40, 1, 4, "bfloat16", "bfloat16"),  # 32 of a head's rows in a program, the last one not full
]
DELTA = [
    DeltaSpec(1, 2, 16, 24, 4, "float32"),
    DeltaSpec(3, 3, 7, 5, 2, "bfloat16"),
    DeltaSpec(1, 2, 128, 32, 4, "float32"),  # two programs a head
]
Pieces = list[tuple[int, int, int]]  # (slot, first position, tokens)


def step_of(pieces: Pieces) -> ForwardBatch:
    return replace(mamba.step_of(pieces), max_query_len=max(count for _, _, count in pieces))


def moved(backend: TritonBackend, batch: ForwardBatch) -> ForwardBatch:
    names = ("positions", "cu_seqlens_q", "state_slots")
    return replace(batch, **{name: getattr(batch, name).to(backend.device) for name in names})


class Rule:
    """One of the two recurrences: `run` gives its result on the CPU; `state` is left as the step leaves it.

    weights, tokens and empty states are those of the CPU's tests.
    """

    def __init__(self, spec: Mamba2Spec | DeltaSpec) -> None:
        self.spec = spec
        self.made: Any = mamba if isinstance(spec, Mamba2Spec) else delta
        self.weights: Mamba2Weights | DeltaWeights = self.made.weights_of(spec)

    def tokens(self, count: int, seed: int) -> tuple[Tensor, ...]:
        made = self.made.tokens(self.spec, count, seed)
        return (made,) if isinstance(made, Tensor) else made

    def state(self, backend: TritonBackend | ReferenceBackend) -> StateLayer:
        made, device = self.made.empty_state(self.spec), backend.device
        return StateLayer(made.conv.to(device), made.ssm.to(device))

    def run(
        self, backend: TritonBackend | ReferenceBackend, given: tuple[Tensor, ...], state: StateLayer, pieces: Pieces
    ) -> Tensor:
        spec, batch, weights = self.spec, step_of(pieces), self.weights
        if isinstance(backend, TritonBackend):
            batch, device = moved(backend, batch), backend.device
            given = tuple(part.to(device) for part in given)
            tensors = {name: v.to(device) for name, v in vars(weights).items() if isinstance(v, Tensor)}
            weights = replace(weights, **{name: v for name, v in tensors.items() if name != "taps"})
        kernel: Any = backend.mamba2(spec) if isinstance(spec, Mamba2Spec) else backend.gated_delta(spec)
        result: Tensor = kernel(*given, weights, state, batch)
        return result.cpu()


RULES = [Rule(spec) for spec in (*MAMBA, *DELTA)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.spec))


@rules
def test_a_prompt_and_the_steps_after_it_are_the_reference_s(triton_backend: TritonBackend, rule: Rule) -> None:
    """Ragged prompts, longer than a program's tokens and shorter than the convolution; one more token each, where
    another sequence begins; parts of prompts and single tokens together."""
    states = [rule.state(triton_backend), rule.state(REFERENCE)]
    rounding = 2.0**-8 if getattr(rule.spec, "out_dtype", "float32") == "bfloat16" else 0.0
    steps: list[Pieces] = [
        [(1, 0, 3), (4, 0, 1), (2, 0, 18)],
        [(2, 18, 1), (1, 3, 1), (5, 0, 1)],
        [(4, 1, 2), (2, 19, 1), (5, 1, 5)],
    ]
    for seed, pieces in enumerate(steps):
        given = rule.tokens(sum(count for _, _, count in pieces), seed)
        found = rule.run(triton_backend, given, states[0], pieces)
        expected = rule.run(REFERENCE, given, states[1], pieces)
        assert found.dtype == expected.dtype
        assert expected.abs().max() > 0.1
        # FP32 sums of up to 128 terms in another order, and exp to 2 ulps, over 20 tokens: 2e-5 of the largest
        torch.testing.assert_close(found, expected, rtol=rounding + 2e-5, atol=2e-5 * float(expected.abs().max()))
        assert torch.equal(states[0].conv.cpu(), states[1].conv), "copies of inputs"
        size = float(states[1].ssm.abs().max())
        torch.testing.assert_close(states[0].ssm.cpu(), states[1].ssm, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("spec", DELTA, ids=str)
def test_the_delta_rule_agrees_with_fp64(triton_backend: TritonBackend, spec: DeltaSpec) -> None:
    rule = Rule(spec)
    given = delta.tokens(spec, 20, 9)
    exact = delta.slowly(spec, *given, delta.weights_of(spec))
    found = rule.run(triton_backend, given, rule.state(triton_backend), [(3, 0, 20)])
    # as in the CPU's test: FP32 sums of up to 128 terms, carried over 20 tokens
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@rules
def test_how_a_prompt_is_cut_and_who_runs_beside_it_changes_no_bit(triton_backend: TritonBackend, rule: Rule) -> None:
    """Among the cuts single tokens alone, which take the program of decoding steps."""
    given = rule.tokens(24, 9)
    whole_state, cut_state = rule.state(triton_backend), rule.state(triton_backend)
    whole = rule.run(triton_backend, given, whole_state, [(3, 0, 24)])
    parts, at = [], 0
    for count, beside in ((1, 3), (1, 1), (17, 1), (2, 2), (1, 0), (2, 0)):
        together = [torch.cat([a, b[at : at + count]]) for a, b in zip(rule.tokens(beside, at), given, strict=True)]
        pieces: Pieces = [(1, 0, beside)] if beside else []
        parts.append(rule.run(triton_backend, tuple(together), cut_state, [*pieces, (3, at, count)])[beside:])
        at += count
    assert same_bits(torch.cat(parts), whole)
    assert same_bits(cut_state.ssm[3].cpu(), whole_state.ssm[3].cpu())
    assert same_bits(cut_state.conv[3].cpu(), whole_state.conv[3].cpu())


@rules
def test_nothing_of_other_slots_or_other_sequences_is_seen(triton_backend: TritonBackend, rule: Rule) -> None:
    """NaN in every slot, then in a neighbour's tokens; other slots keep what they had."""
    state, clean = rule.state(triton_backend), rule.state(triton_backend)
    state.conv.fill_(torch.nan)
    state.ssm.fill_(torch.nan)
    given = rule.tokens(7, 1)
    pieces: Pieces = [(2, 0, 4), (5, 0, 3)]
    expected = rule.run(triton_backend, given, clean, pieces)
    assert same_bits(rule.run(triton_backend, given, state, pieces), expected)
    assert state.ssm[[0, 1, 3, 4]].isnan().all()
    assert state.conv[[0, 1, 3, 4]].isnan().all()
    poisoned = tuple(torch.cat([torch.full_like(part[:4], torch.nan), part[4:]]) for part in given)
    found = rule.run(triton_backend, poisoned, state, pieces)
    assert found[:4].isnan().all()
    assert same_bits(found[4:], expected[4:])


@rules
@pytest.mark.parametrize("size", [30.0, 1e4], ids=["large", "huge"])
def test_steps_and_gates_at_the_ends_of_their_ranges_are_the_reference_s(
    triton_backend: TritonBackend, rule: Rule, size: float
) -> None:
    """Inputs so large that softplus, decay, sigmoid and SiLU are at one end or the other, and states overflow where the
    reference's do. What is finite is within 2e-5 of the largest magnitude of its row, which the sums cancel from."""
    given = tuple(part * size for part in rule.tokens(9, 2))
    states = [rule.state(triton_backend), rule.state(REFERENCE)]
    found = rule.run(triton_backend, given, states[0], [(2, 0, 9)]).double()
    expected = rule.run(REFERENCE, given, states[1], [(2, 0, 9)]).double()
    assert torch.equal(found.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    rounding = 2.0**-8 if getattr(rule.spec, "out_dtype", "float32") == "bfloat16" else 0.0
    room = 2e-5 * expected.where(finite, 0.0).abs().amax(-1, keepdim=True) + (rounding + 2e-5) * expected.abs()
    assert ((found - expected).abs() <= room)[finite].all()


@rules
@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_is_read_or_written_outside_the_tensors(triton_backend: TritonBackend, rule: Rule, side: Any) -> None:
    if not triton_backend.interpreted:
        pytest.skip("guard pages are host memory")
    plain, pieces = rule.state(triton_backend), [(5, 0, 4), (0, 3, 1)]
    given = rule.tokens(5, 1)
    expected = rule.run(triton_backend, given, plain, pieces)
    state = rule.state(triton_backend)
    beside = StateLayer(guarded(state.conv, side), guarded(state.ssm, side))
    tensors = {name: v for name, v in vars(rule.weights).items() if isinstance(v, Tensor) and name != "taps"}
    apart = Rule(rule.spec)
    apart.weights = replace(rule.weights, **{name: guarded(v, side) for name, v in tensors.items()})
    parts = tuple(guarded(part, side) for part in given)
    assert survives(lambda: same_bits(apart.run(triton_backend, parts, beside, pieces), expected)) == ""


def test_softplus_keeps_what_is_lost_beside_1(triton_backend: TritonBackend) -> None:
    """Steps of exp(-20), 2e-9: a state of one token is step * x B, relative to which 1e-5 is allowed."""
    rule = RULES[0]
    assert isinstance(rule.weights, Mamba2Weights)
    small = Rule(rule.spec)
    small.weights = replace(rule.weights, min_step=0.0)
    given = rule.tokens(1, 3)
    given[0][:, -rule.spec.num_heads :] = -20.0 - torch.arange(rule.spec.num_heads)
    states = [rule.state(triton_backend), rule.state(REFERENCE)]
    for backend, state in zip((triton_backend, REFERENCE), states, strict=True):
        small.run(backend, given, state, [(2, 0, 1)])
    expected = states[1].ssm[2]
    assert 0 < expected.abs().max() < 1e-7
    torch.testing.assert_close(states[0].ssm[2].cpu(), expected, rtol=1e-5, atol=0)


def test_an_empty_step_gives_nothing_and_wrong_tensors_are_refused(triton_backend: TritonBackend) -> None:
    for rule in (RULES[0], RULES[3]):
        given, state, pieces = rule.tokens(2, 1), rule.state(triton_backend), [(1, 0, 2)]
        with pytest.raises(KernelError, match="expected contiguous"):
            rule.run(triton_backend, tuple(part[:, :-1] for part in given), state, pieces)
        with pytest.raises(KernelError, match="expected contiguous"):
            rule.run(triton_backend, tuple(part.to(torch.float16) for part in given), state, pieces)
        with pytest.raises(KernelError, match=r"state\.ssm: expected"):
            rule.run(triton_backend, given, StateLayer(state.conv, state.ssm[:, 1:].contiguous()), pieces)
        with pytest.raises(KernelError, match=r"state\.conv: expected"):
            rule.run(triton_backend, given, StateLayer(state.conv.to(torch.bfloat16), state.ssm), pieces)
        kernel: Any = triton_backend.mamba2 if isinstance(rule.spec, Mamba2Spec) else triton_backend.gated_delta
        batch = moved(triton_backend, step_of(pieces))
        placed = [part.to(triton_backend.device) for part in given]
        with pytest.raises(KernelError, match="needs batch"):
            kernel(rule.spec)(*placed, rule.weights, state, replace(batch, state_slots=None))
        with pytest.raises(KernelError, match="2 bounds for 2 state_slots"):
            kernel(rule.spec)(*placed, rule.weights, state, replace(batch, state_slots=torch.tensor([1, 2])))
        empty = [part[:0] for part in placed]
        assert kernel(rule.spec)(*empty, rule.weights, state, batch).shape[0] == 0


def test_shapes_no_program_can_hold_are_refused_by_the_spec(triton_backend: TritonBackend) -> None:
    assert "do not divide" in str(triton_backend.refuses(DeltaSpec(3, 4, 16, 16, 4, "float32")))
    assert "do not divide" in str(triton_backend.refuses(Mamba2Spec(3, 4, 16, 2, 4, "float32", "float32")))
    assert "key_dim is at most" in str(triton_backend.refuses(DeltaSpec(2, 4, 2 * MOST_STATE, 16, 4, "float32")))
    assert "results are" in str(triton_backend.refuses(Mamba2Spec(4, 4, 16, 2, 4, "float32", "float16")))


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize(("rows", "width"), [(3, 48), (2, 1100)])
def test_relu_squared_is_the_reference_s_to_the_bit(triton_backend, dtype, out, rows, width):
    """Products and roundings, nothing else."""
    spec = ReluSquaredSpec(width, dtype, out)
    x = random_tensor(rows, width, seed=1, dtype=getattr(torch, dtype)) * 4
    x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3e38, 1e-30])
    found = triton_backend.relu_squared(spec)(x.to(triton_backend.device)).cpu()
    expected = REFERENCE.relu_squared(spec)(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.nan_to_num(), expected.nan_to_num())
    assert triton_backend.relu_squared(spec)(x[:0].to(triton_backend.device)).shape == (0, width)
    with pytest.raises(KernelError, match=f"rows of {width}"):
        triton_backend.relu_squared(spec)(x[:, 1:].contiguous().to(triton_backend.device))
