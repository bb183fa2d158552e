"""BatchSampler: rows do not see each other, broken rows fail alone, greedy is argmax."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch

from nvfp4_runtime.sampling.draw import uniform
from nvfp4_runtime.sampling.logprobs import token_logprob
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.sampling.state import Sampled, SamplingState
from tests.sampling import plain

V = 4099  # prime: no vector width divides it, so a row's tail is always exercised
EOS = (2,)


def logits_of(seed: int, rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, V)) * scale).astype(np.float32))


def mixed_params(seed: int) -> SamplingParams:
    """Every feature on or off by chance."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=pick(0.0, 0.3, 1.0, 1.8),
        top_p=pick(1.0, 1.0, 0.9, 0.3),
        top_k=pick(0, -1, 1, 40, 10**6),
        min_p=pick(0.0, 0.0, 0.1),
        repetition_penalty=pick(1.0, 1.0, 1.3),
        presence_penalty=pick(0.0, 0.0, 0.6),
        frequency_penalty=pick(0.0, 0.0, 0.4),
        logit_bias=pick({}, {5: 4.0, 17: -100.0}),
        min_tokens=pick(0, 0, 6),
        max_tokens=50,
        logprobs=pick(None, None, 0, 5),
    )


def state_of(seed: int, output: list[int]) -> SamplingState:
    return SamplingState(mixed_params(seed), seed, [seed % V, 5, 6], output, EOS)


def expected_token(row: np.ndarray, state: SamplingState) -> int:
    """The whole chain, by the plain twin."""
    params = state.params
    edited = plain.edited(row, params, list(state.prompt_token_ids), list(state.output_token_ids), state.eos_token_ids)
    if params.temperature == 0:
        return int(np.argmax(edited))
    # The twin shares the float32 probabilities (test_draw compares those with FP64) and redoes all that follows.
    probs = np.exp((edited - edited.max()) * np.float32(1 / params.temperature))
    return plain.drawn(edited, probs, params, uniform(state.seed, len(state.output_token_ids)))


def test_mixed_requests_match_the_plain_twin():
    sampler, logits = BatchSampler(), logits_of(0, 24)
    states = [state_of(i, [i, 7, 7]) for i in range(24)]
    for row, state, answer in zip(logits.numpy(), states, sampler.sample(logits, states), strict=True):
        assert answer.finite
        assert answer.token_id == expected_token(row, state)
        k = state.params.logprobs
        assert answer.logprob == (None if k is None else token_logprob(row, answer.token_id, k))


def test_answers_are_equal_alone_in_batches_of_32_and_in_any_order():
    num_requests, num_steps = 64, 6
    logits = [logits_of(100 + step, num_requests, scale=1.0 + step) for step in range(num_steps)]

    def run(batches_at) -> list[list[Sampled]]:
        sampler = BatchSampler()
        outputs: list[list[int]] = [[] for _ in range(num_requests)]
        states = [state_of(i, outputs[i]) for i in range(num_requests)]
        answers: list[list[Sampled]] = [[] for _ in range(num_requests)]
        for step in range(num_steps):
            for batch in batches_at(step):
                found = sampler.sample(logits[step][batch], [states[i] for i in batch])
                for i, answer in zip(batch, found, strict=True):
                    answers[i].append(answer)
                    outputs[i].append(answer.token_id)
        return answers

    def shuffled(step: int) -> list[list[int]]:
        order = np.random.default_rng(step).permutation(num_requests).tolist()
        return [order[:32], order[32:]]

    alone = run(lambda step: [[i] for i in range(num_requests)])
    # Dataclass equality compares logprobs as floats, exactly.
    assert run(lambda step: [list(range(32)), list(range(32, 64))]) == alone
    assert run(shuffled) == alone
    assert len({answer.token_id for row in alone for answer in row}) > 100


def test_answers_do_not_depend_on_torch_threads():
    logits, states = logits_of(1, 32), [state_of(i, [3]) for i in range(32)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = BatchSampler().sample(logits, states)
        torch.set_num_threads(2)
        assert BatchSampler().sample(logits, states) == one
    finally:
        torch.set_num_threads(before)


def test_a_request_rebuilt_after_preemption_goes_on_as_before():
    logits = logits_of(2, 1)
    output = [9, 9, 4]
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, temperature=0.9)
    kept, sampler = SamplingState(params, 3, [1, 2], [], EOS), BatchSampler()
    for token in output:
        sampler.sample(logits, [kept])
        kept.output_token_ids.append(token)
    rebuilt = SamplingState(params, 3, [1, 2], list(output), EOS)
    assert sampler.sample(logits, [kept]) == sampler.sample(logits, [rebuilt])


def test_greedy_is_argmax_with_the_lowest_id_among_equals():
    logits = logits_of(3, 32)
    logits[4, 10] = logits[4, 2000] = 99.0
    states = [SamplingState(SamplingParams(temperature=0), i, [1], []) for i in range(32)]
    found = [answer.token_id for answer in BatchSampler().sample(logits, states)]
    assert found == [int(np.argmax(row)) for row in logits.numpy()]
    assert found[4] == 10


def test_same_seed_repeats_and_another_seed_differs():
    logits = logits_of(4, 1, scale=0.5)

    def run(seed: int) -> list[int]:
        output: list[int] = []
        state = SamplingState(SamplingParams(), seed, [1], output)
        sampler = BatchSampler()
        for _ in range(20):
            output.append(sampler.sample(logits, [state])[0].token_id)
        return output

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert len(set(run(7))) > 10  # the position counts too


@pytest.mark.parametrize("params", [SamplingParams(temperature=0, logprobs=3), SamplingParams(presence_penalty=1)])
def test_broken_rows_fail_alone(params):
    logits = logits_of(5, 6)
    states = [SamplingState(params, i, [1], [2]) for i in range(6)]
    healthy = BatchSampler().sample(logits, states)
    logits[1, 77] = math.nan
    logits[2] = math.nan
    logits[3, V - 1] = math.inf
    logits[4] = -math.inf
    found = BatchSampler().sample(logits, states)
    assert [answer.finite for answer in found] == [True, False, False, False, False, True]
    assert [found[0], found[5]] == [healthy[0], healthy[5]]
    assert all(answer == Sampled(-1, None, False) for answer in found[1:5])


def test_nan_beside_infinity_is_still_not_finite():
    logits = logits_of(5, 1)
    logits[0, 3], logits[0, 9] = math.inf, math.nan
    assert not BatchSampler().sample(logits, [SamplingState(SamplingParams(), 0, [1], [])])[0].finite


def test_stop_tokens_that_cover_the_vocabulary_leave_nothing_to_choose():
    params = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(V)))
    assert not BatchSampler().sample(logits_of(6, 1), [SamplingState(params, 0, [1], [])])[0].finite


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_biasing_everything_by_minus_100_changes_no_choice(temperature):
    # Integers up to 16 minus 100 are exact in float32, so the probabilities are equal to the bit.
    logits = torch.from_numpy(np.random.default_rng(7).integers(0, 16, (1, V)).astype(np.float32))
    plain_params = SamplingParams(temperature=temperature)
    biased = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(V), -100.0))
    choices = [BatchSampler().sample(logits, [SamplingState(p, 5, [1], [])])[0] for p in (plain_params, biased)]
    assert choices[0] == choices[1]


def test_the_logits_given_are_not_changed():
    logits, states = logits_of(8, 24), [state_of(i, [i, 7]) for i in range(24)]
    before = logits.clone()
    BatchSampler().sample(logits, states)
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_logits():
    logits = logits_of(9, 1)
    params = SamplingParams(temperature=0, logit_bias={50: 100.0}, logprobs=2)
    answer = BatchSampler().sample(logits, [SamplingState(params, 0, [1], [])])[0]
    assert answer.token_id == 50
    assert answer.logprob is not None
    assert answer.logprob.logprob == pytest.approx(plain.logprobs(logits[0].numpy())[50], abs=2.4e-7)
    assert 50 not in [token for token, _ in answer.logprob.top]


def test_a_slice_of_a_wider_tensor_samples_like_its_copy():
    wide = torch.from_numpy(np.random.default_rng(10).standard_normal((8, V + 61)).astype(np.float32))
    states = [state_of(i, []) for i in range(8)]
    view = wide[:, :V]
    assert not view.is_contiguous()
    assert BatchSampler().sample(view, states) == BatchSampler().sample(view.clone(), states)


def test_caches_go_with_their_requests():
    sampler = BatchSampler()
    states = [SamplingState(SamplingParams(presence_penalty=1), i, [1], []) for i in range(8)]
    sampler.sample(logits_of(11, 8), states)
    assert len(sampler._edits) == 8
    del states
    gc.collect()
    assert len(sampler._edits) == 0
