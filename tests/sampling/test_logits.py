"""logit_bias, min_tokens and penalties against the plain twin."""

from __future__ import annotations

import numpy as np
import pytest

from nvfp4_runtime.sampling.logits import LogitEdits, contenders
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.state import SamplingState
from tests.sampling import plain

V = 300
EOS = (2, 7)


def row_of(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(V) * scale).astype(np.float32)


def edit(row: np.ndarray, state: SamplingState) -> np.ndarray:
    edited = row.copy()
    LogitEdits(state, len(row)).apply(edited, state)
    return edited


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={0: 5.0, 2: -100.0, 299: 100.0}),
        SamplingParams(min_tokens=5, max_tokens=9, stop_token_ids=(11, 12)),
        SamplingParams(min_tokens=4, max_tokens=9, stop_token_ids=(11, 12)),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(repetition_penalty=0.7),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(presence_penalty=-2),
        SamplingParams(frequency_penalty=0.4),
        SamplingParams(
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            logit_bias={10: 3.5, 2: 7.0},
            min_tokens=5,
            max_tokens=9,
        ),
    ],
)
def test_edits_match_the_plain_twin(params):
    row, prompt, output = row_of(0), [10, 20, 20, 30], [20, 40, 40, 40]
    found = edit(row, SamplingState(params, 0, prompt, output, EOS))
    expected = plain.edited(row, params, prompt, output, EOS)
    # Same operations in the same order; frequency and presence are subtracted apart in both, so equal to the bit.
    np.testing.assert_array_equal(found, expected)


def test_bias_comes_before_the_repetition_penalty():
    params = SamplingParams(logit_bias={10: 3.0}, repetition_penalty=2.0)
    row = np.full(V, -1.0, dtype=np.float32)
    assert edit(row, SamplingState(params, 0, [10], []))[10] == 1.0  # (-1 + 3) / 2, not -2 + 3


def test_prompt_tokens_meet_the_repetition_penalty_and_no_other():
    row = np.ones(V, dtype=np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    found = edit(row, SamplingState(params, 0, [5], [6, 6]))
    assert found[5] == 0.5
    assert found[6] == 0.5 - 2 - 1
    assert found[7] == 1


def test_min_tokens_forbids_eos_and_stop_tokens_until_reached_and_not_after():
    params = SamplingParams(min_tokens=2, max_tokens=9, stop_token_ids=(11,), ignore_eos=True)
    row, output = row_of(1), []
    state = SamplingState(params, 0, [1], output, EOS)
    edits = LogitEdits(state, V)
    for count in range(4):
        found = row.copy()
        edits.apply(found, state)
        forbidden = np.flatnonzero(np.isneginf(found)).tolist()
        assert forbidden == ([2, 7, 11] if count < 2 else [])
        output.append(50)


def test_ignore_eos_alone_forbids_nothing():
    row = row_of(2)
    np.testing.assert_array_equal(edit(row, SamplingState(SamplingParams(ignore_eos=True), 0, [1], [], EOS)), row)


def test_an_eos_id_outside_the_vocabulary_is_passed_over():
    params = SamplingParams(min_tokens=1)
    found = edit(row_of(3), SamplingState(params, 0, [1], [], (2, V + 5)))
    assert np.flatnonzero(np.isneginf(found)).tolist() == [2]


def test_counts_kept_over_steps_equal_counts_made_afresh():
    rng = np.random.default_rng(4)
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25)
    prompt, output = rng.integers(0, V, 40).tolist(), []
    state = SamplingState(params, 0, prompt, output)
    edits = LogitEdits(state, V)
    for step in range(120):
        row = row_of(step)
        kept = row.copy()
        edits.apply(kept, state)
        np.testing.assert_array_equal(kept, edit(row, SamplingState(params, 0, prompt, list(output))))
        output.extend(rng.integers(0, V, 1 + step % 3).tolist())  # a step may have passed without this row


def test_a_shortened_output_list_is_our_own_bug_and_stops_at_once():
    output = [1, 2, 3]
    state = SamplingState(SamplingParams(presence_penalty=1), 0, [1], output)
    edits = LogitEdits(state, V)
    edits.apply(row_of(0), state)
    output.clear()
    with pytest.raises(AssertionError, match="taken back"):
        edits.apply(row_of(0), state)


def test_a_repetition_penalty_near_zero_does_not_make_infinities():
    found = edit(np.full(V, 10, dtype=np.float32), SamplingState(SamplingParams(repetition_penalty=1e-40), 0, [3], []))
    assert found[3] == np.finfo(np.float32).max


@pytest.mark.parametrize("size", [1, 5, 127, 128, 1000, 5000])
@pytest.mark.parametrize("k", [1, 3, 20, 700])
@pytest.mark.parametrize("levels", [2, 1000])
def test_contenders_hold_all_of_the_k_largest_and_every_equal_of_the_last(size, k, levels):
    row = np.random.default_rng(size + k).integers(0, levels, size).astype(np.float32)
    k = min(k, size)
    found = contenders(row, k).tolist()
    kth = np.sort(row)[-k]
    assert set(np.flatnonzero(row >= kth).tolist()) <= set(found)
    assert found == sorted(set(found))
