"""Thinking budgets: counted exactly, ended by the given tokens, and left alone where nobody thinks."""

from __future__ import annotations

import random

import pytest

from nvfp4_runtime.structured.thinking import ThinkingBudget, ThinkingSpan, ThinkingState

OPEN, CLOSE = 90, 91
TAGS = ThinkingSpan((OPEN,), (CLOSE,), False, (0, 1))
OPENED = ThinkingSpan((OPEN,), (CLOSE,), True, (0, 1))
LONG = ThinkingSpan((80, 81), (70, 71, 72), True, ())
CHANNELS = ThinkingSpan((60, 61, 62), (63,), False, None)
LEAD_OVER = (63, 64, 65)


def drive(span: ThinkingSpan, wanted: list[int], num_tokens: int | None, ending: tuple[int, ...] = ()) -> list[int]:
    """What comes out when the model wants to say `wanted`, each forced token taking the place of one of its own."""
    budget = None if num_tokens is None else ThinkingBudget(span, num_tokens, ending or span.closes)
    state, said = ThinkingState(span, budget), list[int]()
    for token_id in wanted:
        said.append(token_id if state.forced is None else state.forced)
        state.follow(said)
    return said


@pytest.mark.parametrize(
    ("span", "wanted", "num_tokens", "said"),
    [
        (OPENED, [5, 6, 7, 8, 9], 3, [5, 6, 7, CLOSE, 9]),
        (OPENED, [5, 6, 7], 0, [CLOSE, 6, 7]),
        (OPENED, [5, CLOSE, 7, 8, 9], 3, [5, CLOSE, 7, 8, 9]),
        (OPENED, [5, CLOSE, OPEN, 8, 9, 9, 9], 2, [5, CLOSE, OPEN, 8, 9, 9, 9]),  # it thinks once
        (TAGS, [OPEN, 5, 6, 7, 8], 2, [OPEN, 5, 6, CLOSE, 8]),
        (TAGS, [0, 1, 0, OPEN, 5, 6, 7], 1, [0, 1, 0, OPEN, 5, CLOSE, 7]),
        (TAGS, [0, 5, OPEN, 6, 7, 8], 1, [0, 5, OPEN, 6, 7, 8]),  # the answer holds the tag
        (TAGS, [OPEN, OPEN, 5, 6], 1, [OPEN, OPEN, CLOSE, 6]),
        (TAGS, [5, 6, 7, 8], 0, [5, 6, 7, 8]),
        (LONG, [1, 2, 3, 4, 5, 6, 7], 2, [1, 2, 70, 71, 72, 6, 7]),
        (LONG, [1, 70, 71, 72, 5, 6], 1, [1, 70, 71, 72, 5, 6]),
        (LONG, [1, 70, 71, 3, 4, 5, 6, 7], 2, [1, 70, 71, 3, 70, 71, 72, 7]),  # it began to end and went on
        (CHANNELS, [60, 61, 62, 5, 6, 7, 8, 9], 2, [60, 61, 62, 5, 6, 63, 8, 9]),
        (CHANNELS, [60, 61, 62, 5, 63, 7, 60, 61, 62, 8, 9], 2, [60, 61, 62, 5, 63, 7, 60, 61, 62, 8, 63]),
    ],
)
def test_the_end_comes_when_the_budget_is_spent_and_not_before(
    span: ThinkingSpan, wanted: list[int], num_tokens: int, said: list[int]
) -> None:
    assert drive(span, wanted, num_tokens) == said
    assert drive(span, wanted, None) == wanted


def test_all_of_the_ending_is_written_even_behind_the_token_that_closes() -> None:
    assert drive(CHANNELS, [60, 61, 62, 5, 6, 7, 8, 9, 9], 1, LEAD_OVER) == [60, 61, 62, 5, 63, 64, 65, 9, 9]


@pytest.mark.parametrize(
    ("span", "said", "count"),
    [
        (OPENED, [5, 6, CLOSE, 7], 2), (OPENED, [5, 6], 2), (OPENED, [CLOSE, 7], 0), (TAGS, [OPEN, 5, CLOSE, 7], 1),
        (TAGS, [5, 6], 0), (LONG, [1, 70, 71, 72, 5], 1), (CHANNELS, [60, 61, 62, 5, 63, 60, 61, 62, 6, 7, 63, 8], 3),
    ],
)  # fmt: skip
def test_tokens_of_reasoning_are_counted_without_their_markers(span: ThinkingSpan, said: list[int], count: int) -> None:
    state = ThinkingState(span)
    for token_id in said:
        state.push(token_id)
    assert state.num_tokens == count


@pytest.mark.parametrize("seed", range(50))
def test_whether_a_position_is_free_is_true_and_does_not_depend_on_the_newest_token(seed: int) -> None:
    draw = random.Random(seed)
    span = draw.choice([OPENED, TAGS, LONG, CHANNELS])
    budget = ThinkingBudget(span, draw.randint(0, 6), LEAD_OVER if span is CHANNELS else span.closes)
    tokens = [OPEN, CLOSE, 80, 81, 70, 71, 72, 60, 61, 62, 63, 0, 1, 5]
    state, said = ThinkingState(span, budget), list[int]()
    late = ThinkingState(span, budget)  # knows all but the newest
    for position in range(40):
        assert state.free_at(position) == late.free_at(position)
        if state.free_at(position):
            assert state.forced is None
        late.follow(said)
        said.append(draw.choice(tokens) if state.forced is None else state.forced)
        state.follow(said)
    inside = ThinkingState(span)
    inside.follow(said)
    assert span in (LONG, CHANNELS) or inside.num_tokens <= budget.num_tokens
