"""Log-probabilities and ranks of raw logits, of sampled tokens and of prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvfp4_runtime.sampling.logprobs import likeliest, token_logprob
from nvfp4_runtime.sampling.sampler import prompt_logprobs
from tests.sampling import plain

# float32 exp is good to 4 ulp of 2^-24, and FP64 sums of positives keep relative errors: 4 * 2^-24 = 2.4e-7 in the log.
# The twin starts from the same float32 logits.
TOLERANCE = 2.4e-7


def row_of(seed: int, size: int = 500, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("size", [3, 500, 6000])
def test_logprobs_match_the_plain_twin(k, size):
    row = row_of(k, size)
    expected = plain.logprobs(row)
    order = sorted(range(size), key=lambda t: (-row[t], t))
    for token in (0, size - 1, order[0], order[1]):
        found = token_logprob(row, token, k)
        assert found.token_id == token
        assert found.logprob == pytest.approx(expected[token], abs=TOLERANCE)
        assert order[found.rank - 1] == token
        assert [t for t, _ in found.top] == order[:k]
        assert [p for _, p in found.top] == pytest.approx([expected[t] for t in order[:k]], abs=TOLERANCE)


def test_equal_logits_rank_by_lower_id_first():
    row = np.array([1, 3, 3, 0, 3], dtype=np.float32)
    assert likeliest(row, 4) == [1, 2, 4, 0]
    assert [token_logprob(row, t, 0).rank for t in range(5)] == [4, 1, 2, 5, 3]
    assert likeliest(np.zeros(10_000, dtype=np.float32), 20) == list(range(20))


def test_more_alternatives_than_tokens_gives_all_tokens():
    assert likeliest(np.array([0, 2, 1], dtype=np.float32), 20) == [1, 2, 0]


def test_a_masked_token_has_logprob_minus_infinity_and_the_last_rank():
    row = np.array([-np.inf, 1, 0], dtype=np.float32)
    found = token_logprob(row, 0, 3)
    assert (found.logprob, found.rank) == (-math.inf, 3)
    assert found.top[2] == (0, -math.inf)


def test_huge_logits_do_not_overflow():
    row = np.array([3e38, 3e38, -3e38], dtype=np.float32)
    assert token_logprob(row, 1, 0).logprob == pytest.approx(-math.log(2))


def test_prompt_logprobs_score_each_next_token_and_leave_broken_rows_out():
    logits = torch.from_numpy(np.stack([row_of(i) for i in range(5)]))
    logits[2, 100] = math.nan
    logits[3, 100] = math.inf
    found = prompt_logprobs(logits, [4, 3, 2, 1, 0], 5)
    assert [f is None for f in found] == [False, False, True, True, False]
    assert found[1] == token_logprob(logits[1].numpy(), 3, 5)
    assert found[4] == token_logprob(logits[4].numpy(), 0, 5)
