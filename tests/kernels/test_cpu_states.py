"""Native latent attention and Mamba-2 against FP64 and the reference; alone and together; hostile tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import Mamba2Spec, Mamba2Weights, MLASpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import cpu_backend, random_tensor, same_bits
from tests.kernels.guarded import guarded, survives
from tests.kernels.triton.test_mla import exact, inputs

LENGTHS = [1, 4, 31, 32, 33, 70, 0]
SHAPES = [(3, 24, 8), (8, 32, 16), (17, 64, 16), (2, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")])
def test_latent_attention_agrees_with_fp64(isa: str, shape: tuple[int, int, int], dtype: Any, out: Any) -> None:
    spec = MLASpec(*shape, dtype, out)
    given = inputs(spec, LENGTHS)
    q_nope, q_rope, cache, tables, lens = given
    expected, magnitudes = exact(spec, (q_nope[:-1], q_rope[:-1], cache, tables[:-1], lens[:-1]), 0.2)
    found = cpu_backend(isa).mla_decode(spec)(*given, 0.2)
    assert not found[-1].any(), "a filler's row is zeros"
    # one rounding of the result; FP32 sums of at most 70 keys and 67 dimensions, in another order than FP64's
    allowed = magnitudes * ((2.0**-8 if out == "bfloat16" else 0.0) + 1e-5) + 1e-6
    assert ((found[:-1].double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_one_result_in_any_company_and_on_any_number_of_threads(isa: str, threads: int) -> None:
    spec = MLASpec(17, 64, 16, "bfloat16", "float32")
    q_nope, q_rope, cache, tables, lens = inputs(spec, LENGTHS)
    together = cpu_backend(isa).mla_decode(spec)(q_nope, q_rope, cache, tables, lens, 0.2)
    kernel = cpu_backend(isa, threads).mla_decode(spec)
    for b in range(len(LENGTHS)):
        row = slice(b, b + 1)
        alone = kernel(q_nope[row], q_rope[row], cache, tables[row].contiguous(), lens[row], 0.2)
        assert same_bits(alone, together[row])


@pytest.mark.parametrize("side", ["end", "start"])
def test_latent_attention_stays_inside_its_tensors(side: Any) -> None:
    spec = MLASpec(3, 7, 3, "bfloat16", "bfloat16")
    q_nope, q_rope, cache, tables, lens = inputs(spec, [5, 70])
    kernel = cpu_backend().mla_decode(spec)
    parts = [guarded(part, side) for part in (q_nope, q_rope, cache.nan_to_num(), tables, lens)]
    expected = kernel(q_nope, q_rope, cache.nan_to_num(), tables, lens, 0.2)
    assert survives(lambda: same_bits(kernel(*parts, 0.2), expected)) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_lens": torch.tensor([281], dtype=torch.int32)}, "seq_lens\\[0\\] is 281"),
        ({"seq_lens": torch.tensor([-1], dtype=torch.int32)}, "seq_lens\\[0\\] is -1"),
        ({"seq_lens": torch.tensor([3])}, "seq_lens: expected"),
        ({"tables": torch.full((1, 70), 10**6, dtype=torch.int32)}, "block_tables\\[0, 0\\] is 1000000"),
        ({"tables": torch.full((1, 70), -1, dtype=torch.int32)}, "block_tables\\[0, 0\\] is -1"),
        ({"cache": torch.zeros(4, 4, 9)}, "cache: expected"),
    ],
)
def test_latent_attention_refuses_what_points_outside(change: dict[str, Tensor], words: str) -> None:
    spec = MLASpec(3, 24, 8, "bfloat16", "bfloat16")
    q_nope, q_rope, cache, tables, lens = inputs(spec, [70])
    given = {"cache": cache, "tables": tables, "seq_lens": lens} | change
    with pytest.raises((KernelError, IndexError), match=words):
        cpu_backend().mla_decode(spec)(q_nope, q_rope, given["cache"], given["tables"], given["seq_lens"], 1.0)


MAMBA = [
    Mamba2Spec(8, 16, 16, 2, 4, "float32", "bfloat16"),
    Mamba2Spec(6, 5, 7, 3, 2, "bfloat16", "float32"),
    Mamba2Spec(4, 64, 40, 1, 4, "float32", "float32"),
]


def weights_of(spec: Mamba2Spec) -> Mamba2Weights:
    return Mamba2Weights(
        conv_weight=random_tensor(spec.conv_dim, spec.conv_width, seed=1, dtype=torch.float32),
        conv_bias=random_tensor(spec.conv_dim, seed=2, dtype=torch.float32),
        a=-random_tensor(spec.num_heads, seed=3, dtype=torch.float32).abs() - 0.1,
        dt_bias=random_tensor(spec.num_heads, seed=4, dtype=torch.float32),
        d=random_tensor(spec.num_heads, seed=5, dtype=torch.float32),
        norm=1 + random_tensor(spec.inner, seed=6, dtype=torch.float32) / 4,
        min_step=0.001,
        eps=1e-5,
    )


def empty_state(spec: Mamba2Spec, slots: int = 6) -> StateLayer:
    """Whatever was there before must not matter to a sequence that begins."""
    conv = torch.full((slots, spec.conv_width - 1, spec.conv_dim), 7.0)
    return StateLayer(conv, torch.full((slots, spec.num_heads, spec.head_dim, spec.state_size), 7.0))


def step_of(pieces: list[tuple[int, int, int]]) -> ForwardBatch:
    """(slot, first position, tokens) of each sequence."""
    bounds, positions = [0], []
    for _, first, count in pieces:
        positions += range(first, first + count)
        bounds.append(len(positions))
    none = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        input_ids=none,
        positions=torch.tensor(positions),
        slot_mapping=none,
        block_tables=none,
        seq_lens=none,
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32),
        logits_rows=none,
        kv=(),
        state_slots=torch.tensor([slot for slot, _, _ in pieces]),
    )


def tokens(spec: Mamba2Spec, count: int, seed: int) -> Tensor:
    return random_tensor(count, sum(spec.widths), seed=seed, dtype=getattr(torch, spec.dtype))


@pytest.mark.parametrize("spec", MAMBA, ids=str)
def test_mamba2_agrees_with_the_reference_and_leaves_its_states(isa: str, spec: Mamba2Spec) -> None:
    """Ragged sequences, then one more token each. FP32 sums of up to 64 terms: 1e-5 of the largest; a rounding."""
    weights = weights_of(spec)
    states = [empty_state(spec), empty_state(spec)]
    kernels = [cpu_backend(isa).mamba2(spec), ReferenceBackend().mamba2(spec)]
    rounding = 2.0**-8 if spec.out_dtype == "bfloat16" else 0.0
    for pieces, seed in (([(1, 0, 9), (4, 0, 1), (2, 0, 33)], 1), ([(2, 33, 1), (1, 9, 1), (4, 1, 5)], 2)):
        given = tokens(spec, sum(count for _, _, count in pieces), seed)
        found, want = (k(given, weights, s, step_of(pieces)) for k, s in zip(kernels, states, strict=True))
        assert found.dtype == getattr(torch, spec.out_dtype)
        assert want.abs().max() > 0.1
        close = {"rtol": rounding + 2e-5, "atol": 2e-5 * float(want.abs().max())}
        torch.testing.assert_close(found, want, **close)
        torch.testing.assert_close(states[0].conv, states[1].conv, rtol=0, atol=0)
        size = float(states[1].ssm.abs().max())
        torch.testing.assert_close(states[0].ssm, states[1].ssm, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("spec", MAMBA, ids=str)
def test_how_a_prompt_is_cut_and_who_runs_beside_it_changes_no_bit(isa: str, spec: Mamba2Spec) -> None:
    weights, given = weights_of(spec), tokens(spec, 40, 9)
    whole_state, cut_state = empty_state(spec), empty_state(spec)
    whole = cpu_backend(isa).mamba2(spec)(given, weights, whole_state, step_of([(3, 0, 40)]))
    kernel, parts, at = cpu_backend(isa, threads=3).mamba2(spec), [], 0
    for count in (1, 17, 2, 1, 19):
        together = torch.cat([tokens(spec, 3, at), given[at : at + count]])
        parts.append(kernel(together, weights, cut_state, step_of([(1, 0, 3), (3, at, count)]))[3:])
        at += count
    assert same_bits(torch.cat(parts), whole)
    assert same_bits(cut_state.ssm[3], whole_state.ssm[3])
    assert same_bits(cut_state.conv[3], whole_state.conv[3])


@pytest.mark.parametrize("side", ["end", "start"])
def test_mamba2_stays_inside_its_tensors(side: Any) -> None:
    spec = MAMBA[1]
    plain, state = weights_of(spec), empty_state(spec)
    names = ("conv_weight", "conv_bias", "a", "dt_bias", "d", "norm")
    vectors = {name: guarded(getattr(plain, name), side) for name in names}
    weights = Mamba2Weights(**vectors, min_step=0.001, eps=1e-5)
    beside = StateLayer(guarded(state.conv, side), guarded(state.ssm, side))
    kernel, batch = cpu_backend().mamba2(spec), step_of([(5, 0, 4), (0, 3, 1)])
    expected = kernel(tokens(spec, 5, 1), plain, state, batch)
    given = guarded(tokens(spec, 5, 1), side)
    assert survives(lambda: same_bits(kernel(given, weights, beside, batch), expected)) == ""


@pytest.mark.parametrize(
    ("pieces", "words"),
    [([(6, 0, 2)], "state_slots\\[0\\] is 6; there are 6"), ([(-1, 0, 2)], "state_slots\\[0\\] is -1")],
)
def test_mamba2_refuses_slots_that_are_not_there(pieces: list[tuple[int, int, int]], words: str) -> None:
    spec = MAMBA[0]
    with pytest.raises(IndexError, match=words):
        cpu_backend().mamba2(spec)(tokens(spec, 2, 1), weights_of(spec), empty_state(spec), step_of(pieces))


def test_mamba2_refuses_tensors_of_other_shapes_and_batches_without_slots() -> None:
    spec = MAMBA[0]
    kernel, weights, state = cpu_backend().mamba2(spec), weights_of(spec), empty_state(spec)
    given = tokens(spec, 2, 1)
    batch = step_of([(1, 0, 2)])
    with pytest.raises(KernelError, match="projected: expected"):
        kernel(given[:, :-1], weights, state, batch)
    with pytest.raises(KernelError, match="projected"):
        kernel(given.to(torch.bfloat16), weights, state, batch)
    with pytest.raises(KernelError, match="norm: expected"):
        kernel(given, replace(weights, norm=weights.norm[1:]), state, batch)
    with pytest.raises(KernelError, match=r"state\.ssm: expected"):
        kernel(given, weights, StateLayer(state.conv, state.ssm[:, 1:].contiguous()), batch)
    with pytest.raises(KernelError, match="cu_seqlens_q runs to 2; the input has 1"):
        kernel(given[:1], weights, state, ForwardBatch(**{**batch.__dict__, "positions": batch.positions[:1]}))
    with pytest.raises(KernelError, match="needs batch"):
        kernel(given, weights, state, ForwardBatch(**{**batch.__dict__, "state_slots": None}))
