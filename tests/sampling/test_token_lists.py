"""allowed_token_ids, bad_words and logprob_token_ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.sampling.state import SamplingState

V = 40
IDS = st.lists(st.integers(0, V - 1), min_size=1, max_size=6, unique=True)


def sample(seed: int, output: list[int], params: SamplingParams) -> int:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(seed))
    (answer,) = BatchSampler().sample(logits, [SamplingState(params, seed, [1], output)])
    return answer.token_id


@given(st.integers(0, 99), IDS, st.sampled_from([0.0, 1.0]))
def test_only_allowed_tokens_are_sampled(seed: int, allowed: list[int], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=tuple(allowed), logit_bias={0: 100.0})
    assert sample(seed, [], params) in allowed


def test_greedy_takes_the_likeliest_of_the_allowed() -> None:
    logits = torch.arange(V, dtype=torch.float32)[None]
    params = SamplingParams(temperature=0.0, allowed_token_ids=(3, 9, 5))
    (answer,) = BatchSampler().sample(logits, [SamplingState(params, 0, [1], [])])
    assert answer.token_id == 9


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4), st.integers(0, 99))
def test_no_bad_word_is_ever_completed(words: list[list[int]], seed: int) -> None:
    params = SamplingParams(
        temperature=1.0, bad_words_token_ids=tuple(map(tuple, words)), allowed_token_ids=(0, 1, 2, 3, 4, 5)
    )
    output: list[int] = []
    for step in range(20):
        output.append(sample(seed * 100 + step, output, params))
    assert not any(output[i : i + len(word)] == word for word in words for i in range(20))


def test_a_word_is_forbidden_only_at_its_last_token_and_only_after_the_others() -> None:
    logits = torch.zeros(1, V)
    logits[0, 7] = 9.0
    params = SamplingParams(temperature=0.0, bad_words_token_ids=((6, 7),))
    (free,) = BatchSampler().sample(logits, [SamplingState(params, 0, [6], [5])])
    (bound,) = BatchSampler().sample(logits, [SamplingState(params, 0, [5], [5, 6])])
    assert (free.token_id, bound.token_id) == (7, 0), "the prompt's 6 does not count, as in vLLM"


def test_listed_logprobs_take_the_place_of_the_likeliest() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(logits[0].double(), dim=0)
    params = SamplingParams(temperature=0.0, logprobs=2, logprob_token_ids=(30, 4, 4))
    (answer,) = BatchSampler().sample(logits, [SamplingState(params, 0, [1], [])])
    assert answer.logprob is not None
    assert [token_id for token_id, _ in answer.logprob.top] == [30, 4, 4]
    np.testing.assert_allclose([p for _, p in answer.logprob.top], expected[[30, 4, 4]], atol=1e-6)
    assert answer.token_id == int(logits.argmax())


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(allowed_token_ids=()), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(V,)), "allowed_token_ids"),
        (SamplingParams(logprob_token_ids=(1,)), "logprob_token_ids"),
        (SamplingParams(logprobs=1, logprob_token_ids=()), "logprob_token_ids"),
        (SamplingParams(logprobs=1, logprob_token_ids=(1,) * 129), "logprob_token_ids"),
        (SamplingParams(logprobs=1, logprob_token_ids=(-1,)), "logprob_token_ids"),
        (SamplingParams(bad_words_token_ids=((),)), "bad_words"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(params: SamplingParams, param: str) -> None:
    with pytest.raises(InvalidParameterError) as error:
        params.validate(V)
    assert error.value.param == param
