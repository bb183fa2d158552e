"""Temperature, min_p, top_k, top_p and the draw, against exact fractions; the uniform hash; the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.sampling.draw import distances_to, draw, uniform
from nvfp4_runtime.sampling.params import SamplingParams
from tests.sampling import plain


def draw_from(row: np.ndarray, params: SamplingParams, u: float) -> int:
    with np.errstate(over="ignore"):
        return draw(row, row.max(), params, u)


def probs_of(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(-distances_to(row, row.max(), params.temperature))


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 2.0])
def test_relative_probs_are_the_softmax_over_its_maximum(temperature):
    row = (np.random.default_rng(0).standard_normal(1000) * 4).astype(np.float32)
    expected = [math.exp((float(x) - float(row.max())) / temperature) for x in row]
    # The exponent is at most |x - max| / T <= 32 / 0.1 = 320 and carries 3 roundings of 2^-24 each: 320 * 3 * 2^-24
    # = 6e-5 relative in the result. Below 1e-30 float32 leaves its normal range.
    np.testing.assert_allclose(probs_of(row, SamplingParams(temperature=temperature)), expected, rtol=6e-5, atol=1e-30)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_a_vanishing_temperature_leaves_the_largest_logit(temperature):
    row = np.array([1, 3, 2, 2.9, -np.inf, 0], dtype=np.float32)
    assert {draw_from(row, SamplingParams(temperature=temperature), u) for u in (0.0, 0.5, 1 - 2**-53)} == {1}


logit_rows = st.one_of(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60),
    st.lists(st.sampled_from([0.0, 1.0, 1.5, -4.0, -np.inf]), min_size=1, max_size=60).map(lambda xs: [*xs, 0.5]),
)
filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.3, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 40, 100_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
)
points = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53]))


@settings(max_examples=400, deadline=None)
@given(logit_rows, filters, points)
def test_a_filtered_token_never_appears(values, params, u):
    row = np.array(values, dtype=np.float32)
    probs = probs_of(row, params)
    token = draw_from(row, params, u)
    allowed = plain.kept(row, probs, params)
    if token not in allowed:
        # Fractions know no rounding. Only a token whose prefix ends within FP64 rounding of top_p may differ.
        before_top_p = plain.kept(row, probs, SamplingParams(top_k=params.top_k, min_p=params.min_p))
        mass = sum(float(probs[t]) for t in before_top_p)
        prefix = sum(float(probs[t]) for t in allowed)
        assert abs(prefix - params.top_p * mass) <= 100 * 2**-53 * mass
        assert token == before_top_p[len(allowed)]
    assert probs[token] > 0


@pytest.mark.parametrize("size", [1, 2, 100, 129, 3000])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=1),
        SamplingParams(top_k=17),
        SamplingParams(top_k=10**9),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.01),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.7, top_k=23, top_p=0.8, min_p=0.02),
    ],
)
def test_draws_match_exact_fractions(size, scale, params):
    rng = np.random.default_rng(size)
    row = (rng.standard_normal(size) * scale).astype(np.float32)
    probs = probs_of(row, params)
    for u in rng.random(10):
        assert draw_from(row, params, float(u)) == plain.drawn(row, probs, params, float(u))


@pytest.mark.parametrize(("params", "num_kept"), [(SamplingParams(top_k=3), 3), (SamplingParams(top_p=0.25), 100)])
def test_equal_tokens_are_kept_lowest_id_first(params, num_kept):
    row = np.zeros(400, dtype=np.float32)
    found = {draw_from(row, params, u) for u in np.linspace(0, 1 - 1e-9, 2000)}
    assert found == set(range(num_kept))


def test_all_of_the_mass_on_one_token_draws_it():
    row = np.full(1000, -np.inf, dtype=np.float32)
    row[777] = -5
    for params in (SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.5), SamplingParams(min_p=1)):
        assert {draw_from(row, params, u) for u in (0.0, 0.3, 1 - 2**-53)} == {777}


def test_the_largest_and_smallest_floats_draw():
    big = np.finfo(np.float32).max
    row = np.array([-big, big, 0, -big], dtype=np.float32)
    assert draw_from(row, SamplingParams(temperature=2), 0.9) == 1


def test_logits_that_round_to_one_probability_keep_their_order():
    row = np.array([0, 1e-16, 3e-16, 2e-16], dtype=np.float32)  # top_k 1 has to be what greedy chooses
    assert draw_from(row, SamplingParams(top_k=1), 0.0) == 2
    assert {draw_from(row, SamplingParams(top_k=2), u) for u in (0.0, 0.9)} == {2, 3}
    assert {draw_from(row, SamplingParams(top_p=0.5), u) for u in (0.0, 0.9)} == {2, 3}


def test_min_p_is_relative_to_the_largest_probability():
    row = np.log(np.array([0.5, 0.26, 0.24], dtype=np.float32))
    found = {draw_from(row, SamplingParams(min_p=0.5), u) for u in np.linspace(0, 1 - 1e-9, 200)}
    assert found == {0, 1}


def test_top_p_counts_shares_of_what_top_k_left():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    params = SamplingParams(top_k=2, top_p=0.55)  # 0.4 / 0.7 = 0.571 reaches 0.55; 0.4 / 1.0 would not
    assert {draw_from(row, params, u) for u in np.linspace(0, 1 - 1e-9, 200)} == {0}


def chi_square_limit(degrees: int) -> float:
    """Value that a chi-square variable exceeds with probability 1e-4 (Wilson and Hilferty 1931; z = 3.719)."""
    a = 2 / (9 * degrees)
    return degrees * (1 - a + 3.719 * math.sqrt(a)) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=8),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.5, top_k=15, top_p=0.9),
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_follow_the_filtered_distribution(params, vary):
    row = (np.random.default_rng(5).standard_normal(20) * 1.2).astype(np.float32)
    probs = probs_of(row, params)
    allowed = plain.kept(row, probs, params)
    num_draws = 6000
    us = [uniform(42, i) if vary == "position" else uniform(i, 3) for i in range(num_draws)]
    counts = np.bincount([draw_from(row, params, u) for u in us], minlength=len(row))
    mass = sum(float(probs[t]) for t in allowed)
    statistic, degrees = 0.0, -1
    for t in allowed:
        expected = num_draws * float(probs[t]) / mass
        if expected >= 5:
            statistic += (counts[t] - expected) ** 2 / expected
            degrees += 1
    assert counts.sum() == counts[allowed].sum()
    assert statistic < chi_square_limit(degrees)


def test_uniform_depends_on_seed_and_position_and_fills_its_range():
    grid = np.array([[uniform(seed, position) for position in range(64)] for seed in range(-32, 32)])
    assert len(np.unique(grid)) == grid.size
    assert 0 <= grid.min() < 0.01
    assert 0.99 < grid.max() < 1
    # 4096 numbers of variance 1/12: the mean's deviation is 0.0045, a correlation's 1/sqrt(4095) = 0.0156; 4 of each.
    assert abs(grid.mean() - 0.5) < 4 * 0.0045
    flat = grid.ravel()
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 4 * 0.0158
    assert abs(np.corrcoef(flat, grid.T.ravel())[0, 1]) < 4 * 0.0158


def test_uniform_takes_any_64_bit_seed_signed_or_not():
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert uniform(2**63 - 1, 0) != uniform(-(2**63), 0)


def test_uniform_never_changes_between_releases():
    # Pinned: a seed that a user noted down has to give the same text tomorrow.
    pinned = [0.5744863976557276, 0.5631175988272692, 0.8486686868248087]
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1)] == pinned
