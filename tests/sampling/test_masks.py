"""Masks beside the forward pass: constrained rows choose among what is allowed, free rows never notice."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from nvfp4_runtime.sampling.masks import Mask
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.sampling.state import SamplingState
from nvfp4_runtime.structured.matcher import GrammarState
from tests.sampling.test_sampler import EOS, V, logits_of

WORDS = -(-V // 32)


class Allows:
    """A matcher that allows a fixed set of tokens, and is complete after `length` of them."""

    def __init__(self, allowed: set[int], length: int = 10**9) -> None:
        self.allowed = allowed
        self.left = length
        self.failure = ""
        self.filled_in: set[int] = set()

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None:
        import ctypes

        bits = np.zeros(trg_byte_size * 8, dtype=np.uint8)
        bits[list(self.allowed)] = 1
        data = np.packbits(bits, bitorder="little").tobytes()
        ctypes.memmove(trg_pointer, data, len(data))
        self.filled_in.add(threading.get_ident())

    def consume_token(self, sampled_token: int) -> bool:
        self.left -= 1
        return sampled_token in self.allowed

    def is_stopped(self) -> bool:
        return self.left <= 0

    def is_accepting(self) -> bool:
        return self.is_stopped()

    def is_error(self) -> bool:
        return bool(self.failure)

    def get_error(self) -> str:
        return self.failure

    def deep_copy(self) -> Any:
        raise NotImplementedError


def state_of(seed: int, allowed: set[int] | None, matcher: Allows | None = None, **params: Any) -> SamplingState:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 50} | params
    grammar = None
    if allowed is not None:
        grammar = GrammarState(matcher or Allows(allowed), WORDS, EOS, lambda token_id: b"x")
    return SamplingState(SamplingParams(**options), seed, [1, 2], [], EOS, grammar)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_rows_choose_what_is_allowed_and_free_rows_what_they_did_alone(temperature: float) -> None:
    logits = logits_of(1, 6)
    allowed = [None, {5, 77, 4098}, None, {31}, {0, 32, 64}, None]
    together = BatchSampler().sample(logits, [state_of(i, a, temperature=temperature) for i, a in enumerate(allowed)])
    for i, (tokens, answer) in enumerate(zip(allowed, together, strict=True)):
        if tokens is None:
            (alone,) = BatchSampler().sample(logits[i : i + 1], [state_of(i, None, temperature=temperature)])
            assert answer == alone
        else:
            assert answer.token_id in tokens
            if temperature == 0:
                assert answer.token_id == max(tokens, key=lambda t: logits[i, t].item())


def test_the_logits_given_are_not_changed() -> None:
    logits = logits_of(2, 2)
    before = logits.clone()
    BatchSampler().sample(logits, [state_of(0, {3}), state_of(1, {4})])
    assert torch.equal(logits, before)


def test_masks_begin_before_the_logits_and_in_another_thread() -> None:
    sampler, matcher = BatchSampler(), Allows({9})
    states = [state_of(0, {9}, matcher), state_of(1, None)]
    masks = sampler.begin(states)
    assert masks is not None
    masks.wait()
    assert matcher.filled_in
    assert threading.get_ident() not in matcher.filled_in
    assert sampler.sample(logits_of(3, 2), states, masks)[0].token_id == 9


def test_free_requests_begin_nothing() -> None:
    sampler = BatchSampler()
    assert sampler.begin([state_of(0, None), state_of(1, None)]) is None


def test_logprobs_are_of_the_masked_distribution() -> None:
    (answer,) = BatchSampler().sample(logits_of(4, 1), [state_of(0, {7, 8}, logprobs=20)])
    assert answer.logprob is not None
    finite = [(token_id, logprob) for token_id, logprob in answer.logprob.top if logprob > -math.inf]
    assert {token_id for token_id, _ in finite} == {7, 8}
    assert sum(math.exp(logprob) for _, logprob in finite) == pytest.approx(1, abs=1e-6)
    assert answer.logprob.rank in (1, 2)


def test_grammar_moves_on_with_each_token_and_knows_its_end() -> None:
    matcher = Allows({3}, length=2)
    state = state_of(0, {3}, matcher)
    assert state.grammar is not None
    BatchSampler().sample(logits_of(5, 1), [state])
    assert (matcher.left, state.grammar.complete) == (1, False)
    BatchSampler().sample(logits_of(6, 1), [state])
    assert state.grammar.complete


def test_failing_grammar_ends_its_row_alone() -> None:
    failing = Allows({3})
    failing.failure = "too many states"
    nothing = Allows(set())
    logits = logits_of(7, 3)
    answers = BatchSampler().sample(logits, [state_of(0, {3}, failing), state_of(1, set(), nothing), state_of(2, None)])
    assert [answer.finite for answer in answers] == [False, False, True]
    assert "too many states" in (answers[0].error or "")
    assert "no token" in (answers[1].error or "")


def test_bias_and_min_tokens_come_after_the_mask() -> None:
    (biased,) = BatchSampler().sample(
        logits_of(8, 1), [state_of(0, {3, 4}, temperature=0.0, logit_bias={4: 100.0, 9: 100.0})]
    )
    assert biased.token_id == 4
    (stopped,) = BatchSampler().sample(logits_of(8, 1), [state_of(0, {2}, min_tokens=3)])
    assert not stopped.finite
    assert "min_tokens" in (stopped.error or "")


def test_broken_logits_are_reported_as_ever() -> None:
    logits = logits_of(9, 1)
    logits[0, 5] = math.nan
    (answer,) = BatchSampler().sample(logits, [state_of(0, {3})])
    assert (answer.finite, answer.error) == (False, None)


@pytest.mark.parametrize("allowed", [set(), {0}, {V - 1, 31, 32}, set(range(V)) - {5, 64}, set(range(32 * WORDS))])
def test_a_mask_permits_and_applies_the_same_tokens(allowed: set[int]) -> None:
    words = np.zeros(WORDS, dtype=np.int32)
    Allows(allowed).unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    row = np.arange(V, dtype=np.float32)
    mask = Mask(words)
    assert {i for i in range(V) if mask.permits(i)} == {i for i in allowed if i < V}
    assert set(np.flatnonzero(mask.apply(row) >= 0)) == {i for i in allowed if i < V}
    few = mask.few(V)
    assert few is None or set(few) == {i for i in allowed if i < V}
    assert not mask.permits(32 * WORDS)


def test_a_greedy_choice_is_the_same_whether_the_likeliest_token_is_allowed_or_not() -> None:
    logits = logits_of(9, 4)
    best = logits.argmax(dim=-1).tolist()
    for token_id, without in ((best[0], False), (best[1], True)):
        i = best.index(token_id)
        allowed = set(range(0, V, 3)) - {token_id} if without else set(range(0, V, 3)) | {token_id}
        state = state_of(0, allowed, temperature=0.0)
        (answer,) = BatchSampler().sample(logits[i : i + 1], [state])
        assert answer.token_id == max(sorted(allowed), key=lambda t: logits[i, t].item())
        assert state.grammar is not None
        assert state.grammar._matcher.left == 10**9 - 1  # type: ignore[attr-defined]  # the grammar moved on, once
